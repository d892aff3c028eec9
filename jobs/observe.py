"""What the files say of every stage: the only reader of results and attempts that the planner relies on.

One listing per stage name finds the stages that were ever begun; a finished one costs one look at its file, and a reading of it if that is
new (jobs.index).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs.cancellations import Cancelled
from jobs.failures import Ended, FailureClass, blames_node, cancelled_by_hand, class_of_state, judge, short_of
from jobs.graph import Graph
from jobs.index import index_of
from jobs.layout import Layout, StageFolder
from jobs.liveness import claim_alive, is_slurms
from jobs.plan import Departure, NodeFacts, needed_keys
from jobs.records import Claim, Ending, Outcome, artifacts_present, attempt_numbers, read_claim, read_outcome, read_result

UNKNOWN = NodeFacts()
# A job of an earlier launch that its owner cancels counts as cancelled when it is missed this much later than the launch: what is missed
# sooner may have been cancelled just before it, and launching lifts that.
RELAUNCH_SECONDS = 600.0
SUPERSEDED = "Superseded"  # error of an outcome that another attempt's result made pointless
_OF_ENDING = {
    Ending.failed: FailureClass.code,
    Ending.interrupted: FailureClass.interrupted,
    Ending.refused: FailureClass.refused,
}


@dataclass(frozen=True)
class Sight:
    """What is known beside the files of the store, and from when on failures count."""

    since: float = 0.0  # seconds since the epoch: launching again is how a user says "try again"
    max_attempts: int = 12
    live_jobs: Collection[str] | None = None  # all jobs in Slurm's queue; None where it was not asked
    departures: Callable[[Collection[str]], Mapping[str, Sequence[Departure]]] = lambda keys: {}
    settling: Collection[str] = frozenset()  # stages whose job has left the queue, and Slurm is still asked how
    cancelled: Cancelled = field(default_factory=Cancelled)
    clock: Callable[[], float] = time.time


@dataclass(frozen=True)
class AttemptFiles:
    """What one attempt has left, as far as it has."""

    number: int
    claim: Claim | None
    outcome: Outcome | None
    alive: bool
    published: bool = False  # the stage's result is of this attempt

    @property
    def job(self) -> str:
        return self.claim.slurm_job if self.claim else ""


def read_facts(
    graph: Graph,
    layout: Layout,
    sight: Sight | None = None,
    *,
    keys: Iterable[str] | None = None,
    known: Mapping[str, NodeFacts] | None = None,
) -> dict[str, NodeFacts]:
    """Facts of every stage of the graph.

    With `keys`, only those are read again and the rest is taken from `known`. Artifacts are looked for where a stage still to be
    computed reads them: a finished run counts even if its weights were removed.
    """
    sight = sight or Sight()
    facts = dict(known or {})
    folders = {stage: layout.stage(stage, "_").path.parent for stage in {node.stage for node in graph.nodes.values()}}
    begun = {stage: _names(folder) for stage, folder in folders.items()}
    wanted = list(graph.nodes if keys is None else keys)
    index = index_of(layout)
    for key in wanted:
        stage = graph.nodes[key].stage
        facts[key] = (index.facts(key, f"{folders[stage]}/{key}") if key in begun[stage] else None) or UNKNOWN
    damaged = _discount_missing_artifacts(graph, layout, facts)
    undone = [key for key in dict.fromkeys([*wanted, *damaged]) if not facts[key].done]
    retried = [key for key in wanted if facts[key].done and facts[key].attempts > 1 and facts[key].finished >= sight.since]
    asked = [*undone, *retried]
    departures = sight.departures(asked) if asked else {}
    read = [*(key for key in undone if key in begun[graph.nodes[key].stage]), *retried]
    left = {key: frozenset(each.job for each in departures.get(key, ())) for key in read}
    files = {key: _read_attempts(layout.stage(graph.nodes[key].stage, key), sight, left[key]) for key in read}
    begun_jobs = {attempt.job for attempts in files.values() for attempt in attempts if attempt.job}
    unbegun = {key: [each for each in departures.get(key, ()) if each.job not in begun_jobs] for key in undone}
    silent = {key: _silent(graph, key, facts, unbegun[key], sight.since) for key in undone}
    suspects = {each.job for found in silent.values() for each in found}
    if suspects:
        suspects -= _begun_by_finished(graph, layout, sight, facts, suspects)
    for key in undone:
        folder = layout.stage(graph.nodes[key].stage, key)
        wordless = [each for each in silent[key] if each.job in suspects]
        facts[key] = _judged(key, folder, files.get(key, ()), departures.get(key, ()), wordless, sight)
    for key in retried:  # a machine that failed is remembered although what it failed was done elsewhere
        ended = ended_attempts(files[key], departures.get(key, ()), 0.0)
        bad_nodes = tuple(each.node for each in ended if each.nodes_fault and each.node and each.started >= sight.since)
        facts[key] = replace(facts[key], bad_nodes=bad_nodes)
    return facts


def ended_attempts(files: Sequence[AttemptFiles], departures: Sequence[Departure], newest_checkpoint: float) -> list[Ended]:
    """The attempts that are over, oldest first, each with its class. Pure.

    An attempt without a last word was killed, or its machine was; Slurm's state of its job says which, unless a later attempt ran under
    the same job: then Slurm had it requeued. A worker that was asked to stop cannot know whether its time was up: there too Slurm's word
    counts, as far as there is one (a preempted job gets the same warning).
    """
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
        failure = FailureClass.node if requeued else class_of_state(state)
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


def holder(claim: Claim) -> str:
    """Who executes an attempt, in words."""
    return f"Slurm job {claim.slurm_job}" if is_slurms(claim.slurm_job) else f"process {claim.pid} on {claim.host}"


def read_attempts(folder: StageFolder, sight: Sight) -> tuple[AttemptFiles, ...]:
    """Every attempt that has a claim, oldest first."""
    return tuple(_read_attempts(folder, sight))


def newest_checkpoint(folder: StageFolder) -> float:
    """When complete resumable state was last written, seconds since the epoch; 0 if there is none."""
    try:
        with os.scandir(folder.checkpoint) as entries:
            return max((entry.stat().st_mtime for entry in entries if not entry.name.startswith(".")), default=0.0)
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def _read_attempts(folder: StageFolder, sight: Sight, gone: Collection[str] = ()) -> list[AttemptFiles]:
    """`gone`: jobs that are known to have ended, for whom the queue cannot be asked."""
    result = read_result_number(folder)
    found: list[AttemptFiles] = []
    for number in attempt_numbers(folder):
        attempt = folder.attempt(number)
        claim, outcome = read_claim(attempt), read_outcome(attempt)
        if claim is None:
            continue
        over = outcome is not None or number == result
        alive = not over and claim_alive(claim, _modified(attempt.claim), live_jobs=sight.live_jobs, now=sight.clock(), gone=gone)
        found.append(AttemptFiles(number, claim, outcome, alive, number == result))
    last_of_job = {attempt.job: attempt.number for attempt in found if attempt.job}
    # Slurm ends one execution of a job before it begins the next: what runs under the number of a requeued job is the last attempt.
    return [replace(each, alive=each.alive and last_of_job.get(each.job, each.number) == each.number) for each in found]


def read_result_number(folder: StageFolder) -> int:
    """The attempt that a result of this folder names, even one whose artifacts are gone; 0 if there is none."""
    result = read_result(folder, folder.path.name)
    return result.attempt if result else 0


def _judged(
    key: str,
    folder: StageFolder,
    files: Sequence[AttemptFiles],
    departures: Sequence[Departure],
    silent: Sequence[Departure],
    sight: Sight,
) -> NodeFacts:
    recent = [each for each in departures if each.submitted >= sight.since]
    late = [each for each in departures if each.submitted < sight.since and each.gone >= sight.since + RELAUNCH_SECONDS]
    last = (recent or late)[-1:]
    by_hand = any(cancelled_by_hand(each.state) and not each.ours for each in last)
    ended = ended_attempts(files, departures, newest_checkpoint(folder) if files else 0.0)
    facts = judge(ended, since=sight.since, max_attempts=sight.max_attempts, silent=silent, cancelled=by_hand or key in sight.cancelled)
    held = next((holder(attempt.claim) for attempt in files if attempt.alive and attempt.claim), "")
    told = sum(attempt.job == departures[-1].job for attempt in files) if departures and key in sight.settling else 0
    if key in sight.settling and not held:
        held = "Slurm, until it says how the last job ended"
    wordless = (attempt for attempt in files if not (attempt.outcome or attempt.alive or attempt.published))
    gone = tuple(sorted({attempt.job for attempt in wordless if attempt.job}))
    begun = [(each.claim, _lasted(folder, each)) for each in files if each.claim]
    return replace(
        facts,
        held=held,
        attempts=len(files),
        ended=max(0, len(ended) - told),
        gone=gone,
        all_seconds=seconds_since_begun_anew(begun),
        memory=max((_asked_bytes(each) for each in departures), default=0) if any(each.short_of == "memory" for each in ended) else 0,
    )


def seconds_since_begun_anew(attempts: Sequence[tuple[Claim, float]]) -> float:
    """What the last attempt that found no checkpoint, and all after it, took together; 0 if there is none. `attempts`: oldest first."""
    total = 0.0
    for claim, seconds in reversed(attempts):
        total += seconds
        if not claim.checkpoint:
            break
    return round(total, 3)


def seconds_before(folder: StageFolder, number: int) -> float:
    """What earlier attempts took on the way to the checkpoint that this one found; 0 if it began anew."""
    claims = {each: claim for each in attempt_numbers(folder) if each <= number and (claim := read_claim(folder.attempt(each)))}
    if number not in claims or not claims[number].checkpoint:
        return 0.0
    files = (AttemptFiles(each, claim, read_outcome(folder.attempt(each)), False) for each, claim in claims.items() if each < number)
    return seconds_since_begun_anew([(each.claim, _lasted(folder, each)) for each in files if each.claim])


def _lasted(folder: StageFolder, attempt: AttemptFiles) -> float:
    """Seconds that an attempt took, as its end or its last heartbeat tells."""
    if attempt.outcome is not None or attempt.claim is None:
        return attempt.outcome.seconds if attempt.outcome else 0.0
    return max(0.0, _modified(folder.attempt(attempt.number).claim) - attempt.claim.started)


def _asked_bytes(departure: Departure) -> int:
    return departure.asked.memory_mb << 20 if departure.asked and departure.asked.less_memory else 0


def _begun_by_finished(graph: Graph, layout: Layout, sight: Sight, facts: Mapping[str, NodeFacts], jobs: Collection[str]) -> set[str]:
    """Of some jobs, those in which a stage began that is finished by now: what else they held did not get its turn."""
    found: set[str] = set()
    for key, departures in sight.departures([key for key in graph.nodes if facts[key].done]).items():
        if any(each.job in jobs for each in departures):
            attempts = _read_attempts(layout.stage(graph.nodes[key].stage, key), sight)
            found.update(attempt.job for attempt in attempts if attempt.job)
    return found


def _silent(graph: Graph, key: str, facts: Mapping[str, NodeFacts], unbegun: Sequence[Departure], since: float) -> list[Departure]:
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


def _discount_missing_artifacts(graph: Graph, layout: Layout, facts: dict[str, NodeFacts]) -> set[str]:
    """Finished stages whose artifacts are gone are not finished for those who still have to read them; returns their keys."""
    checked: set[str] = set()
    damaged: set[str] = set()
    while True:
        undone = [key for key in needed_keys(graph, facts) if not (key in facts and facts[key].done)]
        read = {parent for key in undone for parent in graph.nodes[key].upstream.values() if facts[parent].done} - checked
        if not read:
            return damaged
        checked |= read
        for key in read:
            folder = layout.stage(graph.nodes[key].stage, key)
            result = read_result(folder, key)
            if result is None or not artifacts_present(folder, result):
                facts[key] = NodeFacts()
                damaged.add(key)


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0
