"""Failure policy: from the ended attempts of a stage to retry, escalate, exclude or give up. Pure; the table is in docs/failures.md."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.control.facts import Asked, Departure, NodeFacts, Request
from jobs.experiment.graph import Graph
from jobs.store.attempts import SUPERSEDED, AttemptFiles
from jobs.store.failures import FailureClass, blames_node, cancelled_by_hand, class_of_state
from jobs.store.records import Ending

MAX_LOST = 5  # attempts in a row that may end by interruption or without a word and without a newer checkpoint
MAX_SILENT = 4  # jobs of a stage that may leave the queue, everything upstream of it done, before the worker begins
DOUBTFUL_SILENT = 2  # of them, after which it may have been a predicted request: a start that takes longer than any before
MEMORY_RETRIES = 2
MEMORY_STEP = 1.5  # on the memory asked for, each time
COMMUNICATION_RETRIES = 3
DISK_RETRIES = 2
_GPU = re.compile(r"CUDA|\bHIP\b|OutOfMemoryError")
COSTLY = (
    FailureClass.time_limit,
    FailureClass.memory,
    FailureClass.communication,
    FailureClass.disk,
    FailureClass.code,
    FailureClass.refused,
)
_OF_ENDING = {
    Ending.failed: FailureClass.code,
    Ending.interrupted: FailureClass.interrupted,
    Ending.refused: FailureClass.refused,
}


@dataclass(frozen=True)
class Ended:
    """An attempt that has no result and is over."""

    started: float  # seconds since the epoch
    failure: FailureClass
    error: str  # in one line
    node: str = ""
    nodes_fault: bool = False  # Slurm blames the node
    progress: bool = False  # it left a newer checkpoint than it found
    short_of: str = ""  # `time`, `memory` or `time or memory`, predicted from siblings, less than configured, and not enough
    suspects: tuple[str, ...] = ()  # machines that a failure of communication may be due to, where that is not `node` alone


def short_of(asked: Asked | None, failure: FailureClass, error: str, *, killed: bool = False, told: bool = True) -> str:
    """What an attempt that ended so was short of because less was asked for than configured: `time`, `memory`, `time or memory` or nothing.

    A worker that was `killed`, nobody says why, may have been killed for its memory: not every site tells. Where Slurm has not `told` at
    all how its job ended, it may have been for its time.
    """
    if asked is None:
        return ""
    time = failure is FailureClass.time_limit or (killed and not told)
    memory = killed or lacks_memory_of_host(failure, error)
    return " or ".join([*(["time"] if time and asked.less_time else []), *(["memory"] if memory and asked.less_memory else [])])


def lacks_memory_of_host(failure: FailureClass, error: str) -> bool:
    """Whether memory ran out that is asked of Slurm: that of a GPU is not."""
    return failure is FailureClass.memory and _GPU.search(error) is None


def judge(
    attempts: Sequence[Ended],
    *,
    since: float,
    max_attempts: int,
    silent: Sequence[Departure] = (),
    cancelled: bool = False,
) -> NodeFacts:
    """What is to become of a stage without a result, from its attempts that are over, oldest first.

    Attempts begun before `since` (the last launch by hand) are forgiven, except that a training that diverged would do so again.
    What a prediction had made too short costs nothing, and is not forgotten by a launch: from then on it is as configured. So is it after
    `DOUBTFUL_SILENT` silent jobs, whatever ended them.
    `silent`: jobs submitted since then that left the queue before the worker began although everything upstream was done, and that no user
    cancelled. `cancelled`: by the user; an attempt that the user's scancel ended says the same.
    """
    diverged = next((each.error for each in reversed(attempts) if each.failure is FailureClass.divergence), "")
    recent = [each for each in attempts if each.started >= since and each.failure is not FailureClass.divergence]
    last = recent[-1] if recent else None
    charged = [each for each in recent if not each.short_of]  # the others are the prediction's fault, and happen once
    counts = Counter(each.failure for each in charged)
    by_hand = cancelled or any(each.failure is FailureClass.cancelled for each in recent)
    stopped = _reason_to_stop(charged, counts, silent, max_attempts)
    blamed = [each.node for each in recent if each.nodes_fault and each.node]
    cut_off = [each for each in recent if each.failure is FailureClass.communication]
    apart = {name for each in cut_off for name in each.suspects or (each.node,) if name}
    memory = min(counts[FailureClass.memory], MEMORY_RETRIES)
    doubtful = len(silent) >= DOUBTFUL_SILENT
    return NodeFacts(
        failures=sum(each.failure in COSTLY and not (each.failure is FailureClass.time_limit and each.progress) for each in charged),
        stopped=stopped,
        error=diverged or (last.error if last else _silent_error(silent)),
        failure=FailureClass.divergence.name if diverged else last.failure.name if last else FailureClass.node.name if silent else "",
        diverged=diverged,
        cancelled=by_hand,
        request=Request(memory, MEMORY_STEP**memory, tuple(sorted(apart))),
        bad_nodes=tuple(blamed),
        short_of_time=doubtful or any("time" in each.short_of for each in attempts),
        short_of_memory=doubtful or any("memory" in each.short_of for each in attempts),
    )


def _reason_to_stop(recent: Sequence[Ended], counts: Counter[FailureClass], silent: Sequence[Departure], max_attempts: int) -> str:
    """Why nothing more is tried by itself; "" while there is something to try."""
    last = recent[-1] if recent else None
    if last is not None and last.failure in (FailureClass.code, FailureClass.refused):
        return last.error
    for failure, retries, what in (
        (FailureClass.memory, MEMORY_RETRIES, "memory ran out {} times, at last with a quarter of the work per pass"),
        (FailureClass.communication, COMMUNICATION_RETRIES, "{} attempts failed in communication"),
        (FailureClass.disk, DISK_RETRIES, "{} attempts found the disk full: make room"),
    ):
        if counts[failure] > retries:
            return what.format(counts[failure])
    if counts[FailureClass.time_limit] >= 2 and last is not None and last.failure is FailureClass.time_limit and not last.progress:
        return "two attempts ended at the time limit and the last one left no newer checkpoint: ask for more `minutes`"
    free = (FailureClass.node, FailureClass.interrupted, FailureClass.crowded)
    stalled = len(list(itertools.takewhile(lambda each: each.failure in free and not each.progress, reversed(recent))))
    if stalled > MAX_LOST:
        return f"{stalled} attempts in a row were lost or interrupted without a newer checkpoint"
    if len(silent) >= MAX_SILENT:
        return _silent_error(silent)
    fruitless = sum(not each.progress for each in recent)
    return f"{fruitless} attempts brought it no further (policy.max_attempts)" if fruitless >= max_attempts else ""


def _silent_error(silent: Sequence[Departure]) -> str:
    if not silent:
        return ""
    state = f", Slurm says {silent[-1].state}" if silent[-1].state else ""
    return f"{len(silent)} jobs ended before the worker began (last {silent[-1].job}{state})"


def ended_attempts(files: Sequence[AttemptFiles], departures: Sequence[Departure], newest_checkpoint: float) -> list[Ended]:
    """The attempts that are over, oldest first, each with its class. Pure.

    An attempt without a last word was killed, or its machine was; Slurm's state of its job says which, unless a later attempt ran under
    the same job: then Slurm had it requeued. A worker that was asked to stop cannot know whether its time was up: there too Slurm's word
    counts, as far as there is one (a preempted job gets the same warning). A job that the program withdrew itself was interrupted, not
    cancelled by its owner, although Slurm names the same user for both.
    """
    ours = {each.job for each in departures if each.ours and cancelled_by_hand(each.state)}
    states = {each.job: each.state for each in departures}
    asked = {each.job: each.asked for each in departures}
    last_of_job = {attempt.job: attempt.number for attempt in files if attempt.job}
    claims = [attempt.claim for attempt in files]
    found: list[Ended] = []
    for place, attempt in enumerate(files):
        claim, outcome = attempt.claim, attempt.outcome
        if claim is None or attempt.published or (outcome is None and attempt.alive):
            continue
        if outcome is not None and outcome.error == SUPERSEDED:
            continue
        later = next((each.checkpoint for each in claims[place + 1 :] if each is not None), newest_checkpoint)
        progress = later > claim.checkpoint
        requeued = bool(attempt.job) and last_of_job[attempt.job] != attempt.number
        state = "" if requeued else states.get(attempt.job, "")
        if outcome is not None:
            failure = FailureClass[outcome.kind] if outcome.kind in FailureClass.__members__ else _OF_ENDING[outcome.ending]
            if failure in (FailureClass.interrupted, FailureClass.time_limit):
                failure = _why_asked_to_stop(failure, state, requeued)
            error = f"{outcome.error}: {outcome.message}"
            if failure is FailureClass.communication and class_of_state(state) is FailureClass.memory:
                failure = FailureClass.memory  # the process of a team that was lost was killed for it
            suspects = (outcome.node,) if outcome.node else tuple(filter(None, claim.team.split(",")))
            short = short_of(asked.get(attempt.job), failure, error)
            found.append(Ended(claim.started, failure, error, claim.node, progress=progress, short_of=short, suspects=suspects))
            continue
        failure = class_of_state(state)
        if requeued:
            failure = FailureClass.node
        elif attempt.job in ours:
            failure = FailureClass.interrupted
        said = f"Slurm says {state}" if state else "its job was requeued" if requeued else "nothing is known of its job"
        error = f"ended without a word on {claim.node or claim.host} ({said})"
        nodes_fault = requeued or blames_node(state)
        killed = failure is FailureClass.node and not nodes_fault and state != "PREEMPTED"
        short = short_of(asked.get(attempt.job), failure, error, killed=killed, told=bool(state))
        found.append(Ended(claim.started, failure, error, claim.node, nodes_fault, progress, short))
    return found


def _why_asked_to_stop(said: FailureClass, state: str, requeued: bool) -> FailureClass:
    if requeued or state == "PREEMPTED":  # what ends at its limit is not begun again by Slurm
        return FailureClass.interrupted
    return FailureClass.time_limit if class_of_state(state) is FailureClass.time_limit else said


def asked_bytes(departure: Departure) -> int:
    """Memory per node that a job asked for, where it was less than configured; else 0."""
    return departure.asked.memory_mb << 20 if departure.asked and departure.asked.less_memory else 0


def silent_departures(
    graph: Graph, key: str, facts: Mapping[str, NodeFacts], unbegun: Sequence[Departure], since: float
) -> list[Departure]:
    """Jobs that left the queue before the worker began, although everything upstream was there by then.

    What the program withdrew itself is none of them, unless Slurm could not start it: a site where nothing starts is not asked for ever.
    """
    parents = [facts[parent] for parent in graph.nodes[key].upstream.values()]
    if not all(parent.done for parent in parents):
        return []
    ready = max((parent.finished for parent in parents), default=0.0)
    return [
        each
        for each in unbegun
        if each.submitted >= since
        and (not each.ours or blames_node(each.state))
        and not cancelled_by_hand(each.state)
        and each.gone > ready
    ]
