"""What to do next: from the graph, the facts of its stages and the queue to the actions. Pure, and the same for every executor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from jobs.control.exclusions import excluded_nodes
from jobs.control.executor_protocol import Batch, Limits, Task
from jobs.control.facts import InFlight, Phase, Request, Shortage, StageFacts, needed_keys
from jobs.control.holds import held_stages
from jobs.experiment.graph import Graph, Node

NO_SEED_LEFT = "no reserve seed is left"
_BLANK = StageFacts()


@dataclass(frozen=True)
class Plan:
    """The outcome of planning; every needed key is in exactly one of the first seven."""

    reused: tuple[str, ...]
    waiting: tuple[str, ...]  # in flight, or computed by another launcher
    batches: tuple[Batch, ...]  # in an order where upstream batches come first
    deferred: tuple[str, ...]  # the queue is full, a pause is not over, or a job of another launcher, on which none can depend, is upstream
    blocked: tuple[str, ...]  # something upstream is given up, held or cancelled
    given_up: tuple[str, ...]  # by the failure policy
    held_or_cancelled: tuple[str, ...] = ()  # held: see jobs.control.holds
    withdrawn: tuple[str, ...] = ()  # queued and no longer needed: to be cancelled
    reasons: Mapping[str, str] = field(default_factory=dict)  # why a stage is given up, held or cancelled

    @property
    def settled(self) -> bool:
        """Nothing is left to submit or to wait for."""
        return not (self.waiting or self.batches or self.deferred)

    @property
    def complete(self) -> bool:
        """Every needed stage has its result."""
        return self.settled and not (self.blocked or self.given_up or self.held_or_cancelled)


class Predicted(Protocol):
    """What is requested for one stage of a kind; None: as configured."""

    @property
    def minutes(self) -> int | None: ...

    @property
    def memory_gb(self) -> float | None: ...


Predict = Callable[[str, str], Predicted]  # of a stage and a method


def make_plan(
    graph: Graph,
    facts: Mapping[str, StageFacts],
    in_flight: Mapping[str, InFlight],
    *,
    runs_per_task: Mapping[str, int],
    limits: Limits,
    max_failures: int = 0,
    hold_diverging: bool = True,
    since: float = 0.0,
    now: float = math.inf,
    predict: Predict | None = None,
    keep_old: bool = False,
    site_nodes: int = 0,
) -> Plan:
    """Decide for every needed stage whether it is done, in flight, to be submitted, deferred, blocked, given up or held.

    `runs_per_task` gives, by stage name, how many stages one task computes (1 without an entry). A stage is
    submitted only if each of its upstream stages is done, in flight, or submitted in this same plan. `max_failures` is the budget of failed
    attempts of the whole experiment (0: none), `since` the time of the last launch, `now` that of this pass (seconds since the epoch).
    `hold_diverging`: a method whose first runs diverge is held (jobs.control.holds). `predict` gives what is requested for a stage of a
    kind (None: everything as configured). With `keep_old` queued stages that are not in the graph are not withdrawn.
    `site_nodes`: how many Slurm nodes there are for the stages; 0: not known (jobs.control.exclusions).
    """
    depth = _depths(graph)
    height = critical_minutes(graph, lambda stage: 1.0)  # in stages
    reused: list[str] = []
    waiting: list[str] = []
    blocked: list[str] = []
    given_up: list[str] = []
    held_or_cancelled: list[str] = []
    deferred: list[str] = []
    batches: list[Batch] = []
    reasons: dict[str, str] = {}
    hopeless: set[str] = set()  # given up, held, cancelled or blocked
    later: set[str] = set()  # stages downstream of these cannot be submitted now
    candidates: dict[int, list[Node]] = {}
    needed = needed_keys(graph, facts)
    filling = {run.key for run in graph.runs}
    held = held_stages(graph, facts, needed, since, diverging=hold_diverging)
    excluded = excluded_nodes(facts, site_nodes)
    spent = max_failures > 0 and sum(fact.failures for fact in facts.values()) >= max_failures
    for key in needed:
        node, fact = graph.nodes[key], facts.get(key, _BLANK)
        running = key in in_flight and in_flight[key].phase is Phase.running
        reason = _reason_not_to_try(fact, spent, held.get(key, ""), key in filling)
        if fact.done and not reason:
            reused.append(key)
        elif running or fact.awaited:
            waiting.append(key)
            if key not in in_flight:
                later.add(key)
        elif reason:
            (held_or_cancelled if fact.cancelled or not (fact.stopped or fact.diverged or fact.failures) else given_up).append(key)
            reasons[key] = reason
            hopeless.add(key)
        elif any(parent in hopeless for parent in node.upstream.values()):
            blocked.append(key)
            hopeless.add(key)
        elif key in in_flight:
            waiting.append(key)
        elif fact.not_before > now:
            deferred.append(key)
            later.add(key)
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
            tasks = _pack(nodes, max(1, runs_per_task.get(stage, 1)))
            taken = tasks if room is None else tasks[:room]
            room = None if room is None else room - len(taken)
            rest = [key for task in tasks[len(taken) :] for key in task.keys]
            deferred.extend(rest)
            later.update(rest)
            gone = tuple(sorted({job for node in nodes for job in facts.get(node.key, _BLANK).lost_jobs}))
            batches.extend(Batch(stage, method, part, request, gone) for part in _cut(taken, limits.array_size))
    return Plan(
        reused=tuple(reused),
        waiting=tuple(waiting),
        batches=tuple(batches),
        deferred=tuple(deferred),
        blocked=tuple(blocked),
        given_up=tuple(given_up),
        held_or_cancelled=tuple(held_or_cancelled),
        withdrawn=tuple(key for key in _withdrawn(graph, in_flight, waiting) if key in graph.nodes or not keep_old),
        reasons=reasons,
    )


def _withdrawn(graph: Graph, in_flight: Mapping[str, InFlight], waiting: Collection[str]) -> tuple[str, ...]:
    """Queued stages that are not waited for: done, given up, superseded, or of an earlier configuration and not in the graph.

    A stage that is done stays queued while another element may depend on it: Slurm would cancel that one too.
    """
    waits = frozenset(waiting)
    depended = {parent for key in waits & in_flight.keys() for parent in graph.nodes[key].upstream.values()}
    queued = (key for key, flight in in_flight.items() if flight.phase is Phase.queued)
    return tuple(key for key in queued if key not in waits and key not in depended)


def critical_minutes(graph: Graph, minutes: Callable[[str], float]) -> dict[str, float]:
    """Key -> minutes of the longest chain of stages that starts with it; `minutes` gives those of one stage by name."""
    found: dict[str, float] = {}
    for key in reversed(tuple(graph.nodes)):
        after = max((found[child] for child in graph.children[key]), default=0.0)
        found[key] = minutes(graph.nodes[key].stage) + after
    return found


def _depths(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, node in graph.nodes.items():
        found[key] = 1 + max((found[parent] for parent in node.upstream.values()), default=-1)
    return found


def _reason_not_to_try(fact: StageFacts, spent: bool, held: str, fills_slot: bool) -> str:
    """Why a stage is not submitted, or why its result does not count; "" if neither holds."""
    if fact.done:
        return f"{fact.diverged}, and {NO_SEED_LEFT}" if fact.diverged and fills_slot else ""
    if fact.cancelled:
        return "cancelled; launching again lifts that"
    if fact.stopped:
        return fact.stopped
    if fact.diverged:
        return f"{fact.diverged}, and {NO_SEED_LEFT if fills_slot else 'its seed is that of all its runs'}"
    if spent and fact.failures:
        return "the experiment's budget of failed attempts is spent (policy.max_failures)"
    return held if not fact.attempts else ""


def _groups(
    nodes: Iterable[Node],
    height: Mapping[str, float],
    facts: Mapping[str, StageFacts],
    excluded: tuple[str, ...],
    predict: Predict | None,
) -> list[tuple[tuple[str, str, Request], list[Node]]]:
    """Stages of one depth by stage name, method and request; those with the longest chain downstream first."""
    found: dict[tuple[str, str, Request], list[Node]] = {}
    requests: dict[tuple[str, str, Request, Shortage], Request] = {}
    for node in nodes:
        fact = facts.get(node.key, _BLANK)
        kind = (node.stage, node.method, fact.request, fact.short_of)
        if kind not in requests:
            requests[kind] = _request(node, fact, excluded, predict)
        request = requests[kind]
        found.setdefault((node.stage, node.method, request), []).append(node)
    return sorted(found.items(), key=lambda item: -max(height[node.key] for node in item[1]))


def _request(node: Node, fact: StageFacts, excluded: tuple[str, ...], predict: Predict | None) -> Request:
    """What the next attempt of a stage requests."""
    found = replace(fact.request, exclude=tuple(sorted({*fact.request.exclude, *excluded}))) if excluded else fact.request
    if predict is None or found.relief:  # less work a pass takes longer
        return found
    predicted = predict(node.stage, node.method)
    return replace(
        found,
        minutes=None if Shortage.time in fact.short_of else predicted.minutes,
        memory_gb=None if Shortage.memory in fact.short_of else predicted.memory_gb,
    )


def _pack(nodes: Sequence[Node], size: int) -> tuple[Task, ...]:
    """Tasks of at most `size` stages of one fold, in the order of `nodes`; those with the same upstream stages next to one another."""
    folds: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for node in nodes:
        folds.setdefault(node.fold, {}).setdefault(tuple(sorted(node.upstream.values())), []).append(node.key)
    of_folds = [list(itertools.chain(*alike.values())) for alike in folds.values()]
    return tuple(Task(tuple(keys[start : start + size])) for keys in of_folds for start in range(0, len(keys), size))


def _cut(tasks: tuple[Task, ...], size: int) -> tuple[tuple[Task, ...], ...]:
    size = size or len(tasks) or 1
    return tuple(tasks[start : start + size] for start in range(0, len(tasks), size))
