"""Level-triggered control: look at files and queue, plan, submit; again until nothing is left to do. It keeps no state that matters.

`reconcile` is one pass, for any executor. `wait_for` repeats it with a pause in between, `run_local` whenever a task ends on this machine.
A pass that is cut off anywhere is made good by the next: what it submitted is in flight, what it did not is planned again.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from jobs.graph import Graph, Node
from jobs.layout import Layout
from jobs.local import LocalExecutor
from jobs.observe import read_facts
from jobs.plan import Batch, Executor, InFlight, Limits, NodeFacts, Phase, Plan, make_plan
from jobs.slurm_client import SlurmUnavailableError

MAX_SILENT = 4  # times a stage may leave the queue, everything upstream of it done, without an attempt; noticed one submission later
MAX_UNSEEN = 30  # passes in a row that could not look at the queue
SLICE_SECONDS = 0.2  # how soon Ctrl-C is heard
HELD_SECONDS = 2.0  # between looks at stages that another launcher on this machine computes


@runtime_checkable
class SeesQueue(Protocol):
    """An executor that can name every job in the queue."""

    def live_jobs(self) -> frozenset[str] | None:
        """`JOB` or `ARRAY_INDEX` of all jobs that run or wait, whoever submitted them; None if that is not known now."""


@dataclass(frozen=True)
class Desired:
    """What should be, and how hard to try."""

    graph: Graph
    layout: Layout
    max_attempts: int
    since: float = 0.0  # seconds since the epoch; failures of attempts begun before are forgiven: the time of the last launch by hand
    runs_per_task: Mapping[str, int] = field(default_factory=dict)  # by stage name


class Change(Enum):
    """What happened to a stage."""

    submitted = "submitted"
    done = "done"
    failed = "failed"
    interrupted = "interrupted"


@dataclass(frozen=True)
class Event:
    """Something to tell the user: one line."""

    change: Change
    node: Node
    text: str
    done: int  # stages of the experiment that are done now
    total: int

    @property
    def line(self) -> str:
        return f"[{self.done}/{self.total}] {self.node.name} {self.text}"


@dataclass(frozen=True)
class Report:
    """Where an experiment stands after a pass."""

    plan: Plan
    facts: Mapping[str, NodeFacts]
    in_flight: Mapping[str, InFlight]
    submitted: tuple[str, ...] = ()  # keys, by this pass
    interrupted: bool = False  # the user asked to stop

    @property
    def complete(self) -> bool:
        """Every run has a result."""
        return self.plan.complete


class Interrupts:
    """Counts Ctrl-C and requests to terminate while its `with` block lasts, instead of being torn out of the middle of something."""

    def __init__(self) -> None:
        self.count = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def pause(self, seconds: float) -> None:
        """Sleep, but not on after an interrupt."""
        end = time.monotonic() + seconds
        while not self.count and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_SECONDS))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def reconcile(desired: Desired, executor: Executor, *, silent: Mapping[str, int] | None = None) -> Report:
    """One pass: observe, plan, submit. Running it twice submits nothing twice.

    `silent` counts, by key, submissions that ended without an attempt; `MAX_SILENT` of them count as refused.
    """
    in_flight = dict(executor.in_flight())  # before the files: what ends in between is seen as done rather than as lost
    facts = read_facts(desired.graph, desired.layout, live_jobs=_live_jobs(executor), since=desired.since)
    return _plan_and_submit(desired, executor, without_silent(facts, silent or {}), in_flight)


def without_silent(facts: Mapping[str, NodeFacts], silent: Mapping[str, int]) -> dict[str, NodeFacts]:
    """Facts in which stages whose jobs keep ending before the worker begins are refused, so that nothing is submitted for ever. Pure."""
    error = f"{MAX_SILENT} jobs ended before the worker began: see the log of the last one"
    hopeless = {key for key, count in silent.items() if count >= MAX_SILENT and not facts[key].done}
    return {key: replace(fact, refused=True, error=error) if key in hopeless else fact for key, fact in facts.items()}


def count_silent(before: Report, after: Report, graph: Graph) -> tuple[str, ...]:
    """Stages that left the queue between two passes without an attempt, although everything upstream of them was done. Pure.

    A stage that waited for its turn in a task whose worker did begin is not among them.
    """
    gone = [key for key in before.in_flight if key not in after.in_flight or key in after.submitted]
    begun = {before.in_flight[key].job for key in gone if not _unchanged(before.facts[key], after.facts[key])}
    return tuple(
        key
        for key in gone
        if before.in_flight[key].job not in begun and all(before.facts[parent].done for parent in graph.nodes[key].upstream.values())
    )


def wait_for(
    desired: Desired,
    executor: Executor,
    *,
    poll_seconds: float,
    tell: Callable[[Event], None] = lambda event: None,
    each_pass: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Passes with `poll_seconds` in between, until every run is done or given up, or the user interrupts; jobs go on in that case.

    Raises SlurmUnavailableError when Slurm has not answered in `MAX_UNSEEN` passes one after another; fewer are waited out.
    """
    silent: Counter[str] = Counter()
    former: Report | None = None
    unseen = 0
    with Interrupts() as interrupts:
        while True:
            try:
                report = reconcile(desired, executor, silent=silent)
            except SlurmUnavailableError:
                unseen += 1
                if unseen >= MAX_UNSEEN or interrupts.count:
                    raise
                interrupts.pause(poll_seconds)
                continue
            unseen = 0
            for event in changes(desired.graph, former, report):
                tell(event)
            if former is not None:
                silent.update(count_silent(former, report, desired.graph))
            each_pass(report)
            if report.plan.settled:
                return report
            former = report
            interrupts.pause(poll_seconds)
            if interrupts.count:
                return replace(report, interrupted=True)


def run_local(
    desired: Desired,
    executor: LocalExecutor,
    *,
    grace_seconds: float = 60.0,
    tell: Callable[[Event], None] = lambda event: None,
    stopping: Callable[[int], None] = lambda running: None,
) -> Report:
    """Run until every run is done or given up, planning again whenever a task ends.

    On Ctrl-C (or SIGTERM, SIGHUP) `stopping` is told how many workers are asked to write a checkpoint; they get `grace_seconds`, a second
    Ctrl-C ends the grace. The same command goes on from there.
    """
    desired = replace(desired, runs_per_task={})  # workers are forked: nothing is gained by computing several stages in one
    silent: Counter[str] = Counter()
    report = reconcile(desired, executor)
    with Interrupts() as interrupts:
        looked = time.monotonic()
        while not report.plan.settled and not interrupts.count:
            touched = {key for ended in executor.wait(SLICE_SECONDS) for key in ended.keys}
            if executor.idle:
                interrupts.pause(SLICE_SECONDS)
            elsewhere = set(report.plan.waiting) - set(report.in_flight)  # another launcher computes these
            if elsewhere and time.monotonic() - looked > HELD_SECONDS:
                touched |= elsewhere
            if not touched:
                continue
            looked = time.monotonic()
            former = report
            report = _look_again(desired, executor, former, touched, silent)
            silent.update(key for key in touched & set(former.in_flight) if _unchanged(former.facts[key], report.facts[key]))
            for event in changes(desired.graph, former, report, ended=touched):
                tell(event)
        if not report.plan.settled:
            stopping(sum(flight.phase is Phase.running for flight in executor.in_flight().values()))
            executor.stop(grace=grace_seconds, hurry=lambda: interrupts.count > 1)
            facts = read_facts(desired.graph, desired.layout, since=desired.since)
            report = Report(_plan(desired, facts, {}, executor.limits()), facts, {}, interrupted=True)
    return report


def changes(graph: Graph, former: Report | None, now: Report, *, ended: Iterable[str] | None = None) -> list[Event]:
    """What happened between two passes, worth a line each. Pure.

    `ended`: keys of tasks known to have ended; without them, those that were in flight before and are not now.
    """
    if former is None:
        return []
    done, total = sum(fact.done for fact in now.facts.values()), len(graph.nodes)
    over = former.in_flight if ended is None else ended
    found: list[Event] = []
    for key in over:
        before, after = former.facts[key], now.facts[key]
        node = graph.nodes[key]
        if after.done and not before.done:
            found.append(Event(Change.done, node, f"done in {duration(after.seconds)}", done, total))
        elif after.failures > before.failures or (after.refused and not before.refused):
            again = " (tried again)" if key in now.in_flight else " (given up)" if key in now.plan.given_up else ""
            found.append(Event(Change.failed, node, f"failed: {after.error}{again}", done, total))
        elif after.attempts > before.attempts and key not in now.in_flight and not after.held and not after.done:
            found.append(Event(Change.interrupted, node, "interrupted", done, total))
    return found


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `5 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _look_again(desired: Desired, executor: Executor, former: Report, touched: set[str], silent: Mapping[str, int]) -> Report:
    """A pass that reads only what can have changed: the given stages and what they read."""
    keys = touched | {parent for key in touched for parent in desired.graph.nodes[key].upstream.values()}
    in_flight = dict(executor.in_flight())
    facts = read_facts(desired.graph, desired.layout, keys=keys, known=dict(former.facts), since=desired.since)
    return _plan_and_submit(desired, executor, without_silent(facts, silent), in_flight)


def _plan_and_submit(desired: Desired, executor: Executor, facts: Mapping[str, NodeFacts], in_flight: dict[str, InFlight]) -> Report:
    plan = _plan(desired, facts, in_flight, executor.limits())
    submitted: list[str] = []
    for batch in plan.batches:
        ready = _submittable(batch, desired.graph, facts, in_flight)
        if not ready.tasks:
            continue
        parents = {parent for key in ready.keys for parent in desired.graph.nodes[key].upstream.values()}
        taken = executor.submit(ready, desired.graph, {key: in_flight[key] for key in parents if key in in_flight})
        in_flight.update(taken)
        submitted.extend(taken)
    return Report(plan, facts, in_flight, tuple(submitted))


def _plan(desired: Desired, facts: Mapping[str, NodeFacts], in_flight: Mapping[str, InFlight], limits: Limits) -> Plan:
    packing, attempts = desired.runs_per_task, desired.max_attempts
    return make_plan(desired.graph, facts, in_flight, runs_per_task=packing, limits=limits, max_attempts=attempts)


def _submittable(batch: Batch, graph: Graph, facts: Mapping[str, NodeFacts], in_flight: Mapping[str, InFlight]) -> Batch:
    """A batch without the tasks whose upstream stages the executor did not take."""
    parents = graph.nodes

    def standing(key: str) -> bool:
        return all(facts[parent].done or parent in in_flight for parent in parents[key].upstream.values())

    return replace(batch, tasks=tuple(task for task in batch.tasks if all(standing(key) for key in task.keys)))


def _unchanged(before: NodeFacts, after: NodeFacts) -> bool:
    return not after.done and not after.held and after.attempts == before.attempts


def _live_jobs(executor: Executor) -> frozenset[str] | None:
    return executor.live_jobs() if isinstance(executor, SeesQueue) else None
