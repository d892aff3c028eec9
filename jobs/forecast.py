"""What a plan will cost: hours per batch from finished siblings where there are any, else from the minutes asked for. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from statistics import median

from jobs.config import Resources, at_once_of
from jobs.graph import Graph
from jobs.plan import Batch, NodeFacts, Plan


class Source(Enum):
    """Where an estimate comes from."""

    siblings = "finished siblings"  # median seconds of finished stages of the same name in this experiment
    requested = "requested time"  # an upper bound


@dataclass(frozen=True)
class Cost:
    """One line of a forecast: a batch that will be submitted."""

    stage: str
    method: str
    tasks: int
    stages: int  # to compute, over all tasks
    seconds: float  # estimated for one stage
    source: Source
    gpu_hours: float
    cpu_hours: float
    asks: str = ""  # time and memory for a task, and where they come from; "": nobody is asked


@dataclass(frozen=True)
class Forecast:
    """What a launch will reuse, submit and cost."""

    reused: int
    waiting: int
    deferred: int
    blocked: int
    given_up: int
    costs: tuple[Cost, ...]

    @property
    def tasks(self) -> int:
        return sum(cost.tasks for cost in self.costs)

    @property
    def gpu_hours(self) -> float:
        return sum(cost.gpu_hours for cost in self.costs)

    @property
    def cpu_hours(self) -> float:
        return sum(cost.cpu_hours for cost in self.costs)


def forecast(
    graph: Graph,
    facts: Mapping[str, NodeFacts],
    plan: Plan,
    resources: Callable[[str], Resources],
    asks: Callable[[Batch], str] = lambda batch: "",
) -> Forecast:
    """The forecast of a plan; `resources` says what a stage is given, by name, and `asks` what Slurm is asked for a batch, in words.

    Deferred stages will run too, but not in this pass: they are counted and not costed.
    """
    siblings = sibling_seconds(graph, facts)
    costs = []
    for batch in plan.batches:
        given, count = resources(batch.stage), len(batch.keys)
        measured = siblings.get((batch.stage, batch.method), siblings.get((batch.stage, "")))
        source = Source.requested if measured is None else Source.siblings
        seconds = given.minutes * 60.0 if measured is None else measured
        at_once = max(1, at_once_of(given))  # stages that share what one task is given; 0, as memory allows, may be one
        rounds = sum(math.ceil(len(task.keys) / at_once) for task in batch.tasks)
        hours = seconds * rounds * given.nodes / 3600
        gpu_hours, cpu_hours = hours * given.gpus, hours * given.cpus
        costs.append(Cost(batch.stage, batch.method, len(batch.tasks), count, seconds, source, gpu_hours, cpu_hours, asks(batch)))
    return Forecast(
        reused=len(plan.reused),
        waiting=len(plan.waiting),
        deferred=len(plan.deferred),
        blocked=len(plan.blocked),
        given_up=len(plan.given_up),
        costs=tuple(costs),
    )


def forecast_lines(expected: Forecast) -> list[str]:
    """For each batch what it costs, and what Slurm is asked for; then the whole."""
    lines = []
    for cost in expected.costs:
        lines.append(
            f"submit {cost.stage} {cost.method}: {cost.tasks} tasks, {cost.stages} stages, {cost.gpu_hours:.1f} GPU-hours, "
            f"{cost.cpu_hours:.1f} CPU-hours ({cost.source.value})"
        )
        lines.extend([f"  {cost.asks}"] if cost.asks else [])
    whole = (
        f"under way {expected.waiting}, deferred {expected.deferred}, blocked {expected.blocked}, given up {expected.given_up}; "
        f"in all {expected.tasks} tasks, at most about {expected.gpu_hours:.1f} GPU-hours and {expected.cpu_hours:.1f} CPU-hours"
    )
    return [*lines, whole]


def shape_in_words(given: Resources, stages: int) -> str:
    """How the `stages` of one task are computed, where it is not by one process, one after another."""
    at_once = at_once_of(given)
    if given.team > 1:
        nodes = f" on {given.nodes} nodes, memory is that of each" if given.nodes > 1 else ""
        return f"; {given.team} processes{nodes}"
    if at_once == 1 or stages == 1:
        return ""
    return f"; {min(at_once, stages)} of {stages} stages at once" if at_once else f"; of {stages} stages as many at once as memory allows"


def sibling_seconds(graph: Graph, facts: Mapping[str, NodeFacts]) -> dict[tuple[str, str], float]:
    """(stage, method) -> median seconds of those that are done; (stage, "") over all methods."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, node in graph.nodes.items():
        fact = facts.get(key)
        if fact is not None and fact.done and fact.seconds > 0:
            found.setdefault((node.stage, node.method), []).append(fact.seconds)
            found.setdefault((node.stage, ""), []).append(fact.seconds)
    return {which: median(seconds) for which, seconds in found.items()}
