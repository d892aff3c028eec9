"""What to do next: desired graph, facts from files and the queue in, actions out. Pure, and the same for every executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from jobs.graph import Graph, Node


class Phase(Enum):
    """Where a stage stands in somebody's queue."""

    queued = "queued"
    running = "running"


@dataclass(frozen=True)
class InFlight:
    """A stage that an executor holds now."""

    phase: Phase
    job: str  # what others may depend on: Slurm `JOB` or `ARRAY_INDEX`; for the local executor its own name


@dataclass(frozen=True)
class NodeFacts:
    """What the files say of one stage."""

    done: bool = False
    failures: int = 0  # attempts that ended in a failure (interruptions do not count)
    refused: bool = False  # the last attempt ended in an error that only the user can mend
    error: str = ""  # first line of the last failure
    held: str = ""  # who executes it now, known from a live claim; its holder may be another launcher
    attempts: int = 0  # executions ever begun
    seconds: float = 0.0  # of the attempt that ended in the result


@dataclass(frozen=True)
class Limits:
    """What a site allows; 0: no limit."""

    array_size: int = 0  # tasks in one array (Slurm's MaxArraySize is a limit on the index: size 1001 allows indices 0 to 1000)
    queue_room: int = 0  # tasks that may be submitted in this pass; negative: the queue is full, none


@dataclass(frozen=True)
class Task:
    """Stages computed one after another by one process: an array element."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Tasks of one stage and method that are submitted together: one job array."""

    stage: str
    method: str
    tasks: tuple[Task, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all tasks."""
        return tuple(key for task in self.tasks for key in task.keys)


@dataclass(frozen=True)
class Plan:
    """The outcome of planning; every needed key is in exactly one place."""

    reused: tuple[str, ...]
    waiting: tuple[str, ...]  # in flight
    batches: tuple[Batch, ...]  # in an order where upstream batches come first
    deferred: tuple[str, ...]  # no room in the queue now, or upstream of it somebody else's job cannot be depended on
    blocked: tuple[str, ...]  # something upstream is given up
    given_up: tuple[str, ...]  # attempts spent, or refused

    @property
    def settled(self) -> bool:
        """Nothing to do and nothing to wait for."""
        return not (self.waiting or self.batches or self.deferred)

    @property
    def complete(self) -> bool:
        """Everything needed is there."""
        return self.settled and not (self.blocked or self.given_up)


class Executor(Protocol):
    """Runs tasks somewhere."""

    def limits(self) -> Limits:
        """What may be submitted now."""

    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> where it stands, for every stage this executor holds."""

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Take a batch; a task starts only after the jobs that hold its upstream stages have ended well.

        Returns the keys it took: those of a batch that was not taken, or only in part, are planned again in the next pass.
        """


def needed_keys(graph: Graph, facts: Mapping[str, NodeFacts]) -> tuple[str, ...]:
    """Keys of the runs and of everything still to be computed for them, upstream first.

    What lies upstream of a finished stage is not needed: it is not computed again even if it is gone.
    """
    found: set[str] = set()
    stack = [run.key for run in graph.runs]
    while stack:
        key = stack.pop()
        if key in found:
            continue
        found.add(key)
        if not _fact(facts, key).done:
            stack.extend(graph.nodes[key].upstream.values())
    return tuple(key for key in graph.nodes if key in found)


def make_plan(
    graph: Graph,
    facts: Mapping[str, NodeFacts],
    in_flight: Mapping[str, InFlight],
    *,
    runs_per_task: Callable[[str], int] | Mapping[str, int],
    limits: Limits,
    max_attempts: int,
) -> Plan:
    """Decide where every needed stage stands and which ones to submit.

    `runs_per_task` gives, by stage name, how many stages one task computes one after another (1 where a mapping says nothing). A stage is
    submitted only if each of its upstream stages is done, in flight, or submitted in this same plan.
    """
    depth = _depths(graph)
    height = _heights(graph)
    reused: list[str] = []
    waiting: list[str] = []
    blocked: list[str] = []
    given_up: list[str] = []
    deferred: list[str] = []
    batches: list[Batch] = []
    hopeless: set[str] = set()  # given up or blocked
    later: set[str] = set()  # dependants cannot be submitted now
    candidates: dict[int, list[Node]] = {}
    needed = needed_keys(graph, facts)
    for key in needed:
        node, fact = graph.nodes[key], _fact(facts, key)
        if fact.done:
            reused.append(key)
        elif key in in_flight:
            waiting.append(key)
        elif fact.held:
            waiting.append(key)
            later.add(key)
        elif fact.refused or fact.failures >= max_attempts:
            given_up.append(key)
            hopeless.add(key)
        elif any(parent in hopeless for parent in node.upstream.values()):
            blocked.append(key)
            hopeless.add(key)
        else:
            candidates.setdefault(depth[key], []).append(node)
    room = None if limits.queue_room == 0 else max(0, limits.queue_room)
    for level in sorted(candidates):
        ready: list[Node] = []
        for node in candidates[level]:
            if any(parent in later for parent in node.upstream.values()):
                deferred.append(node.key)
                later.add(node.key)
            else:
                ready.append(node)
        for (stage, method), nodes in _groups(ready, height):
            tasks = _pack(nodes, _packing(runs_per_task, stage))
            taken = tasks if room is None else tasks[:room]
            room = None if room is None else room - len(taken)
            dropped = [key for task in tasks[len(taken) :] for key in task.keys]
            deferred.extend(dropped)
            later.update(dropped)
            batches.extend(Batch(stage, method, part) for part in _cut(taken, limits.array_size))
    return Plan(tuple(reused), tuple(waiting), tuple(batches), tuple(deferred), tuple(blocked), tuple(given_up))


def critical_minutes(graph: Graph, minutes: Callable[[str], float]) -> dict[str, float]:
    """Key -> minutes of the longest chain of stages that begins with it; `minutes` gives those of one stage by name."""
    found: dict[str, float] = {}
    for key in reversed(tuple(graph.nodes)):
        after = max((found[child] for child in graph.children[key]), default=0.0)
        found[key] = minutes(graph.nodes[key].stage) + after
    return found


def _fact(facts: Mapping[str, NodeFacts], key: str) -> NodeFacts:
    return facts.get(key) or NodeFacts()


def _depths(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, node in graph.nodes.items():
        found[key] = 1 + max((found[parent] for parent in node.upstream.values()), default=-1)
    return found


def _heights(graph: Graph) -> dict[str, int]:
    return {key: int(value) for key, value in critical_minutes(graph, lambda stage: 1.0).items()}


def _groups(nodes: Iterable[Node], height: Mapping[str, int]) -> list[tuple[tuple[str, str], list[Node]]]:
    """Nodes of one depth by stage and method; those with the longest chain still to come first."""
    found: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        found.setdefault((node.stage, node.method), []).append(node)
    return sorted(found.items(), key=lambda item: -max(height[node.key] for node in item[1]))


def _pack(nodes: Sequence[Node], size: int) -> tuple[Task, ...]:
    """Tasks of at most `size` stages that have fold and upstream in common, in the order in which they were first asked for."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for node in nodes:
        alike.setdefault((node.fold, tuple(sorted(node.upstream.values()))), []).append(node.key)
    return tuple(Task(tuple(keys[start : start + size])) for keys in alike.values() for start in range(0, len(keys), size))


def _packing(runs_per_task: Callable[[str], int] | Mapping[str, int], stage: str) -> int:
    return max(1, runs_per_task.get(stage, 1) if isinstance(runs_per_task, Mapping) else runs_per_task(stage))


def _cut(tasks: tuple[Task, ...], size: int) -> tuple[tuple[Task, ...], ...]:
    size = size or len(tasks) or 1
    return tuple(tasks[start : start + size] for start in range(0, len(tasks), size))
