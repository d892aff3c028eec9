"""What an experiment took: device-hours, attempts and memory by stage, and when each stage ran."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jobs.control.result_index import facts_of
from jobs.report.drawing import Axis, colour, figure, legend, linear, named, panel
from jobs.report.material import MANY_RUNS, Material
from jobs.report.page import Figure, Row, Section, Table, number
from jobs.report.waiting import waiting_tables
from jobs.store.records import Result

MOST_LANES = 60
GIB = 2**30


@dataclass(frozen=True)
class Bar:
    """One finished stage. Times in seconds since the epoch."""

    stage: str
    name: str
    host: str
    began: float
    ended: float


def cost_section(material: Material) -> Section | None:
    """None for runs from a CSV file."""
    results = {key: result for source in material.sources for key, result in source.results.items() if key in source.graph.nodes}
    if not results:
        return None
    kinds = list(dict.fromkeys(node.stage for source in material.sources for node in source.graph.nodes.values()))
    by_kind = {kind: [result for result in results.values() if result.stage == kind] for kind in kinds}
    finished = {kind: found for kind, found in by_kind.items() if found}
    parts: list[Table | Figure] = [_table(finished), *waiting_tables(finished)]
    bars = bars_of(list(results.values()))
    if bars:
        parts.append(_timeline(bars, kinds))
    sentences = (
        "Each stage counts once, with its attempts since the last start without a checkpoint. Waiting in the queue is not part of it.",
        "A stage without GPU counts with its processes times threads. Memory: of the largest process.",
    )
    return Section("cost", "What did it cost?", sentences, tuple(parts))


def bars_of(results: Sequence[Result]) -> list[Bar]:
    """When and where each stage ran, by its last attempt; stages that do not state it are left out. Ordered by begin."""
    found = []
    for result in results:
        began, ended = (_time(result.provenance.get(name)) for name in ("started", "finished"))
        if began is not None and ended is not None:
            name = f"{result.stage}, fold {result.fold}, seed {result.seed}"
            found.append(Bar(result.stage, name, str(result.provenance.get("host") or "not known"), began, ended))
    return sorted(found, key=lambda bar: (bar.began, bar.ended, bar.name))


def lanes_of(bars: Sequence[Bar]) -> list[tuple[str, list[Bar]]]:
    """Bars in lanes, as few as there are at the same time on each host; host and bars of each lane."""
    lanes: dict[str, list[list[Bar]]] = {}
    for bar in bars:
        of_host = lanes.setdefault(bar.host, [])
        free = next((lane for lane in of_host if lane[-1].ended <= bar.began), None)
        if free is None:
            of_host.append([bar])
        else:
            free.append(bar)
    return [(host, lane) for host in sorted(lanes) for lane in lanes[host]]


def _table(by_kind: Mapping[str, Sequence[Result]]) -> Table:
    columns = (
        "Stage",
        "finished",
        "GPU-hours",
        "CPU-hours",
        "median minutes",
        "longest minutes",
        "later attempts",
        "memory (GiB)",
        "GPU memory (GiB)",
    )
    rows, all_hours = [], [0.0, 0.0]
    for kind, results in by_kind.items():
        facts = [facts_of(result, 0) for result in results]
        gpu = sum(each.all_seconds * max(1, each.processes) for each in facts if each.on_gpu) / 3600
        cpu = sum(each.all_seconds * max(1, each.processes) * max(1, each.threads) for each in facts if not each.on_gpu) / 3600
        all_hours = [all_hours[0] + gpu, all_hours[1] + cpu]
        minutes = [each.all_seconds / 60 for each in facts]
        memory = max(each.memory for each in facts) / GIB
        of_gpu = max(float(result.provenance.get("peak_gpu_bytes") or 0) for result in results) / GIB
        later = str(sum(each.attempts - 1 for each in facts))
        times = (number(statistics.median(minutes)), number(max(minutes)))
        rows.append(Row((kind, str(len(results)), number(gpu, 2), number(cpu, 2), *times, later, number(memory), number(of_gpu))))
    rows.append(Row(("All", str(sum(map(len, by_kind.values()))), *(number(hours, 2) for hours in all_hours), "", "", "", "", "")))
    return Table("Device time by stage", columns, tuple(rows))


def _timeline(bars: Sequence[Bar], kinds: Sequence[str]) -> Figure:
    lanes = lanes_of(bars)
    shown, first = lanes[:MOST_LANES], bars[0].began
    hours = linear([0.0, (max(bar.ended for bar in bars) - first) / 3600], "hours since the first stage began", room=0.01)
    names = [host for host, _ in reversed(shown)]
    drawn, height = panel(
        hours, Axis(-0.5, len(names) - 0.5, named(names).ticks if len(names) <= 20 else ()), height=20.0 * min(len(names), 20) + 20
    )
    for place, (_, lane) in enumerate(shown):
        y = float(len(shown) - 1 - place)
        for bar in lane:
            began, ended = (bar.began - first) / 3600, (bar.ended - first) / 3600
            tip = "" if len(bars) > MANY_RUNS else f"{bar.name}: {number((ended - began) * 60)} min"
            drawn.line([(began, y), (ended, y)], f"medium {colour(kinds.index(bar.stage))}", tip)
    left_out = f" The first {MOST_LANES} of {len(lanes)} lanes." if len(lanes) > MOST_LANES else ""
    what = f"One bar a finished stage, from the begin of its last attempt to its end; as many lanes a node as it ran at once.{left_out}"
    keys = [("line", f"medium {colour(place)}", kind) for place, kind in enumerate(kinds)]
    return figure("timeline", "When the stages ran", what, height, (drawn.svg(), legend(keys)))


def _time(value: object) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else None
    except ValueError:
        return None
