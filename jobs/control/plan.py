"""What to do next: desired graph, facts from files and the queue in, actions out. Pure, and the same for every executor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from jobs.control.executor_protocol import Batch, Limits, Task
from jobs.control.facts import InFlight, NodeFacts, Phase, Request
from jobs.experiment.graph import Graph, Node, with_upstream

ALIKE = 3  # stages of a kind that all fail in the same words before the rest of them is held
ALIKE_CLASSES = ("code", "refused")  # names of jobs.store.failures.FailureClass
NODE_FAILURES = 2  # after which a machine is excluded
_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8,}|[0-9]+")  # what differs between errors that are alike: counts, addresses, keys


@dataclass(frozen=True)
class Plan:
    """The outcome of planning; every needed key is in exactly one of the first seven."""

    reused: tuple[str, ...]
    waiting: tuple[str, ...]  # in flight
    batches: tuple[Batch, ...]  # in an order where upstream batches come first
    deferred: tuple[str, ...]  # no room in the queue now, or upstream of it somebody else's job cannot be depended on
    blocked: tuple[str, ...]  # something upstream is given up, held or cancelled
    given_up: tuple[str, ...]  # the policy of its failure says so
    stayed: tuple[str, ...] = ()  # held, because the first of their kind all failed alike; or cancelled
    withdrawn: tuple[str, ...] = ()  # queued by the executor, and not to be computed: to be cancelled
    reasons: Mapping[str, str] = field(default_factory=dict)  # why a stage is given up or stayed

    @property
    def settled(self) -> bool:
        """Nothing to do and nothing to wait for."""
        return not (self.waiting or self.batches or self.deferred)

    @property
    def complete(self) -> bool:
        """Everything needed is there."""
        return self.settled and not (self.blocked or self.given_up or self.stayed)


class Predicted(Protocol):
    """What one stage of a kind is asked for; None: as configured."""

    @property
    def minutes(self) -> int | None: ...

    @property
    def memory_gb(self) -> float | None: ...


Predict = Callable[[str, str], Predicted]  # of a stage and a method


def needed_keys(graph: Graph, facts: Mapping[str, NodeFacts]) -> tuple[str, ...]:
    """Keys of the runs and of everything still to be computed for them, upstream first.

    What lies upstream of a finished stage is not needed: it is not computed again even if it is gone.
    """
    return with_upstream(graph, (run.key for run in graph.runs), lambda key: not _fact(facts, key).done)


def make_plan(
    graph: Graph,
    facts: Mapping[str, NodeFacts],
    in_flight: Mapping[str, InFlight],
    *,
    runs_per_task: Callable[[str], int] | Mapping[str, int],
    limits: Limits,
    max_failures: int = 0,
    since: float = 0.0,
    predict: Predict | None = None,
) -> Plan:
    """Decide where every needed stage stands and which ones to submit.

    `runs_per_task` gives, by stage name, how many stages one task computes (1 where a mapping says nothing). A stage is
    submitted only if each of its upstream stages is done, in flight, or submitted in this same plan. `max_failures` is the budget of the
    whole experiment (0: none); `since`, the last launch, tells its results from older ones. `predict` says what a stage of a kind may be
    asked for (None: everything as configured).
    """
    depth = _depths(graph)
    height = _heights(graph)
    reused: list[str] = []
    waiting: list[str] = []
    blocked: list[str] = []
    given_up: list[str] = []
    stayed: list[str] = []
    deferred: list[str] = []
    batches: list[Batch] = []
    reasons: dict[str, str] = {}
    hopeless: set[str] = set()  # given up, stayed or blocked
    later: set[str] = set()  # dependants cannot be submitted now
    candidates: dict[int, list[Node]] = {}
    needed = needed_keys(graph, facts)
    filling = {run.key for run in graph.runs}
    alike = _alike(graph, facts, needed, since)
    excluded = _excluded(facts)
    spent = max_failures > 0 and sum(fact.failures for fact in facts.values()) >= max_failures
    for key in needed:
        node, fact = graph.nodes[key], _fact(facts, key)
        running = key in in_flight and in_flight[key].phase is Phase.running
        reason = _reason_not_to_try(fact, spent, alike.get((node.stage, node.method), ""), key in filling)
        if fact.done and not reason:
            reused.append(key)
        elif running or fact.held:
            waiting.append(key)
            if key not in in_flight:
                later.add(key)
        elif reason:
            (stayed if fact.cancelled or not (fact.stopped or fact.diverged or fact.failures) else given_up).append(key)
            reasons[key] = reason
            hopeless.add(key)
        elif any(parent in hopeless for parent in node.upstream.values()):
            blocked.append(key)
            hopeless.add(key)
        elif key in in_flight:
            waiting.append(key)
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
        for (stage, method, request), nodes in _groups(ready, height, facts, excluded, predict):
            tasks = _pack(nodes, _packing(runs_per_task, stage))
            taken = tasks if room is None else tasks[:room]
            room = None if room is None else room - len(taken)
            dropped = [key for task in tasks[len(taken) :] for key in task.keys]
            deferred.extend(dropped)
            later.update(dropped)
            gone = tuple(sorted({job for node in nodes for job in _fact(facts, node.key).gone}))
            batches.extend(Batch(stage, method, part, request, gone) for part in _cut(taken, limits.array_size))
    return Plan(
        reused=tuple(reused),
        waiting=tuple(waiting),
        batches=tuple(batches),
        deferred=tuple(deferred),
        blocked=tuple(blocked),
        given_up=tuple(given_up),
        stayed=tuple(stayed),
        withdrawn=_withdrawn(graph, in_flight, waiting),
        reasons=reasons,
    )


def _withdrawn(graph: Graph, in_flight: Mapping[str, InFlight], waiting: Collection[str]) -> tuple[str, ...]:
    """What is queued and nothing waits for: done, hopeless, superseded, or of an earlier configuration and unknown to the graph.

    A stage that is done stays queued as long as another element may depend on it: Slurm would end that one too.
    """
    waits = frozenset(waiting)
    depended = {parent for key in waits & in_flight.keys() for parent in graph.nodes[key].upstream.values()}
    queued = (key for key, flight in in_flight.items() if flight.phase is Phase.queued)
    return tuple(key for key in queued if key not in waits and key not in depended)


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


def _reason_not_to_try(fact: NodeFacts, spent: bool, alike: str, fills_slot: bool) -> str:
    """Why a stage is not attempted, or why what it has does not count; "": it may be, or it does."""
    if fact.done:
        return f"{fact.diverged}, and no reserve seed is left" if fact.diverged and fills_slot else ""
    if fact.cancelled:
        return "cancelled; launching again lifts that"
    if fact.stopped:
        return fact.stopped
    if fact.diverged:
        return f"{fact.diverged}{', and no reserve seed is left' if fills_slot else ''}"
    if spent and fact.failures:
        return "the experiment's budget of failed attempts is spent (policy.max_failures)"
    return alike if not fact.attempts else ""


def _alike(graph: Graph, facts: Mapping[str, NodeFacts], needed: Iterable[str], since: float) -> dict[tuple[str, str], str]:
    """(stage, method) -> why the rest of them is held: the first ones all failed, in the same words."""
    failed: dict[tuple[str, str], list[str]] = {}
    succeeded: set[tuple[str, str]] = set()
    for key in needed:
        node, fact = graph.nodes[key], _fact(facts, key)
        if fact.done and fact.finished >= since:
            succeeded.add((node.stage, node.method))
        elif fact.stopped and fact.failure in ALIKE_CLASSES:
            failed.setdefault((node.stage, node.method), []).append(fact.error)
    found: dict[tuple[str, str], str] = {}
    for kind, errors in failed.items():
        if kind not in succeeded and len(errors) >= ALIKE and len({_NUMBER.sub("#", error) for error in errors}) == 1:
            found[kind] = f"held: the first {len(errors)} of {kind[0]} {kind[1]} all failed alike ({errors[0]}); mend that and launch again"
    return found


def _excluded(facts: Mapping[str, NodeFacts]) -> tuple[str, ...]:
    """Machines that failed twice under this experiment."""
    blamed = Counter(node for fact in facts.values() for node in fact.bad_nodes)
    return tuple(sorted(node for node, times in blamed.items() if times >= NODE_FAILURES))


def _groups(
    nodes: Iterable[Node],
    height: Mapping[str, int],
    facts: Mapping[str, NodeFacts],
    excluded: tuple[str, ...],
    predict: Predict | None,
) -> list[tuple[tuple[str, str, Request], list[Node]]]:
    """Nodes of one depth by stage, method and request; those with the longest chain still to come first."""
    found: dict[tuple[str, str, Request], list[Node]] = {}
    requests: dict[tuple[str, str, Request, bool, bool], Request] = {}
    for node in nodes:
        fact = _fact(facts, node.key)
        kind = (node.stage, node.method, fact.request, fact.short_of_time, fact.short_of_memory)
        if kind not in requests:
            requests[kind] = _request(node, fact, excluded, predict)
        request = requests[kind]
        found.setdefault((node.stage, node.method, request), []).append(node)
    return sorted(found.items(), key=lambda item: -max(height[node.key] for node in item[1]))


def _request(node: Node, fact: NodeFacts, excluded: tuple[str, ...], predict: Predict | None) -> Request:
    """What the next attempt of a stage asks for."""
    found = replace(fact.request, exclude=tuple(sorted({*fact.request.exclude, *excluded}))) if excluded else fact.request
    if predict is None or found.relief:  # less work a pass takes longer
        return found
    told = predict(node.stage, node.method)
    return replace(
        found,
        minutes=None if fact.short_of_time else told.minutes,
        memory_gb=None if fact.short_of_memory else told.memory_gb,
    )


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
