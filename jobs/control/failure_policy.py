"""Failure policy: from the ended attempts of a stage to retry, escalate, exclude or give up. Pure; the table is in docs/failures.md."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from jobs.control.facts import Asked, Blamed, Departure, Request, Shortage, StageFacts
from jobs.control.faulty_nodes import BLAMABLE, NOT_RETRIED, Fault, fault_of, faulty_nodes
from jobs.control.observe import NO_RECORDS, Observation, PassContext, StageRecords
from jobs.experiment.graph import Graph, Node
from jobs.store.attempts import SUPERSEDED, AttemptFiles, holder, is_slurm_job
from jobs.store.failures import FailureClass, blames_node, cancelled_by_hand, class_of_state
from jobs.store.launches import in_launch
from jobs.store.records import Claim, Ending, Outcome
from jobs.text import counted

MAX_LOST = 5  # attempts in a row that may be lost or interrupted without a newer checkpoint
MAX_FAILED_STARTS = 4  # jobs of a stage that may leave the queue, everything upstream of it done, before the worker starts
DOUBTFUL_FAILED_STARTS = 2  # of them, after which a predicted request may be the cause: a start that takes longer than any before
UNSEEN_JOBS = 2  # jobs of an experiment that end so, after which the user is asked whether the nodes see the results folder
MEMORY_RETRIES = 2
MEMORY_STEP = 1.5  # factor on the requested memory, each time
COMMUNICATION_RETRIES = 3
DISK_RETRIES = 2
MAX_REFUSALS = 3  # passes in a row in which Slurm may reject the request of a stage
STORAGE_RETRIES = 14  # without a newer checkpoint, about two days
STORAGE_SECONDS = 300.0  # pause after the first of them; twice as long after each further one
LONGEST_PAUSE = 6 * 3600.0
_GPU = re.compile(r"CUDA|\bHIP\b|OutOfMemoryError")
COSTLY = (
    FailureClass.time_limit,
    FailureClass.memory,
    FailureClass.communication,
    FailureClass.disk,
    FailureClass.code,
    FailureClass.refused,
)
_OF_ENDING = {Ending.failed: FailureClass.code, Ending.interrupted: FailureClass.interrupted, Ending.refused: FailureClass.refused}


@dataclass(frozen=True)
class EndedAttempt:
    """An attempt that ended without a result."""

    started: float  # seconds since the epoch
    failure: FailureClass
    error: str  # in one line
    node: str = ""
    nodes_fault: bool = False  # Slurm says that the node failed, or there is evidence (jobs.control.faulty_nodes)
    progress: bool = False  # it left a newer checkpoint than it found
    short_of: Shortage = Shortage.none
    ended: float = 0.0  # seconds since the epoch; 0: not recorded
    suspects: tuple[str, ...] = ()  # nodes that may have caused a failure of communication, if not `node` alone
    launch: float = 0.0  # number of the last launch before it started; 0: not known, `started` decides
    evidence: bool = False  # of `nodes_fault`: it is due to evidence, not to what Slurm says


def judge_stages(graph: Graph, observed: Observation, context: PassContext) -> dict[str, StageFacts]:
    """Facts of every stage: what was read, and what follows from the ended attempts and jobs of those without a result."""
    facts = dict(observed.facts)
    ended = {
        key: ended_attempts(records.attempts, records.departures, records.newest_checkpoint, context.experiment)
        for key, records in observed.unfinished.items()
        if records.attempts
    }
    failed = {**observed.blamed, **{key: _blamed(attempts) for key, attempts in ended.items()}}
    faults = faulty_nodes(graph, failed, facts, context.since)
    never_began: dict[str, list[Departure]] = {}  # stages without any attempt -> jobs that ended before their worker began
    last_start = cache(partial(_last_start, graph, observed))
    for key, records in observed.unfinished.items():
        cancelled, settling = key in context.cancelled, key in context.settling
        if records is NO_RECORDS and not cancelled and not settling:
            continue  # never started
        parents = [facts[parent] for parent in graph.nodes[key].upstream.values()]
        unstarted = failed_starts(parents, records.unstarted, context.since)
        others = last_start(graph.nodes[key].stage) if len(unstarted) >= MAX_FAILED_STARTS else 0.0
        attempts = _attributed(ended.get(key, ()), graph.nodes[key], faults, context.since)
        facts[key] = _judged(records, attempts, unstarted, context, others, cancelled=cancelled, settling=settling)
        if unstarted and not facts[key].attempts:
            never_began[key] = unstarted
        if records.denied:
            facts[key] = replace(facts[key], error=records.denied, stopped=records.denied, failure=FailureClass.refused)
    if question := folder_question(itertools.chain(*never_began.values()), context.folder):
        for key in never_began:
            stopped = facts[key].stopped and facts[key].stopped + question
            facts[key] = replace(facts[key], error=facts[key].error + question, stopped=stopped)
    for key, messages in context.refusals(observed.unfinished).items():
        recent = [message for when, message in messages if when >= context.since]
        if recent:
            facts[key] = _refused(facts[key], recent)
    for key, blamed in observed.blamed.items():  # a node that failed is remembered although the stage was finished elsewhere
        after_launch = [each for each in blamed if in_launch(each.launch, each.started, context.since)]
        if after_launch:
            faulty = tuple(each.node for each in after_launch if each.error and fault_of(graph.nodes[key], each) in faults)
            died = tuple(each.node for each in after_launch if not each.error)
            facts[key] = replace(facts[key], bad_nodes=(*died, *faulty), faulty_nodes=faulty)
    return facts


def folder_question(never_began: Iterable[Departure], folder: str) -> str:
    """What to ask if several Slurm jobs ended before their worker began and no node is blamed: `folder` may be unknown to the nodes."""
    jobs = {each.job for each in never_began if is_slurm_job(each.job) and not blames_node(each.state)}
    return f"; can the nodes see {folder}? run `doctor`" if folder and len(jobs) >= UNSEEN_JOBS else ""


def blamed_nodes(records: StageRecords, experiment: str) -> tuple[Blamed, ...]:
    """The nodes that failed under ended attempts of a finished stage, or may have, oldest first; errors of the file system are over."""
    return _blamed(ended_attempts(records.attempts, records.departures, 0.0, experiment), NOT_RETRIED)


def _blamed(ended: Iterable[EndedAttempt], failures: Collection[FailureClass] = BLAMABLE) -> tuple[Blamed, ...]:
    return tuple(
        Blamed(each.node, each.started, each.launch, "" if each.nodes_fault else each.error)
        for each in ended
        if each.node and (each.nodes_fault or each.failure in failures)
    )


def _attributed(attempts: Sequence[EndedAttempt], node: Node, faults: Collection[Fault], since: float) -> list[EndedAttempt]:
    """The attempts of a stage, with failures of faulty nodes as such; of errors that are not retried only the first one."""
    if not faults:
        return list(attempts)
    found: list[EndedAttempt] = []
    again = False  # it has failed with such an error before
    for each in attempts:
        storage = each.failure is FailureClass.storage
        judged = each
        if each.failure in BLAMABLE and in_launch(each.launch, each.started, since):
            if (storage or not again) and fault_of(node, Blamed(each.node, each.started, each.launch, each.error)) in faults:
                judged = replace(each, nodes_fault=True, evidence=True, failure=each.failure if storage else FailureClass.node)
            again = again or not storage
        found.append(judged)
    return found


def decide(
    attempts: Sequence[EndedAttempt],
    *,
    since: float,
    max_attempts: int,
    failed_starts: Sequence[Departure] = (),
    last_start: float = 0.0,
    cancelled: bool = False,
) -> StageFacts:
    """Whether and how a stage without a result is retried, from its ended attempts, oldest first.

    Attempts started before `since` (the last launch) do not count, except that a training that diverged would do so again. An attempt whose
    predicted request was not enough costs nothing, and a launch does not reset that: from then on the stage requests what is configured, as
    it does after `DOUBTFUL_FAILED_STARTS` failed starts. `failed_starts`: jobs since the last launch, see the function of this name.
    `last_start`: when a worker last began a stage of the same name, seconds since the epoch; 0: not known; see `nodes_alone`.
    `cancelled`: by the user; an attempt ended by the user's scancel has the same effect.
    """
    diverged = next((each.error for each in reversed(attempts) if each.failure is FailureClass.divergence), "")
    after_launch = (each for each in attempts if in_launch(each.launch, each.started, since))
    recent = [each for each in after_launch if each.failure is not FailureClass.divergence]
    last = recent[-1] if recent else None
    charged = [each for each in recent if not each.short_of]  # the others are due to a prediction, which happens once
    counts = Counter(each.failure for each in charged)
    communication = [each for each in recent if each.failure is FailureClass.communication]
    exclude = {name for each in communication for name in each.suspects or (each.node,) if name}
    unusable = tuple(each.node for each in failed_starts if each.node)  # the results folder or the program may be missing there
    relief = min(counts[FailureClass.memory], MEMORY_RETRIES)
    short_of = Shortage.time | Shortage.memory if len(failed_starts) >= DOUBTFUL_FAILED_STARTS else Shortage.none
    for each in attempts:
        short_of |= each.short_of
    failure = last.failure if last else FailureClass.node if failed_starts else None
    return StageFacts(
        failures=sum(each.failure in COSTLY and not (each.failure is FailureClass.time_limit and each.progress) for each in charged),
        stopped=_reason_to_stop(charged, counts, failed_starts, max_attempts, last_start),
        error=diverged or (last.error if last else _failed_start_error(failed_starts)),
        failure=FailureClass.divergence if diverged else failure,
        diverged=diverged,
        cancelled=cancelled or any(each.failure is FailureClass.cancelled for each in recent),
        request=Request(relief, MEMORY_STEP**relief, tuple(sorted(exclude.union(unusable)))),
        bad_nodes=(*(each.node for each in recent if each.nodes_fault and each.node), *unusable),
        faulty_nodes=tuple(each.node for each in recent if each.evidence),
        short_of=short_of,
        not_before=_end_of_pause(recent),
    )


def _refused(facts: StageFacts, messages: Sequence[str]) -> StageFacts:
    """The facts of a stage whose request Slurm rejected since its last attempt."""
    error = (
        f"Slurm rejected its request {len(messages)} times: {messages[-1]}"
        if len(messages) > 1
        else f"Slurm rejected its request: {messages[0]}"
    )
    stopped = facts.stopped or (error if len(messages) >= MAX_REFUSALS else "")
    return replace(facts, error=error, failure=FailureClass.refused, stopped=stopped)


def ended_attempts(
    files: Sequence[AttemptFiles], departures: Sequence[Departure], newest_checkpoint: float, experiment: str = ""
) -> list[EndedAttempt]:
    """The attempts that have ended without a result, oldest first, each with its class of failure.

    An attempt without an outcome was killed, or its node failed. The Slurm state of its job tells which, unless a later attempt ran in the
    same job: then Slurm requeued it. A worker that was asked to stop cannot know whether its time limit was near: there too the state of
    the job decides if there is one (a preempted job gets the same warning). A job that the program withdrew was interrupted, not cancelled
    by its owner, although Slurm reports the same user for both. `newest_checkpoint`: seconds since the epoch. `experiment`: numbers of its
    launches are kept, another experiment's mean nothing to it.
    """
    of_job = {each.job: each for each in departures}
    withdrawn = {each.job for each in departures if each.withdrawn and cancelled_by_hand(each.state)}
    last_of_job = {attempt.job: attempt.number for attempt in files if attempt.job}
    claims = [attempt.claim for attempt in files]
    found: list[EndedAttempt] = []
    for place, attempt in enumerate(files):
        claim, outcome = attempt.claim, attempt.outcome
        if claim is None or attempt.published or (outcome is None and attempt.alive):
            continue
        if outcome is not None and outcome.error == SUPERSEDED:
            continue
        later = next((each.checkpoint for each in claims[place + 1 :] if each is not None), newest_checkpoint)
        requeued = bool(attempt.job) and last_of_job[attempt.job] != attempt.number
        left = of_job.get(attempt.job)
        state, asked = ("" if requeued or left is None else left.state), left.asked if left else None
        if outcome is None:
            ended = _without_outcome(claim, state, asked, requeued=requeued, withdrawn=attempt.job in withdrawn)
        else:
            ended = _with_outcome(claim, outcome, state, asked, requeued=requeued)
        launch = claim.launch if experiment and claim.experiment == experiment else 0.0
        found.append(replace(ended, progress=later > claim.checkpoint, launch=launch))
    return found


def failed_starts(parents: Collection[StageFacts], unstarted: Sequence[Departure], since: float) -> list[Departure]:
    """Jobs since the last launch that left the queue before the worker started, although everything upstream was done by then.

    Jobs cancelled by a user do not count. Nor do those that the program withdrew, unless Slurm could not start them: on a site where no job
    starts, submission stops after `MAX_FAILED_STARTS`.
    """
    if not all(parent.done for parent in parents):
        return []
    ready = max((parent.finished for parent in parents), default=0.0)
    return [
        each
        for each in unstarted
        if in_launch(each.launch, each.submitted, since)
        and (not each.withdrawn or blames_node(each.state))
        and not cancelled_by_hand(each.state)
        and each.gone > ready
    ]


def nodes_alone(unstarted: Sequence[Departure], last_start: float) -> int:
    """How many of these jobs ended before their worker began because of their node alone.

    Slurm names the node, which the stage avoids from then on, and a worker of a stage of the same name, which requests the same resources,
    has begun at `last_start` (seconds since the epoch), after the job was submitted.
    """
    return sum(bool(each.node or blames_node(each.state)) and each.submitted < last_start for each in unstarted)


def shortage(asked: Asked | None, failure: FailureClass, error: str, *, killed: bool = False, state_known: bool = True) -> Shortage:
    """What an attempt that ended so lacked because less was requested than configured.

    A worker that was `killed` for an unknown reason may have been killed for its memory: not every site reports that. If Slurm has not
    reported the state of its job at all, it may have reached its time limit.
    """
    if asked is None:
        return Shortage.none
    time = asked.less_time and (failure is FailureClass.time_limit or (killed and not state_known))
    memory = asked.less_memory and (killed or lacks_memory_of_host(failure, error))
    return (Shortage.time if time else Shortage.none) | (Shortage.memory if memory else Shortage.none)


def lacks_memory_of_host(failure: FailureClass, error: str) -> bool:
    """Whether memory ran out that is requested from Slurm: the memory of a GPU is not."""
    return failure is FailureClass.memory and _GPU.search(error) is None


def requested_bytes(departure: Departure) -> int:
    """Memory per node that a job requested, if that was less than configured; else 0."""
    return departure.asked.memory_mb << 20 if departure.asked and departure.asked.less_memory else 0


def _last_start(graph: Graph, observed: Observation, stage: str) -> float:
    """When a worker last began a stage of that name, in seconds since the epoch; 0: not known."""
    named = [key for key, node in graph.nodes.items() if node.stage == stage]
    finished = [fact.finished - fact.seconds for key in named if (fact := observed.facts.get(key)) and fact.done]
    records = (observed.unfinished.get(key, NO_RECORDS) for key in named)
    return max(finished + [attempt.claim.started for each in records for attempt in each.attempts if attempt.claim], default=0.0)


def _judged(
    records: StageRecords,
    ended: Sequence[EndedAttempt],
    unstarted: Sequence[Departure],
    context: PassContext,
    last_start: float,
    *,
    cancelled: bool,
    settling: bool,
) -> StageFacts:
    departures, attempts = records.departures, records.attempts
    cancelled = cancelled or any(_cancelled_by_owner(each, context.since) for each in departures)
    facts = decide(
        ended,
        since=context.since,
        max_attempts=context.max_attempts,
        failed_starts=unstarted,
        last_start=last_start,
        cancelled=cancelled,
    )
    running = next((holder(attempt.claim) for attempt in attempts if attempt.alive and attempt.claim), "")
    last = next((each.job for each in reversed(departures) if not each.withdrawn or blames_node(each.state)), "") if settling else ""
    unsettled = sum(attempt.job == last for attempt in attempts) if last else 0  # reported once Slurm has given the end of the job
    no_outcome = (attempt for attempt in attempts if not (attempt.outcome or attempt.alive or attempt.published))
    short_of_memory = any(each.short_of is Shortage.memory for each in ended)
    return replace(
        facts,
        executed_by=running,
        settling=settling,
        attempts=len(attempts),
        ended=max(0, len(ended) - unsettled),
        lost_jobs=tuple(sorted({attempt.job for attempt in no_outcome if attempt.job})),
        all_seconds=records.seconds,
        memory=max((requested_bytes(each) for each in departures), default=0) if short_of_memory else 0,
    )


def _cancelled_by_owner(departure: Departure, since: float) -> bool:
    """Whether the owner cancelled an element after the launch at `since`; holds until the next launch, whatever departs later."""
    end = departure.gone if departure.ended is None else departure.ended  # a pass may miss it long after it was cancelled
    return end >= since and not departure.withdrawn and cancelled_by_hand(departure.state)


def _reason_to_stop(
    recent: Sequence[EndedAttempt], counts: Counter[FailureClass], unstarted: Sequence[Departure], max_attempts: int, last_start: float
) -> str:
    """Why the stage is not retried; "" if it is."""
    last = recent[-1] if recent else None
    if last is not None and last.failure in NOT_RETRIED:
        return last.error
    for failure, retries, what in (
        (FailureClass.memory, MEMORY_RETRIES, "memory ran out {} times, the last time with a quarter of the work per pass"),
        (FailureClass.communication, COMMUNICATION_RETRIES, "{} attempts failed in communication"),
        (FailureClass.disk, DISK_RETRIES, "its artifacts, or those upstream of it, were damaged {} times: check the disk"),
    ):
        if counts[failure] > retries:
            return what.format(counts[failure])
    if counts[FailureClass.time_limit] >= 2 and last is not None and last.failure is FailureClass.time_limit and not last.progress:
        return "two attempts ended at the time limit and the last one left no newer checkpoint: request more `minutes`"
    free = (FailureClass.node, FailureClass.interrupted, FailureClass.crowded)
    stalled = len(list(itertools.takewhile(lambda each: each.failure in free and not each.progress, reversed(recent))))
    if stalled > MAX_LOST:
        return f"{counted(stalled, 'attempt')} in a row were lost or interrupted without a newer checkpoint"
    if _storage_failures(recent) > STORAGE_RETRIES:
        return f"the file system failed under {counted(_storage_failures(recent), 'attempt')} without a newer checkpoint"
    if len(unstarted) - nodes_alone(unstarted, last_start) >= MAX_FAILED_STARTS or len(unstarted) >= max(MAX_FAILED_STARTS, max_attempts):
        return _failed_start_error(unstarted)
    fruitless = sum(not each.progress and each.failure is not FailureClass.storage for each in recent)
    return f"{counted(fruitless, 'attempt')} left no newer checkpoint (policy.max_attempts)" if fruitless >= max_attempts else ""


def _storage_failures(recent: Sequence[EndedAttempt]) -> int:
    """How many attempts the file system failed under since the last one that left a newer checkpoint."""
    without_progress = itertools.takewhile(lambda each: not each.progress, reversed(recent))
    return sum(each.failure is FailureClass.storage for each in without_progress)


def _end_of_pause(recent: Sequence[EndedAttempt]) -> float:
    """The earliest time of the next attempt (seconds since the epoch) if the file system failed under the last one; else 0."""
    if not recent or recent[-1].failure is not FailureClass.storage:
        return 0.0
    repeated = max(1, _storage_failures(recent))
    return recent[-1].ended + min(STORAGE_SECONDS * 2.0 ** (repeated - 1), LONGEST_PAUSE)


def _failed_start_error(unstarted: Sequence[Departure]) -> str:
    if not unstarted:
        return ""
    state = f", Slurm says {unstarted[-1].state}" if unstarted[-1].state else ""
    return f"{counted(len(unstarted), 'job')} ended before the worker began (last {unstarted[-1].job}{state})"


def _with_outcome(claim: Claim, outcome: Outcome, state: str, asked: Asked | None, *, requeued: bool) -> EndedAttempt:
    failure = FailureClass[outcome.kind] if outcome.kind in FailureClass.__members__ else _OF_ENDING[outcome.ending]
    job_failure = class_of_state(state)
    if failure in (FailureClass.interrupted, FailureClass.time_limit):
        if requeued or state == "PREEMPTED":  # Slurm does not requeue a job that has reached its time limit
            failure = FailureClass.interrupted
        elif job_failure is FailureClass.time_limit:
            failure = job_failure
    elif failure is FailureClass.communication and job_failure is FailureClass.memory:
        failure = FailureClass.memory  # another process of its group was killed for its memory
    error = f"{outcome.error}: {outcome.message}"
    suspects = (outcome.node,) if outcome.node else tuple(filter(None, claim.team.split(",")))
    short_of = shortage(asked, failure, error)
    ended = claim.started + outcome.seconds
    return EndedAttempt(claim.started, failure, error, claim.node, short_of=short_of, ended=ended, suspects=suspects)


def _without_outcome(claim: Claim, state: str, asked: Asked | None, *, requeued: bool, withdrawn: bool) -> EndedAttempt:
    failure = FailureClass.node if requeued else FailureClass.interrupted if withdrawn else class_of_state(state)
    reason = f"Slurm says {state}" if state else "its job was requeued" if requeued else "nothing is known of its job"
    error = f"ended without an outcome on {claim.node or claim.host} ({reason})"
    nodes_fault = requeued or blames_node(state)
    killed = failure is FailureClass.node and not nodes_fault and state != "PREEMPTED"
    short_of = shortage(asked, failure, error, killed=killed, state_known=bool(state))
    return EndedAttempt(claim.started, failure, error, claim.node, nodes_fault, short_of=short_of)
