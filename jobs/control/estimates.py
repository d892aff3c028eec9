"""What to ask of Slurm for a stage, predicted from finished siblings: a quantile of what they took, plus a margin. Pure.

Siblings are stages of the same name in one experiment's graph: the recipe is the same, fold and seed are not. Those of the same method
count first, else those of any method. They took as long as all their attempts since the stage was last begun anew, so that one which was
interrupted and resumed counts in full. One that has not come to its end took at least what it took so far.

Of memory, what a process has of its own gets quantile and margin, times the processes of a node. Pages of files (features, frames) are
asked for once on top, as many as the largest had: the kernel could drop them, and the stage would wait for the disk at every pass.

The rule, for n values: their 0.95 quantile (the k-th smallest, k = ceil(0.95 n): up to n = 19 that is the largest) times
1.25 (1 + 1/sqrt n). It assumes no distribution. A bound from the mean and deviation of the logarithms asks for less where they are
normal, and fails where they are not: with one node in five 1.7 times as slow it is enough for 94 % only, at any n.
`benchmarks/requests.py` has the figures, of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

from jobs.control.executor_protocol import Batch
from jobs.control.facts import OUTSIDE, Asked, StageFacts
from jobs.control.plan import Plan
from jobs.experiment.config import Resources, at_once_of
from jobs.experiment.graph import Graph

QUANTILE = 0.95
MARGIN = 1.25  # with very many siblings; twice that with one
OTHER_METHOD = 1.5  # beyond it, where no sibling is of the same method
START_SECONDS = 180.0  # until a worker begins its stage: the program is loaded, a shared folder shows what others wrote
SPARE_GB = 0.5  # the interpreter and its libraries; what the kernel counts for a job beside them
STEP_GB = 0.25  # asked for in multiples of it
GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """What one stage of a kind is asked for; None: as configured."""

    minutes: int | None = None
    memory_gb: float | None = None
    siblings: int = 0
    any_method: bool = False  # none of them is of the method in question
    seconds: float = 0.0  # quantile of theirs
    memory_bytes: float = 0.0  # 0: not known, or not predicted

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if not self.siblings:
            return ""
        kind = " of any method" if self.any_method else ""
        memory = f" and {self.memory_bytes / GIB:.1f} GB" if self.memory_bytes else ""
        return (
            f"from {self.siblings} finished sibling{'' if self.siblings == 1 else 's'}{kind}: {QUANTILE:.0%} took at most "
            f"{self.seconds / 60:.1f} min{memory}, and a margin"
        )


CONFIGURED = Prediction()


def asks_in_words(asked: Asked, prediction: Prediction = CONFIGURED) -> str:
    """What Slurm is asked for each task of an array, and why.

    `asks for 13 min and 2.25 GB a task (configured: 90 min, 32 GB): from 37 finished siblings: ...`
    """
    time, memory = f"{asked.minutes} min", f"{asked.memory_mb / 1024:g} GB"
    if not (asked.less_time or asked.less_memory):
        return f"asks for {time} and {memory} a task, as configured"
    most = [
        *([f"{asked.configured_minutes} min"] if asked.less_time else []),
        *([f"{asked.configured_mb / 1024:g} GB"] if asked.less_memory else []),
    ]
    return f"asks for {time} and {memory} a task (configured: {', '.join(most)}){prediction.source and f', {prediction.source}'}"


@dataclass(frozen=True)
class Bounds:
    """What a prediction never goes beyond, and what it needs."""

    most: Mapping[str, Resources]  # by stage name, as configured; a stage without an entry gets what is configured
    siblings: int = 3  # finished ones that it takes
    warning_seconds: float = 0.0  # before the time limit Slurm asks for an end
    partitions: frozenset[str] = frozenset()  # that jobs are sent to; empty: the site's default


class Experience:
    """Predictions by stage and method, made from the facts when first asked for."""

    def __init__(self, graph: Graph, facts: Mapping[str, StageFacts], bounds: Bounds) -> None:
        self._graph, self._facts, self._bounds = graph, facts, bounds
        self._kinds: dict[str, dict[str, list[StageFacts]]] | None = None  # stage -> method -> what is known of those begun
        self._made: dict[tuple[str, str], Prediction] = {}

    def __call__(self, stage: str, method: str) -> Prediction:
        if (stage, method) not in self._made:
            self._made[stage, method] = self._predict(stage, method)
        return self._made[stage, method]

    def _predict(self, stage: str, method: str) -> Prediction:
        most = self._bounds.most.get(stage)
        if most is None:
            return CONFIGURED
        if self._kinds is None:
            self._kinds = {}
            for key, node in self._graph.nodes.items():
                fact = self._facts.get(key)
                if fact is not None and fact.all_seconds > 0:
                    self._kinds.setdefault(node.stage, {}).setdefault(node.method, []).append(fact)
        kinds = self._kinds.get(stage, {})
        every = [fact for facts in kinds.values() for fact in facts]
        for siblings, any_method in ((kinds.get(method, []), False), (every, True)):
            found = comparable(siblings, most, self._bounds.partitions)
            if sum(fact.done for fact in found) >= max(1, self._bounds.siblings):
                return predict(found, most, START_SECONDS + self._bounds.warning_seconds, any_method=any_method)
        return CONFIGURED


def comparable(siblings: Iterable[StageFacts], most: Resources, partitions: Collection[str] = ()) -> list[StageFacts]:
    """Those computed by Slurm, by as many processes as will be, with no more threads, and on the kind of device that is asked for, if any.

    A stage that is given a GPU may leave it alone. Different GPUs and processors of the same partitions are left to the quantile. Of an
    unfinished one all that is not known, and it counts.
    """
    places = {"", *partitions}
    threads = most.cpus_per_process // max(1, min(at_once_of(most), most.runs_per_task))
    there = [
        fact
        for fact in siblings
        if fact.processes in (0, most.team)
        and fact.threads <= max(1, threads)
        and (fact.partition in places if partitions else fact.partition != OUTSIDE)
    ]
    alike = [fact for fact in there if not fact.done or fact.on_gpu == (most.gpus > 0)]
    return alike if any(fact.done for fact in alike) or not most.gpus else there


def predict(siblings: Sequence[StageFacts], most: Resources, spare_seconds: float, *, any_method: bool = False) -> Prediction:
    """From siblings of which at least one is finished; the rest are lower bounds. `spare_seconds` are added to the bound.

    Memory is not predicted where several stages of a task share it.
    """
    done = [fact for fact in siblings if fact.done]
    wider = OTHER_METHOD if any_method else 1.0
    seconds = with_bounds([fact.all_seconds for fact in done], [fact.all_seconds for fact in siblings if not fact.done])
    measured = [fact for fact in done if fact.memory]
    peaks = [float((fact.memory - fact.mapped) * most.processes_per_node) for fact in measured]
    mapped = max((fact.mapped for fact in measured), default=0)
    memory = with_bounds(peaks, [float(fact.memory) for fact in siblings if not fact.done]) if peaks and at_once_of(most) == 1 else []
    minutes = math.ceil((upper_bound(seconds) * wider + spare_seconds) / 60)
    gigabytes = STEP_GB * math.ceil(((upper_bound(memory) * wider + mapped) / GIB + SPARE_GB) / STEP_GB) if memory else most.memory_gb
    return Prediction(
        minutes=minutes if minutes < most.minutes else None,
        memory_gb=gigabytes if gigabytes < most.memory_gb else None,
        siblings=len(done),
        any_method=any_method,
        seconds=quantile(seconds),
        memory_bytes=quantile(memory) + mapped if memory else 0.0,
    )


def upper_bound(values: Sequence[float]) -> float:
    """What the next value of the same kind will stay below, as a rule: the quantile times the margin."""
    return quantile(values) * MARGIN * (1 + 1 / math.sqrt(len(values)))


def quantile(values: Sequence[float], share: float = QUANTILE) -> float:
    """The smallest of the values that so large a share of them does not exceed."""
    return sorted(values)[math.ceil(round(share * len(values), 9)) - 1]


def with_bounds(values: Sequence[float], bounds: Iterable[float]) -> list[float]:
    """Finished values, and of the others those that have already gone beyond all of them; what a shorter one will come to is not known."""
    longest = max(values, default=math.inf)
    return [*values, *(bound for bound in bounds if bound > longest)]


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
    facts: Mapping[str, StageFacts],
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


def sibling_seconds(graph: Graph, facts: Mapping[str, StageFacts]) -> dict[tuple[str, str], float]:
    """(stage, method) -> median seconds of those that are done; (stage, "") over all methods."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, node in graph.nodes.items():
        fact = facts.get(key)
        if fact is not None and fact.done and fact.seconds > 0:
            found.setdefault((node.stage, node.method), []).append(fact.seconds)
            found.setdefault((node.stage, ""), []).append(fact.seconds)
    return {which: median(seconds) for which, seconds in found.items()}
