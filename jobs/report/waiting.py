"""How long the jobs of each kind of stage waited in Slurm's queue, what they requested and used, and what would have been enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.control.estimates import CONFIGURED, START_SECONDS, Bounds, predict
from jobs.control.facts import StageFacts
from jobs.control.result_index import facts_of
from jobs.experiment.config import Resources, at_once_of
from jobs.report.page import Row, Table, number
from jobs.store.records import Result
from jobs.tables.format import DASH

GIB = 2**30
LEAST_SIBLINGS = Bounds({}).siblings  # finished ones that a prediction requires


@dataclass(frozen=True)
class Used:
    """One finished stage whose job's request is on record. Memory in bytes of a node; 0: not known."""

    facts: StageFacts
    most: Resources  # as configured
    waited: float | None  # seconds, over all attempts; None: not known
    minutes: float  # requested for this stage
    memory: float  # requested
    used_memory: float
    busy: float  # cores that its process kept busy on average

    @property
    def cores(self) -> float:
        """Requested for a process."""
        return self.most.cpus_per_process / max(1, at_once_of(self.most))


def used_of(result: Result) -> Used | None:
    """None for a stage that no Slurm job computed, or one of a version that did not record requests."""
    asked, queue = result.provenance.get("requested"), result.provenance.get("queue")
    if not asked or not all(name in asked for name in ("minutes", "configured_minutes", "cpus", "gpus", "nodes", "stages", "at_once")):
        return None
    facts, nodes = facts_of(result, 0), max(1, int(asked["nodes"]))
    on_node = max(1, facts.processes // nodes)
    at_once, stages = int(asked["at_once"]), max(1, int(asked["stages"]))
    rounds = math.ceil(stages / max(1, at_once))
    most = Resources(
        cpus=int(asked["cpus"]),
        gpus=int(asked["gpus"]),
        nodes=nodes,
        memory_gb=asked.get("configured_mb", 0) / 1024,
        minutes=int(asked["configured_minutes"]) // rounds,
        processes=on_node,
        runs_per_task=stages,
        at_once=at_once,
    )
    cpu_seconds = result.provenance.get("cpu_seconds")
    return Used(
        facts,
        most,
        queue["waited"] + queue["before"] if queue and "waited" in queue and "before" in queue else None,
        asked["minutes"] / rounds,
        asked.get("memory_mb", 0) * 2**20,
        facts.memory * on_node if at_once_of(most) == 1 else 0,
        cpu_seconds / facts.seconds if isinstance(cpu_seconds, int | float) and facts.seconds else 0.0,
    )


def waiting_tables(by_kind: Mapping[str, Sequence[Result]]) -> list[Table]:
    """Waiting, and requests with what would have been enough, by kind of stage; no table where nothing is on record."""
    found = {kind: [used for result in results if (used := used_of(result))] for kind, results in by_kind.items()}
    found = {kind: used for kind, used in found.items() if used}
    waiting = [row for kind, used in found.items() if (row := _waiting(kind, [each.waited for each in used if each.waited is not None]))]
    columns = ("Stage", "jobs", "median minutes", "longest minutes")
    tables = [Table("Waiting in the queue by stage", columns, tuple(waiting), note=(WAITING,))] if waiting else []
    if found:
        rows = tuple(_request(kind, used) for kind, used in found.items())
        advice = tuple(line for kind, used in found.items() for line in advice_lines(kind, used))
        tables.append(Table("Requested and used by stage", REQUESTED, rows, note=(USED, *advice)))
    return tables


WAITING = (
    "From the moment at which only the queue kept a job from starting (it was submitted, upstream stages had results, its last attempt had "
    "ended) until its worker began, over all attempts of a stage."
)
REQUESTED = (
    *("Stage", "minutes requested", "median used", "longest used", "memory requested (GiB)", "largest used (GiB)"),
    *("cores requested", "median busy", "GPUs requested", "used"),
)
USED = "Medians of what was requested. Memory and GPUs are those of a node, cores those of a process."


def advice_lines(kind: str, used: Sequence[Used]) -> list[str]:
    """Settings that would have been enough for stages of one kind, by the rule that predicts requests (jobs.control.estimates)."""
    most = used[-1].most
    enough = len(used) >= LEAST_SIBLINGS
    prediction = predict([each.facts for each in used], most, START_SECONDS) if enough else CONFIGURED
    settings = [f"resources.{kind}.minutes={prediction.minutes}"] if prediction.minutes else []
    settings += [f"resources.{kind}.memory_gb={prediction.memory_gb:g}"] if prediction.memory_gb else []
    configured = f"{most.minutes} min" + (f" and {most.memory_gb:g} GB" if most.memory_gb else "")
    lines = [f"{kind}: {' and '.join(settings)} would be enough (configured: {configured}), {prediction.source}."] if settings else []
    idle = most.gpus and not any(each.facts.on_gpu for each in used)
    return [*lines, f"{kind}: no stage used a GPU: set resources.{kind}.gpus=0."] if idle else lines


def _waiting(kind: str, seconds: Sequence[float]) -> Row | None:
    if not seconds:
        return None
    return Row((kind, str(len(seconds)), number(statistics.median(seconds) / 60), number(max(seconds) / 60)))


def _request(kind: str, used: Sequence[Used]) -> Row:
    minutes = [each.facts.seconds / 60 for each in used]
    memory, peak = statistics.median(each.memory for each in used) / GIB, max(each.used_memory for each in used) / GIB
    most = used[-1].most
    return Row(
        (
            kind,
            number(statistics.median(each.minutes for each in used), 0),
            number(statistics.median(minutes)),
            number(max(minutes)),
            number(memory) if memory else DASH,
            number(peak) if peak else DASH,
            number(statistics.median(each.cores for each in used)),
            number(statistics.median(each.busy for each in used)),
            str(most.gpus),
            str(min(most.gpus, most.processes) if any(each.facts.on_gpu for each in used) else 0),
        )
    )
