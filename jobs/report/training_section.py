"""Whether training worked: the curves that stages leave as `curves.json`, one line a stage and their median."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from jobs.report.drawing import WIDTH, Box, Panel, figure, left_margin, legend, linear
from jobs.report.material import Material, Source
from jobs.report.page import Figure, Row, Section, Table, number
from jobs.store.records import Decoder
from jobs.text import counted

FILE = "curves.json"
MOST_POINTS = 12_000  # of all thin lines of a report together: about 130 kB
LEAST_POINTS = 12  # of one line
MOST_LINES = MOST_POINTS // LEAST_POINTS  # thin lines of a report together
HEIGHT, TOP, BELOW = 200.0, 50.0, 44.0
Value = TypeVar("Value")
Points = Sequence[tuple[float, float]]  # step, value


@dataclass(frozen=True)
class Curves:
    """The file that a stage leaves. `references`: a value to compare a curve with, and what it is."""

    curves: Mapping[str, tuple[tuple[float, float], ...]]
    references: Mapping[str, tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The stages of one kind, of one method and corpus."""

    title: str
    stages: Mapping[str, Curves]  # name for the tooltip -> curves


_FILE = Decoder(Curves)


def training_section(material: Material) -> Section | None:
    """None where no stage has left curves: those of versions until 0.4, and runs from a CSV file."""
    groups = [group for source in material.sources for group in _groups(material, source)]
    lines = sum(len(_names(group)) * len(group.stages) for group in groups)
    points = max(LEAST_POINTS, MOST_POINTS // max(lines, 1))
    share = min(1.0, MOST_LINES / max(lines, 1))
    parts: list[Table | Figure] = [_figure(group, f"curves-{place}", points, share) for place, group in enumerate(groups)]
    warnings = _warnings(material)
    parts.extend([warnings] if warnings.rows else [])
    sentence = "Curves as functions of the step, as logged during training."
    return Section("training", "Did training work?", (sentence,), tuple(parts)) if parts else None


def thinned(values: Sequence[Value], most: int) -> Sequence[Value]:
    """At most `most` values, evenly spaced, the last one among them."""
    if len(values) <= most:
        return values
    return [values[-1 - len(values) * back // most] for back in range(most - 1, -1, -1)]


def median_curve(curves: Sequence[Points]) -> list[tuple[float, float]]:
    """The median at every step that all curves have."""
    values = [dict(points) for points in curves]
    shared = [step for step, _ in curves[0] if all(step in each for each in values)]
    return [(step, statistics.median(each[step] for each in values)) for step in shared]


def _warnings(material: Material) -> Table:
    """What stages warned of, each stage once."""
    found = {key: source.results[key] for source in material.sources for key in source.graph.nodes if key in source.results}
    rows = tuple(Row((each.stage, each.fold, str(each.seed), line)) for each in found.values() for line in each.warnings)
    return Table("Warnings of stages", ("Stage", "fold", "seed", "warning"), rows, texts=1)


def _groups(material: Material, source: Source) -> list[Group]:
    """Upstream stages by kind, then the last stages by method."""
    last = {run.key: (source.method(run), run) for run in source.graph.runs}
    found: dict[str, dict[str, Curves]] = {}
    for key, node in source.graph.nodes.items():
        path = source.artifact(key, FILE) if key in source.results else None
        curves = _FILE.read(path) if path is not None else None
        if curves is None or not curves.curves or not all(curves.curves.values()) or not (key in last or source.graph.children[key]):
            continue
        if key in last:
            method, run = last[key]
            title, name = f"{material.label(method)}: {node.stage}", f"fold {run.fold}, slot {run.slot}"
        else:
            title, name = f"{node.stage} ({material.label(node.method)})", f"fold {node.fold}"
        found.setdefault(f"{title} on {source.graph.corpus}", {})[name] = curves
    return [Group(title, stages) for title, stages in found.items()]


def _names(group: Group) -> list[str]:
    """The curves of a group but for the learning rate, which is planned."""
    names = {name for curves in group.stages.values() for name in curves.curves if not name.endswith("learning_rate")}
    return sorted(names, key=lambda name: (not name.startswith("train/"), not name.endswith("loss"), name))


def _figure(group: Group, name: str, points: int, share: float) -> Figure:
    """`points`: of each thin line at most; `share`: of the stages that have one."""
    names = _names(group)
    shown = max(1, int(share * len(group.stages)))
    parts, rows = [], []
    texts: dict[str, None] = {}
    for place, each in enumerate(names):
        curves = {stage: found.curves[each] for stage, found in group.stages.items() if each in found.curves}
        references = [found.references[each] for found in group.stages.values() if each in found.references]
        texts.update(dict.fromkeys(text for _, text in references))
        parts.append(_panel(each, curves, [value for value, _ in references], place, points, shown))
        last = [curve[-1][1] for curve in curves.values()]
        rows.append(Row((each, *(number(value, 3) for value in (statistics.median(last), min(last), max(last))))))
    height = (1 + (len(names) - 1) // 2) * (HEIGHT + TOP + BELOW)
    keys = [("line", "thin m0", "one stage"), ("line", "medium m6", "median"), *(("line", "dashed grey", text) for text in texts)]
    which = counted(len(group.stages), "finished stage")
    which = which if shown == len(group.stages) else f"{shown} of {which}"
    what = f"Thin lines: {which}; thick lines: the median of all at each step."
    table = Table("Last values", ("Curve", "median", "lowest", "highest"), tuple(rows))
    return figure(name, f"Curves of {group.title}", what, height, (*parts, legend(keys)), tables=(table,))


def _panel(name: str, curves: Mapping[str, Points], references: Sequence[float], place: int, points: int, shown: int) -> str:
    values = [value for each in curves.values() for _, value in each]
    y = linear([*values, *references], "", wanted=5)
    left, half = left_margin(text for _, text in y.ticks), WIDTH / 2
    box = Box(left + place % 2 * half, TOP + place // 2 * (HEIGHT + TOP + BELOW), half - left - 16, HEIGHT)
    x = linear([0.0, *(step for each in curves.values() for step, _ in each)], "step", room=0.02, wanted=5)
    drawn = Panel(x, y, box, name)
    for stage, each in thinned(list(curves.items()), shown):
        drawn.line(list(thinned(each, points)), "thin m0", stage)
    for value in sorted(set(references)):
        drawn.line([(x.low, value), (x.high, value)], "dashed grey")
    drawn.line(median_curve(list(curves.values())), "medium m6", "median")
    return drawn.svg()
