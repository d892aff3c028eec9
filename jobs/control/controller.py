"""Level-triggered controller: read store and queue, judge, plan, submit; repeat until nothing is left to do. Keeps no state that matters.

`reconcile` is one pass, for any executor. `wait_for` repeats it with a pause in between, `run_local` whenever a task of this process ends.
A pass may be killed at any point: what it submitted is in flight for the next pass, what it did not submit is planned again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial

from jobs.control.estimates import Bounds, Experience
from jobs.control.executor_protocol import Batch, Executor, Limits, NearbyExecutor
from jobs.control.facts import InFlight, Phase, StageFacts
from jobs.control.failure_policy import blamed_nodes, judge_stages
from jobs.control.observe import PassContext, observe
from jobs.control.plan import Plan, make_plan
from jobs.control.result_index import index_of
from jobs.control.rounds import Judgements, replay
from jobs.errors import RequestRefusedError, SlurmUnavailableError
from jobs.experiment.config import Cluster, Policy, Requests, resources_of
from jobs.experiment.graph import Extend, Graph, Node, Refill
from jobs.experiment.launched import Launched
from jobs.signals import SLICE_SECONDS, Interrupts
from jobs.store.cancellations import Cancelled, read_cancellations
from jobs.store.clock import file_time
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.text import duration

OUTAGE_SECONDS = 24 * 3600.0  # how long `wait_for` waits for a Slurm or a file system that does not answer
LONGEST_PAUSE = 300.0  # seconds between two passes meanwhile
ELSEWHERE_SECONDS = 2.0  # between readings of stages that another launcher on this machine computes


@dataclass(frozen=True)
class Desired:
    """The desired state of an experiment, and the limits of retrying."""

    graph: Graph  # its runs fill the slots, as far as is known
    layout: Layout
    policy: Policy = field(default_factory=Policy)
    since: float = 0.0  # time of the last launch, seconds since the epoch; failures of earlier attempts do not count
    runs_per_task: Mapping[str, int] = field(default_factory=dict)  # by stage name
    refill: Refill | None = None  # the graph for slots of these generations; None: no run is ever dropped
    clock: Callable[[], float] = time.time
    bounds: Bounds | None = None  # of requests predicted from finished siblings; None: everything is requested as configured
    extend: Extend | None = None  # the runs that results call for, as in a sweep; None: results add none
    keep_old: bool = False  # queued stages that are not in the graph are not withdrawn


def desired_of(launched: Launched) -> Desired:
    """The desired state of an experiment as it was launched."""
    given, policy = launched.experiment, launched.experiment.policy
    stages = {node.stage for node in launched.graph.nodes.values()}
    most = {stage: resources_of(given, stage) for stage in stages}
    packing = {stage: resources.runs_per_task for stage, resources in most.items()}
    predicted = given.cluster is Cluster.slurm and policy.requests is Requests.experience
    partitions = frozenset(filter(None, (given.slurm.partition or "").split(",")))
    bounds = Bounds(most, policy.min_siblings, given.slurm.signal_seconds, partitions) if predicted else None
    return Desired(
        launched.graph,
        launched.layout,
        policy,
        launched.since,
        packing,
        launched.refill,
        partial(file_time, launched.layout.root),
        bounds,
        launched.extend,
        keep_old=launched.keep_old,
    )


@dataclass(frozen=True)
class ExperimentState:
    """The graph with the runs that fill the slots now, the facts of its stages, and the outlier judgements of its runs."""

    graph: Graph
    facts: Mapping[str, StageFacts]
    judgements: Judgements = field(default_factory=Judgements)


class Change(Enum):
    """What happened to a stage."""

    submitted = "submitted"
    done = "done"
    failed = "failed"
    interrupted = "interrupted"
    cancelled = "cancelled"
    dropped = "dropped"
    held = "held"


@dataclass(frozen=True)
class Event:
    """A change to report to the user in one line."""

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
    """The state of an experiment after a pass."""

    plan: Plan
    graph: Graph
    facts: Mapping[str, StageFacts]
    in_flight: Mapping[str, InFlight]
    judgements: Judgements = field(default_factory=Judgements)
    submitted: tuple[str, ...] = ()  # keys, by this pass
    interrupted: bool = False  # by the user
    refused: tuple[str, ...] = ()  # one message for each batch whose request Slurm rejected in this pass
    stuck: Mapping[str, str] = field(default_factory=dict)  # key -> why its queued job will never start without intervention

    @property
    def complete(self) -> bool:
        """Every slot has a run that counts."""
        return self.plan.complete

    @property
    def settled(self) -> bool:
        """Nothing to do and nothing to wait for."""
        return self.plan.settled


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Disable cyclic garbage collection: a pass allocates about 10^6 acyclic objects.

    At the end they are moved to the oldest generation, where the next collections do not visit them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.unfreeze()
            gc.enable()


@_collector_paused()
def reconcile(desired: Desired, executor: Executor) -> Report:
    """One pass: observe, judge, plan, submit. Running it twice submits nothing twice."""
    in_flight = dict(executor.in_flight())  # before the store: a stage that ends in between counts as done rather than as lost
    return _plan_and_submit(desired, executor, look(desired, executor), in_flight)


@_collector_paused()
def look(
    desired: Desired, executor: Executor | None = None, *, keys: Iterable[str] | None = None, known: Mapping[str, StageFacts] | None = None
) -> ExperimentState:
    """Read the facts of all stages and replay the judgements; repeated with the next seed of every slot whose run was dropped, and with
    the runs by which the results extend the graph.

    `keys` and `known` are as for `read_facts`. Ends because a slot has at most `policy.max_seeds` seeds, and `extend` only adds runs.
    """
    context = context_of(desired, executor)
    graph, refill, index = desired.graph, desired.refill, index_of(desired.layout, desired.graph.score)
    if refill is not None and index.generations and not graph.superseded and keys is None:
        graph = refill(index.generations)  # a guess that saves repetitions; the results decide
    facts = read_facts(graph, desired.layout, context, keys=keys, known=known)
    while True:
        judgements = replay(graph, facts, desired.policy)
        present = {(run.method, run.fold, run.slot): run.generation for run in graph.runs if run.generation}
        if refill is None or judgements.generations == present:
            larger = desired.extend(graph, facts) if desired.extend is not None else None
            if larger is None:
                index.remember(present)
                return ExperimentState(graph, facts, judgements)
            refill = larger
        graph = refill(judgements.generations)
        facts = read_facts(graph, desired.layout, context, keys=[key for key in graph.nodes if key not in facts], known=facts)


def read_facts(
    graph: Graph,
    layout: Layout,
    context: PassContext | None = None,
    *,
    keys: Iterable[str] | None = None,
    known: Mapping[str, StageFacts] | None = None,
) -> dict[str, StageFacts]:
    """Facts of every stage of the graph; with `keys`, only those are read and the rest is taken from `known`."""
    context = context or PassContext()
    return judge_stages(graph, observe(graph, layout, context, keys=keys, known=known, blame=blamed_nodes), context)


def context_of(desired: Desired, executor: Executor | None) -> PassContext:
    """The context of a pass; without an executor the queue counts as unknown."""
    context = PassContext(
        since=desired.since,
        max_attempts=desired.policy.max_attempts,
        cancelled=read_cancellations(desired.layout, desired.since),
        clock=desired.clock,
        experiment=desired.layout.experiment,
        folder=str(desired.layout.root),
    )
    if executor is None:
        return context
    return replace(
        context,
        live_jobs=executor.live_jobs(),
        cluster=executor.cluster,
        departures=executor.departures,
        refusals=executor.refusals,
        settling=executor.settling(),
    )


def wait_for(
    desired: Desired,
    executor: Executor,
    *,
    poll_seconds: float,
    outage_seconds: float = OUTAGE_SECONDS,
    longest_pause: float = LONGEST_PAUSE,
    on_event: Callable[[Event], None] = lambda event: None,
    on_pass: Callable[[Report], None] = lambda report: None,
    on_outage: Callable[[Exception, float], None] = lambda error, pause: None,
) -> Report:
    """Passes with `poll_seconds` in between, until every run is done or given up, or the user interrupts; jobs then keep running.

    A Slurm that does not answer (SlurmUnavailableError) and a file system that fails (OSError) are waited out, with pauses that double up
    to `longest_pause`: `on_outage` gets the error of the pass and the seconds until the next. The error is raised if it lasts
    `outage_seconds`, or if the user interrupts before a first pass succeeded.
    """
    former: Report | None = None
    pause, outage = poll_seconds, 0.0  # seconds; `outage`: when the first of the failed passes ended, 0 if the last pass succeeded
    with Interrupts() as interrupts:
        while True:
            try:
                report = reconcile(desired, executor)
                before, former = former, report
                desired = replace(desired, graph=report.graph)
                for event in changes(before, report):
                    on_event(event)
                on_pass(report)
            except BrokenPipeError:  # the reader of the output is gone
                raise
            except (SlurmUnavailableError, OSError) as error:
                outage = outage or time.monotonic()
                if time.monotonic() - outage >= outage_seconds:
                    raise
                on_outage(error, pause)
                interrupts.pause(pause)
                if interrupts.count and former is None:
                    raise
                pause = max(poll_seconds, min(2 * pause, longest_pause))
            else:
                if report.plan.settled:
                    return report
                pause, outage = poll_seconds, 0.0
                interrupts.pause(pause)
            if interrupts.count and former is not None:
                return replace(former, interrupted=True)


def run_local(
    desired: Desired,
    executor: NearbyExecutor,
    *,
    grace_seconds: float = 60.0,
    on_event: Callable[[Event], None] = lambda event: None,
    on_stop: Callable[[int], None] = lambda running: None,
    stop_count: Callable[[], int] | None = None,
) -> Report:
    """Run until every run is done or given up, planning again whenever a task ends.

    On Ctrl-C (or SIGTERM, SIGHUP) `on_stop` gets the number of workers that are asked to write a checkpoint; they have `grace_seconds`, a
    second Ctrl-C kills them at once. The same command resumes the run. With `stop_count`, signals are not handled: it returns how often a
    stop was requested, and is polled.
    """
    desired = replace(desired, runs_per_task={}, bounds=None)  # workers are forked: several stages in one task save nothing
    report = reconcile(desired, executor)
    with Interrupts(stop_count) as interrupts:
        last_read = time.monotonic()
        while not report.plan.settled and not interrupts.count:
            touched = {key for ended in executor.wait(SLICE_SECONDS) for key in ended.keys}
            if executor.idle:
                interrupts.pause(SLICE_SECONDS)
            elsewhere = set(report.plan.waiting) - set(report.in_flight)  # another launcher computes these
            if elsewhere and time.monotonic() - last_read > ELSEWHERE_SECONDS:
                touched |= elsewhere
            touched |= {key for key in report.plan.deferred if 0.0 < report.facts[key].not_before <= desired.clock()}
            if not touched:
                continue
            last_read = time.monotonic()
            former = report
            report = _partial_pass(replace(desired, graph=former.graph), executor, former, touched)
            for event in changes(former, report, ended=touched):
                on_event(event)
        if not report.plan.settled:
            on_stop(sum(flight.phase is Phase.running for flight in executor.in_flight().values()))
            executor.stop(grace=grace_seconds, hurry=lambda: interrupts.count > 1)
            now = look(replace(desired, graph=report.graph), executor)
            report = Report(plan_of(desired, now, {}, executor.limits()), now.graph, now.facts, {}, now.judgements, interrupted=True)
    return report


def changes(former: Report | None, now: Report, *, ended: Iterable[str] | None = None) -> list[Event]:
    """What happened between two passes, one event per change. Pure.

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
        elif after.cancelled and not after.done and (not before.cancelled or after.ended > before.ended):
            text = "cancelled, stopping" if key in now.plan.waiting else "cancelled"
            found.append(Event(Change.cancelled, node, text, done, total))
        elif after.ended > before.ended and after.failure is FailureClass.interrupted and not after.stopped:
            found.append(Event(Change.interrupted, node, "interrupted", done, total))
        elif (after.ended > before.ended or (after.stopped and not before.stopped)) and after.error:
            again = " (tried again)" if key in now.in_flight else " (given up)" if key in now.plan.given_up else ""
            found.append(Event(Change.failed, node, f"failed: {after.error}{again}", done, total))
    known = set(former.judgements.dropped)
    nodes = {(run.method, run.fold, run.slot, run.generation): now.graph.nodes[run.key] for run in now.graph.superseded}
    for each in now.judgements.dropped:
        node_of_run = nodes.get((each.method, each.fold, each.slot, each.generation))
        if node_of_run is not None and each not in known:
            found.append(Event(Change.dropped, node_of_run, f"dropped: {each.reason}; slot {each.slot} gets another seed", done, total))
    held, held_before = _held(now), _held(former)
    if len(held) > len(held_before):
        text = f"and {len(held) - 1} more: {now.plan.reasons[held[0]]}"
        found.append(Event(Change.held, now.graph.nodes[held[0]], text, done, total))
    return found


def _held(report: Report) -> list[str]:
    return [key for key in report.plan.held_or_cancelled if not report.facts[key].cancelled]


def _partial_pass(desired: Desired, executor: Executor, former: Report, touched: set[str]) -> Report:
    """A pass that reads only what can have changed: the given stages, those directly upstream, and those cancelled since."""
    known = touched & desired.graph.nodes.keys()  # a reserve seed's run leaves the graph if the result that called for it was removed
    keys = known | {parent for key in known for parent in desired.graph.nodes[key].upstream.values()}
    cancelled = read_cancellations(desired.layout, desired.since)
    keys |= {key for key, fact in former.facts.items() if key in cancelled and not (fact.done or fact.cancelled)}
    in_flight = dict(executor.in_flight())
    return _plan_and_submit(desired, executor, look(desired, executor, keys=keys, known=former.facts), in_flight)


def _plan_and_submit(desired: Desired, executor: Executor, now: ExperimentState, in_flight: dict[str, InFlight]) -> Report:
    index_of(desired.layout, desired.graph.score).store()
    site_nodes = executor.nodes() if any(each.bad_nodes for each in now.facts.values()) else 0
    plan = plan_of(desired, now, in_flight, executor.limits(), site_nodes)
    if plan.withdrawn:
        for key in executor.cancel(plan.withdrawn):
            in_flight.pop(key, None)
    submitted: list[str] = []
    refused: list[str] = []
    for batch in plan.batches:
        ready = _submittable(batch, now.graph, now.facts, in_flight, read_cancellations(desired.layout, desired.since))
        if not ready.tasks:
            continue
        parents = {parent for key in ready.keys for parent in now.graph.nodes[key].upstream.values()}
        try:
            taken = executor.submit(ready, now.graph, {key: in_flight[key] for key in parents if key in in_flight})
        except RequestRefusedError as error:
            refused.append(str(error))
            continue
        in_flight.update(taken)
        submitted.extend(taken)
    cancelled = read_cancellations(desired.layout, desired.since)
    late = [key for key in submitted if key in cancelled]  # cancelled by the user during submission, who may have missed them
    for key in executor.cancel(late) if late else ():
        in_flight.pop(key, None)
    return Report(plan, now.graph, now.facts, in_flight, now.judgements, tuple(submitted), refused=tuple(refused), stuck=executor.stuck())


def plan_of(desired: Desired, now: ExperimentState, in_flight: Mapping[str, InFlight], limits: Limits, site_nodes: int = 0) -> Plan:
    """The plan of a pass over an observed state. Pure. `site_nodes`: as for `make_plan`."""
    return make_plan(
        now.graph,
        now.facts,
        in_flight,
        runs_per_task=desired.runs_per_task,
        limits=limits,
        max_failures=desired.policy.max_failures,
        hold_diverging=desired.policy.hold_diverging,
        since=desired.since,
        now=desired.clock(),
        predict=experience_of(desired, now),
        keep_old=desired.keep_old,
        site_nodes=site_nodes,
    )


def experience_of(desired: Desired, now: ExperimentState | Report) -> Experience | None:
    """Predicts requests from the finished stages; None if everything is requested as configured."""
    return Experience(now.graph, now.facts, desired.bounds) if desired.bounds is not None else None


def _submittable(
    batch: Batch, graph: Graph, facts: Mapping[str, StageFacts], in_flight: Mapping[str, InFlight], cancelled: Cancelled
) -> Batch:
    """A batch without the tasks whose upstream stages the executor did not accept, and without those cancelled since the pass began."""

    def submittable(key: str) -> bool:
        return key not in cancelled and all(facts[parent].done or parent in in_flight for parent in graph.nodes[key].upstream.values())

    return replace(batch, tasks=tuple(task for task in batch.tasks if all(submittable(key) for key in task.keys)))
