"""What an experiment has used, what is left of it, and when it will probably end: from finished and running stages. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from jobs.control.estimates import Source, sibling_seconds
from jobs.control.facts import StageFacts, needed_keys
from jobs.control.plan import Plan
from jobs.experiment.config import Resources, at_once_of
from jobs.experiment.graph import Graph
from jobs.text import counted

NOTHING_RUNS = "nothing is running"


@dataclass(frozen=True)
class Pace:
    """How long a stage has been running, and how long it will, as far as its log states that."""

    elapsed: float  # seconds since its attempt began
    to_go: float | None = None  # seconds; None: not stated


@dataclass(frozen=True)
class Hours:
    """Device-hours: of GPUs where a stage has any, else of cores."""

    gpu: float = 0.0
    cpu: float = 0.0

    def __str__(self) -> str:
        known = [f"{hours:.1f} {name}-hours" for name, hours in (("GPU", self.gpu), ("CPU", self.cpu)) if hours > 0]
        return " and ".join(known) or "nothing"


@dataclass(frozen=True)
class Devices:
    """What one stage occupies while it is computed; a share of them if it shares them with others."""

    gpus: float
    cpus: float

    def hours(self, seconds: float) -> Hours:
        """Device-hours of so many seconds."""
        return Hours(gpu=self.gpus * seconds / 3600) if self.gpus else Hours(cpu=self.cpus * seconds / 3600)


@dataclass(frozen=True)
class Remaining:
    """Cost of an experiment so far and from now on."""

    stages: int  # still to be computed, those that are running included
    used: Hours  # of all attempts since a stage's last start without a checkpoint, by whichever experiment they were computed
    left: Hours
    seconds: float | None  # until the last stage has ended; None: not known
    basis: str  # of `left` and `seconds`, or why `seconds` is not known
    at_most: bool = False  # some stages count with the time requested for them


def devices_of(given: Resources, *, packed: bool, gpus_used: bool = True) -> Devices:
    """The devices of one stage. `packed`: stages of a task share them; `gpus_used`: False where GPUs are configured and none is there."""
    share = max(1, min(at_once_of(given), given.runs_per_task)) if packed else 1
    return Devices(given.nodes * given.gpus / share if gpus_used else 0.0, given.nodes * given.cpus / share)


def remaining(
    graph: Graph,
    facts: Mapping[str, StageFacts],
    plan: Plan,
    running: Mapping[str, Pace],
    requested: Callable[[str], float],
    devices: Callable[[str], Devices],
) -> Remaining:
    """What was used, what is left, and the time to the end.

    `running`: key -> pace of each stage that is computed now; `requested`: seconds, and `devices`, of a stage by its name. A stage takes
    the median of its finished siblings, else of what running siblings will take in total, else the requested time. The end is the later of
    two: the longest chain of stages, and all remaining seconds divided by the number of stages that are running now.
    """
    used = [devices(node.stage).hours(facts[key].all_seconds) for key, node in graph.nodes.items() if key in facts]
    siblings, projected = sibling_seconds(graph, facts), _projected(graph, running)
    hopeless = {*plan.given_up, *plan.blocked, *plan.held_or_cancelled}
    wanted = [key for key in needed_keys(graph, facts) if key not in hopeless and not (key in facts and facts[key].done)]
    seconds: dict[str, float] = {}
    sources: set[Source] = set()
    for key in wanted:
        node, own = graph.nodes[key], running.get(key)
        if own is not None and own.to_go is not None:
            seconds[key], source = own.to_go, Source.progress
        else:
            whole, source = _seconds_of(node.stage, node.method, siblings, projected, requested)
            seconds[key] = max(0.0, whole - (own.elapsed if own else 0.0))
        sources.add(source)
    left = [devices(graph.nodes[key].stage).hours(seconds[key]) for key in wanted]
    times = f"times by {' and '.join(source.value for source in Source if source in sources)}"
    at_once = sum(key in running for key in wanted)
    end, pace = None, NOTHING_RUNS
    if at_once:
        end = max(_longest_chain(graph, seconds), sum(seconds.values()) / at_once)
        pace = f"{counted(at_once, 'stage')} at once, as now"
    if not wanted:
        return Remaining(0, _total(used), Hours(), 0.0, "")
    return Remaining(len(wanted), _total(used), _total(left), end, f"{pace}; {times}", at_most=Source.requested in sources)


def _seconds_of(
    stage: str,
    method: str,
    siblings: Mapping[tuple[str, str], float],
    projected: Mapping[tuple[str, str], float],
    requested: Callable[[str], float],
) -> tuple[float, Source]:
    for known, source in ((siblings, Source.siblings), (projected, Source.progress)):
        for which in ((stage, method), (stage, "")):
            if which in known:
                return known[which], source
    return requested(stage), Source.requested


def _projected(graph: Graph, running: Mapping[str, Pace]) -> dict[tuple[str, str], float]:
    """(stage, method) -> median of the seconds that running stages will take in total; (stage, "") over all methods."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, pace in running.items():
        if pace.to_go is not None and key in graph.nodes:
            node = graph.nodes[key]
            for which in ((node.stage, node.method), (node.stage, "")):
                found.setdefault(which, []).append(pace.elapsed + pace.to_go)
    return {which: median(seconds) for which, seconds in found.items()}


def _longest_chain(graph: Graph, seconds: Mapping[str, float]) -> float:
    """Seconds of the longest chain among the stages that have an entry."""
    found: dict[str, float] = {}
    for key in reversed(tuple(graph.nodes)):
        found[key] = seconds.get(key, 0.0) + max((found[child] for child in graph.children[key]), default=0.0)
    return max(found.values(), default=0.0)


def _total(parts: list[Hours]) -> Hours:
    return Hours(sum(part.gpu for part in parts), sum(part.cpu for part in parts))
