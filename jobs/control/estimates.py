"""Time and memory to request from Slurm for a stage, predicted from finished siblings: a quantile of theirs plus a margin. Pure.

Siblings are stages of the same name in one experiment's graph: same recipe, another fold or seed. Those of the same method are preferred,
else those of any method are used. The time of a sibling is that of all its attempts since its last start without a checkpoint, so that one
that was interrupted and resumed counts in full. The time of an unfinished sibling so far is a lower bound.

The private memory of a process gets quantile and margin, times the processes of a node. File pages (features, frames) are added once, as
many as the largest sibling mapped: without them the kernel would drop them, and the stage would read the disk in every pass.

The rule, for n values: their 0.95 quantile (the k-th smallest, k = ceil(0.95 n): up to n = 19 that is the largest) times
1.25 (1 + 1/sqrt n). It assumes no distribution. A bound from mean and standard deviation of the logarithms requests less where these are
normal, and fails where they are not: if one node in five is 1.7 times slower, it suffices in only 94 % of cases, at any n.
`benchmarks/requests.py` measures both.
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
from jobs.text import counted

QUANTILE = 0.95
MARGIN = 1.25  # with very many siblings; twice that with one
OTHER_METHOD = 1.5  # a further factor if no sibling is of the same method
START_SECONDS = 180.0  # until a worker starts its stage: loading the program, waiting for files on the shared folder
SPARE_GB = 0.5  # the interpreter, its libraries, and kernel memory charged to the job
STEP_GB = 0.25  # requests are multiples of it
GIB = 2**30


@dataclass(frozen=True)
class Prediction:
    """What is requested for one stage of a kind; None: as configured."""

    minutes: int | None = None
    memory_gb: float | None = None
    siblings: int = 0
    any_method: bool = False  # none of them is of the same method
    seconds: float = 0.0  # quantile of the siblings
    memory_bytes: float = 0.0  # likewise; 0: unknown, or not predicted

    @property
    def source(self) -> str:
        """What the prediction is based on, for messages."""
        if not self.siblings:
            return ""
        kind = " of any method" if self.any_method else ""
        memory = f" and {self.memory_bytes / GIB:.1f} GB" if self.memory_bytes else ""
        return (
            f"from {counted(self.siblings, 'finished sibling')}{kind}: {QUANTILE:.0%} took at most "
            f"{self.seconds / 60:.1f} min{memory}, and a margin"
        )


CONFIGURED = Prediction()


def asks_in_words(asked: Asked, prediction: Prediction = CONFIGURED) -> str:
    """The request for each task of an array, and what it is based on:

    `requests 13 min and 2.25 GB a task (configured: 90 min, 32 GB): from 37 finished siblings: ...`
    """
    time, memory = f"{asked.minutes} min", f"{asked.memory_mb / 1024:g} GB"
    if not (asked.less_time or asked.less_memory):
        return f"requests {time} and {memory} a task, as configured"
    most = [
        *([f"{asked.configured_minutes} min"] if asked.less_time else []),
        *([f"{asked.configured_mb / 1024:g} GB"] if asked.less_memory else []),
    ]
    return f"requests {time} and {memory} a task (configured: {', '.join(most)}){prediction.source and f', {prediction.source}'}"


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of predictions, and what they require."""

    most: Mapping[str, Resources]  # by stage name, as configured; a stage without an entry is not predicted
    siblings: int = 3  # finished ones required
    warning_seconds: float = 0.0  # between Slurm's signal and the time limit
    partitions: frozenset[str] = frozenset()  # that jobs are submitted to; empty: the site's default


class Experience:
    """Predictions by stage and method, computed at first use."""

    def __init__(self, graph: Graph, facts: Mapping[str, StageFacts], bounds: Bounds) -> None:
        self._graph, self._facts, self._bounds = graph, facts, bounds
        self._kinds: dict[str, dict[str, list[StageFacts]]] | None = None  # stage -> method -> facts of started stages
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
    """Siblings computed by Slurm with the same number of processes, no more threads, and on the same kind of device if there are any.

    A stage that requests a GPU may not use it. Different GPUs and CPUs within the same partitions are covered by the quantile. Unknown
    fields of an unfinished sibling stay empty; it counts as a lower bound.
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
    """A prediction from siblings of which at least one is finished; the others are lower bounds. `spare_seconds` are added to the time.

    Memory is not predicted if several stages of a task share it.
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
    """A bound that the next value of the same kind rarely exceeds: the quantile times the margin."""
    return quantile(values) * MARGIN * (1 + 1 / math.sqrt(len(values)))


def quantile(values: Sequence[float], share: float = QUANTILE) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[math.ceil(round(share * len(values), 9)) - 1]


def with_bounds(values: Sequence[float], bounds: Iterable[float]) -> list[float]:
    """Finished values, and those lower bounds that exceed all of them: of the others the final value is unknown."""
    longest = max(values, default=math.inf)
    return [*values, *(bound for bound in bounds if bound > longest)]


class Source(Enum):
    """What an estimate is based on."""

    siblings = "finished siblings"  # median seconds of finished stages of the same name in this experiment
    progress = "progress of running stages"  # the time to go that their logs state
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
    asks: str = ""  # time and memory requested for a task, and why; "": nothing is requested


@dataclass(frozen=True)
class Forecast:
    """What a launch will reuse, submit and cost."""

    plan: Plan
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
    """The forecast of a plan. `resources`: of a stage, by name; `asks`: the text of a batch's request to Slurm.

    Deferred stages will run too, but not in this pass: they are counted, and their cost is not estimated.
    """
    siblings = sibling_seconds(graph, facts)
    costs = []
    for batch in plan.batches:
        given, count = resources(batch.stage), len(batch.keys)
        measured = siblings.get((batch.stage, batch.method), siblings.get((batch.stage, "")))
        source = Source.requested if measured is None else Source.siblings
        seconds = given.minutes * 60.0 if measured is None else measured
        at_once = max(1, at_once_of(given))  # stages that share the resources of a task; 0, as memory allows, may be one
        rounds = sum(math.ceil(len(task.keys) / at_once) for task in batch.tasks)
        hours = seconds * rounds * given.nodes / 3600
        gpu_hours, cpu_hours = hours * given.gpus, hours * given.cpus
        costs.append(Cost(batch.stage, batch.method, len(batch.tasks), count, seconds, source, gpu_hours, cpu_hours, asks(batch)))
    return Forecast(plan, tuple(costs))


def forecast_lines(expected: Forecast) -> list[str]:
    """The cost and the request of each batch, then the totals."""
    lines, plan = [], expected.plan
    for cost in expected.costs:
        lines.append(
            f"submit {cost.stage} {cost.method}: {counted(cost.tasks, 'task')}, {counted(cost.stages, 'stage')}, "
            f"{cost.gpu_hours:.1f} GPU-hours, {cost.cpu_hours:.1f} CPU-hours ({cost.source.value})"
        )
        lines.extend([f"  {cost.asks}"] if cost.asks else [])
    whole = (
        f"in flight {len(plan.waiting)}, deferred {len(plan.deferred)}, blocked {len(plan.blocked)}, given up {len(plan.given_up)}; "
        f"in total {counted(expected.tasks, 'task')}, "
        f"at most about {expected.gpu_hours:.1f} GPU-hours and {expected.cpu_hours:.1f} CPU-hours"
    )
    return [*lines, whole]


def shape_in_words(given: Resources, stages: int) -> str:
    """How the `stages` of one task are computed, unless by one process, one after another."""
    at_once = at_once_of(given)
    if given.team > 1:
        nodes = f" on {counted(given.nodes, 'node')}, memory is that of each" if given.nodes > 1 else ""
        return f"; {counted(given.team, 'process', 'processes')}{nodes}"
    if at_once == 1 or stages == 1:
        return ""
    return (
        f"; {min(at_once, stages)} of {counted(stages, 'stage')} at once"
        if at_once
        else f"; of {counted(stages, 'stage')} as many at once as memory allows"
    )


def sibling_seconds(graph: Graph, facts: Mapping[str, StageFacts]) -> dict[tuple[str, str], float]:
    """(stage, method) -> median seconds of those that are done; (stage, "") over all methods."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, node in graph.nodes.items():
        fact = facts.get(key)
        if fact is not None and fact.done and fact.seconds > 0:
            found.setdefault((node.stage, node.method), []).append(fact.seconds)
            found.setdefault((node.stage, ""), []).append(fact.seconds)
    return {which: median(seconds) for which, seconds in found.items()}
