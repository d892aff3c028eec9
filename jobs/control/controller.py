"""Level-triggered control: look at files and queue, plan, submit; again until nothing is left to do. It keeps no state that matters.

`reconcile` is one pass, for any executor. `wait_for` repeats it with a pause in between, `run_local` whenever a task of this process ends.
A pass that is cut off anywhere is made good by the next: what it submitted is in flight, what it did not is planned again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum

from jobs.control.estimates import Bounds, Experience
from jobs.control.executor_protocol import Batch, Executor, Limits, NearbyExecutor, NotesDepartures, SeesQueue
from jobs.control.facts import InFlight, NodeFacts, Phase
from jobs.control.observe import Sight, read_facts
from jobs.control.plan import Plan, make_plan
from jobs.control.result_index import index_of
from jobs.control.rounds import Judgements, replay
from jobs.errors import SlurmUnavailableError
from jobs.experiment.config import Cluster, Policy, Requests, resources_of
from jobs.experiment.graph import Graph, Node, Slot
from jobs.experiment.launched import Launched
from jobs.signals import SLICE_SECONDS, Interrupts
from jobs.store.cancellations import Cancelled, read_cancellations
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.text import duration

MAX_UNSEEN = 30  # passes in a row that could not look at the queue
HELD_SECONDS = 2.0  # between looks at stages that another launcher on this machine computes


@dataclass(frozen=True)
class Desired:
    """What should be, and how hard to try."""

    graph: Graph  # its runs fill the slots, as far as is known
    layout: Layout
    policy: Policy = field(default_factory=Policy)
    since: float = 0.0  # seconds since the epoch; failures of attempts begun before are forgiven: the time of the last launch by hand
    runs_per_task: Mapping[str, int] = field(default_factory=dict)  # by stage name
    refill: Callable[[Mapping[Slot, int]], Graph] | None = None  # the graph for slots of these generations; None: no run is ever dropped
    clock: Callable[[], float] = time.time
    bounds: Bounds | None = None  # of what is predicted from finished siblings; None: everything is asked for as configured


def desired_of(launched: Launched) -> Desired:
    """What the controller is to bring about for an experiment as it was launched."""
    given, policy = launched.experiment, launched.experiment.policy
    stages = {node.stage for node in launched.graph.nodes.values()}
    most = {stage: resources_of(given, stage) for stage in stages}
    packing = {stage: resources.runs_per_task for stage, resources in most.items()}
    predicted = given.cluster is Cluster.slurm and policy.requests is Requests.experience
    partitions = frozenset(filter(None, (given.slurm.partition or "").split(",")))
    bounds = Bounds(most, policy.min_siblings, given.slurm.signal_seconds, partitions) if predicted else None
    return Desired(launched.graph, launched.layout, policy, launched.since, packing, launched.refill, bounds=bounds)


@dataclass(frozen=True)
class Look:
    """The graph with the runs that fill the slots now, what the files say of it, and what was decided on its runs."""

    graph: Graph
    facts: Mapping[str, NodeFacts]
    judgements: Judgements = field(default_factory=Judgements)


class Change(Enum):
    """What happened to a stage."""

    submitted = "submitted"
    done = "done"
    failed = "failed"
    interrupted = "interrupted"
    dropped = "dropped"
    held = "held"


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
    graph: Graph
    facts: Mapping[str, NodeFacts]
    in_flight: Mapping[str, InFlight]
    judgements: Judgements = field(default_factory=Judgements)
    submitted: tuple[str, ...] = ()  # keys, by this pass
    interrupted: bool = False  # the user asked to stop

    @property
    def complete(self) -> bool:
        """Every slot has a run that counts."""
        return self.plan.complete

    @property
    def settled(self) -> bool:
        """Nothing to do and nothing to wait for."""
        return self.plan.settled


def reconcile(desired: Desired, executor: Executor) -> Report:
    """One pass: observe, judge, plan, submit. Running it twice submits nothing twice."""
    in_flight = dict(executor.in_flight())  # before the files: what ends in between is seen as done rather than as lost
    return _plan_and_submit(desired, executor, look(desired, executor), in_flight)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A look at a large experiment makes a million objects and no cycle: the collector would go through all of them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def look(
    desired: Desired, executor: Executor | None = None, *, keys: Iterable[str] | None = None, known: Mapping[str, NodeFacts] | None = None
) -> Look:
    """What the files say, and the seeds that fill the slots by it: as long as a run is dropped, its slot's next one is read too.

    `keys` and `known` are as for `read_facts`. Ends because a slot has `policy.max_seeds` seeds at the most.
    """
    sight = sight_of(desired, executor)
    graph, index = desired.graph, index_of(desired.layout)
    if desired.refill is not None and index.generations and not graph.superseded and keys is None:
        graph = desired.refill(index.generations)  # a guess that saves looking again and again; the results decide
    facts: Mapping[str, NodeFacts] = read_facts(graph, desired.layout, sight, keys=keys, known=known)
    while True:
        judgements = replay(graph, facts, desired.policy)
        present = {(run.method, run.fold, run.slot): run.generation for run in graph.runs if run.generation}
        if desired.refill is None or judgements.generations == present:
            index.remember(present)
            return Look(graph, facts, judgements)
        graph = desired.refill(judgements.generations)
        facts = read_facts(graph, desired.layout, sight, keys=[key for key in graph.nodes if key not in facts], known=facts)


def sight_of(desired: Desired, executor: Executor | None) -> Sight:
    """What reading the files needs to know beside them."""
    seen = executor if isinstance(executor, SeesQueue) else None
    return Sight(
        since=desired.since,
        max_attempts=desired.policy.max_attempts,
        live_jobs=seen.live_jobs() if seen else None,
        departures=executor.departures if isinstance(executor, NotesDepartures) else lambda keys: {},
        settling=seen.settling() if seen else frozenset(),
        cancelled=read_cancellations(desired.layout, desired.since),
        clock=desired.clock,
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
    former: Report | None = None
    unseen = 0
    with Interrupts() as interrupts:
        while True:
            try:
                report = reconcile(desired, executor)
            except SlurmUnavailableError:
                unseen += 1
                if unseen >= MAX_UNSEEN or interrupts.count:
                    raise
                interrupts.pause(poll_seconds)
                continue
            unseen = 0
            desired = replace(desired, graph=report.graph)
            for event in changes(former, report):
                tell(event)
            each_pass(report)
            if report.plan.settled:
                return report
            former = report
            interrupts.pause(poll_seconds)
            if interrupts.count:
                return replace(report, interrupted=True)


def run_local(
    desired: Desired,
    executor: NearbyExecutor,
    *,
    grace_seconds: float = 60.0,
    tell: Callable[[Event], None] = lambda event: None,
    stopping: Callable[[int], None] = lambda running: None,
    stopped: Callable[[], int] | None = None,
) -> Report:
    """Run until every run is done or given up, planning again whenever a task ends.

    On Ctrl-C (or SIGTERM, SIGHUP) `stopping` is told how many workers are asked to write a checkpoint; they get `grace_seconds`, a second
    Ctrl-C ends the grace. The same command goes on from there. Where `stopped` is given, no signal is heard: it says how often this was
    asked to stop, and is called at every look.
    """
    desired = replace(desired, runs_per_task={}, bounds=None)  # workers are forked: nothing is gained by computing several stages in one
    report = reconcile(desired, executor)
    with Interrupts(stopped) as interrupts:
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
            report = _look_again(replace(desired, graph=former.graph), executor, former, touched)
            for event in changes(former, report, ended=touched):
                tell(event)
        if not report.plan.settled:
            stopping(sum(flight.phase is Phase.running for flight in executor.in_flight().values()))
            executor.stop(grace=grace_seconds, hurry=lambda: interrupts.count > 1)
            now = look(replace(desired, graph=report.graph), executor)
            report = Report(plan_of(desired, now, {}, executor.limits()), now.graph, now.facts, {}, now.judgements, interrupted=True)
    return report


def changes(former: Report | None, now: Report, *, ended: Iterable[str] | None = None) -> list[Event]:
    """What happened between two passes, worth a line each. Pure.

    `ended`: keys of tasks known to have ended; without them, those that were in flight before and are not now.
    """
    if former is None:
        return []
    done, total = sum(fact.done for fact in now.facts.values()), len(now.graph.nodes)
    over = dict.fromkeys((*former.in_flight, *former.plan.waiting) if ended is None else ended)
    found: list[Event] = []
    for key in over:
        if key not in former.facts or key not in now.graph.nodes:  # a job of an earlier configuration
            continue
        before, after = former.facts[key], now.facts[key]
        node = now.graph.nodes[key]
        if after.done and not before.done:
            found.append(Event(Change.done, node, f"done in {duration(after.seconds)}", done, total))
        elif after.ended > before.ended and after.failure == FailureClass.interrupted.name and not after.stopped:
            found.append(Event(Change.interrupted, node, "interrupted", done, total))
        elif (after.ended > before.ended or (after.stopped and not before.stopped)) and after.error:
            again = " (tried again)" if key in now.in_flight else " (given up)" if key in now.plan.given_up else ""
            found.append(Event(Change.failed, node, f"failed: {after.error}{again}", done, total))
    known = set(former.judgements.dropped)
    nodes = {(run.method, run.fold, run.slot, run.generation): now.graph.nodes[run.key] for run in now.graph.superseded}
    for each in now.judgements.dropped:
        if each not in known and (each.method, each.fold, each.slot, each.generation) in nodes:
            node = nodes[each.method, each.fold, each.slot, each.generation]
            found.append(Event(Change.dropped, node, f"dropped: {each.reason}; slot {each.slot} gets another seed", done, total))
    if len(now.plan.stayed) > len(former.plan.stayed):
        first = now.plan.stayed[0]
        found.append(
            Event(Change.held, now.graph.nodes[first], f"and {len(now.plan.stayed) - 1} more: {now.plan.reasons[first]}", done, total)
        )
    return found


def _look_again(desired: Desired, executor: Executor, former: Report, touched: set[str]) -> Report:
    """A pass that reads only what can have changed: the given stages, what they read, and what the user has cancelled meanwhile."""
    known = touched & desired.graph.nodes.keys()  # a result that somebody took away may have taken a reserve seed's run along
    keys = known | {parent for key in known for parent in desired.graph.nodes[key].upstream.values()}
    cancelled = read_cancellations(desired.layout, desired.since)
    keys |= {key for key, fact in former.facts.items() if key in cancelled and not (fact.done or fact.cancelled)}
    in_flight = dict(executor.in_flight())
    return _plan_and_submit(desired, executor, look(desired, executor, keys=keys, known=former.facts), in_flight)


def _plan_and_submit(desired: Desired, executor: Executor, now: Look, in_flight: dict[str, InFlight]) -> Report:
    index_of(desired.layout).store()
    plan = plan_of(desired, now, in_flight, executor.limits())
    if plan.withdrawn:
        for key in executor.cancel(plan.withdrawn):
            in_flight.pop(key, None)
    submitted: list[str] = []
    for batch in plan.batches:
        ready = _submittable(batch, now.graph, now.facts, in_flight, read_cancellations(desired.layout, desired.since))
        if not ready.tasks:
            continue
        parents = {parent for key in ready.keys for parent in now.graph.nodes[key].upstream.values()}
        taken = executor.submit(ready, now.graph, {key: in_flight[key] for key in parents if key in in_flight})
        in_flight.update(taken)
        submitted.extend(taken)
    cancelled = read_cancellations(desired.layout, desired.since)
    late = [key for key in submitted if key in cancelled]  # the user cancelled while they were handed in, and may have missed them
    for key in executor.cancel(late) if late else ():
        in_flight.pop(key, None)
    return Report(plan, now.graph, now.facts, in_flight, now.judgements, tuple(submitted))


def plan_of(desired: Desired, now: Look, in_flight: Mapping[str, InFlight], limits: Limits) -> Plan:
    """What a pass would submit and withdraw, by what was observed. Pure."""
    return make_plan(
        now.graph,
        now.facts,
        in_flight,
        runs_per_task=desired.runs_per_task,
        limits=limits,
        max_failures=desired.policy.max_failures,
        since=desired.since,
        predict=experience_of(desired, now),
    )


def experience_of(desired: Desired, now: Look | Report) -> Experience | None:
    """What predicts requests from what is finished by now; None where everything is asked for as configured."""
    return Experience(now.graph, now.facts, desired.bounds) if desired.bounds is not None else None


def _submittable(
    batch: Batch, graph: Graph, facts: Mapping[str, NodeFacts], in_flight: Mapping[str, InFlight], cancelled: Cancelled
) -> Batch:
    """A batch without the tasks whose upstream stages the executor did not take, and without those cancelled since the pass began."""
    parents = graph.nodes

    def standing(key: str) -> bool:
        return key not in cancelled and all(facts[parent].done or parent in in_flight for parent in parents[key].upstream.values())

    return replace(batch, tasks=tuple(task for task in batch.tasks if all(standing(key) for key in task.keys)))
