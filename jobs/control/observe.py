"""What the files say of every stage: the only reader of results and attempts that the planner relies on.

One listing per stage name finds the stages that were ever begun; a finished one costs one look at its file, and a reading of it if that is
new (jobs.control.result_index).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs.control.facts import Departure, NodeFacts
from jobs.control.failure_policy import asked_bytes, ended_attempts, judge, silent_departures
from jobs.control.plan import needed_keys
from jobs.control.result_index import index_of
from jobs.experiment.graph import Graph
from jobs.store.attempts import AttemptFiles, attempt_seconds, claim_alive, holder, modified_at, newest_checkpoint, seconds_since_restart
from jobs.store.cancellations import Cancelled
from jobs.store.failures import blames_node, cancelled_by_hand
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import artifacts_present, attempt_numbers, read_claim, read_outcome, read_result

UNKNOWN = NodeFacts()
# A job of an earlier launch that its owner cancels counts as cancelled when it is missed this much later than the launch: what is missed
# sooner may have been cancelled just before it, and launching lifts that.
RELAUNCH_SECONDS = 600.0


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
    silent = {key: silent_departures(graph, key, facts, unbegun[key], sight.since) for key in undone}
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


def read_attempts(folder: StageFolder, sight: Sight) -> tuple[AttemptFiles, ...]:
    """Every attempt that has a claim, oldest first."""
    return tuple(_read_attempts(folder, sight))


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
        alive = not over and claim_alive(claim, modified_at(attempt.claim), live_jobs=sight.live_jobs, now=sight.clock(), gone=gone)
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
    by_hand = any(_cancelled_by_owner(each, sight.since) for each in departures)
    ended = ended_attempts(files, departures, newest_checkpoint(folder) if files else 0.0)
    facts = judge(ended, since=sight.since, max_attempts=sight.max_attempts, silent=silent, cancelled=by_hand or key in sight.cancelled)
    held = next((holder(attempt.claim) for attempt in files if attempt.alive and attempt.claim), "")
    asked = [each.job for each in departures if not each.ours or blames_node(each.state)][-1:] if key in sight.settling else []
    told = sum(attempt.job in asked for attempt in files)
    if key in sight.settling and not held:
        held = "Slurm, until it says how the last job ended"
    wordless = (attempt for attempt in files if not (attempt.outcome or attempt.alive or attempt.published))
    gone = tuple(sorted({attempt.job for attempt in wordless if attempt.job}))
    begun = [(each.claim, attempt_seconds(folder, each)) for each in files if each.claim]
    return replace(
        facts,
        held=held,
        attempts=len(files),
        ended=max(0, len(ended) - told),
        gone=gone,
        all_seconds=seconds_since_restart(begun),
        memory=max((asked_bytes(each) for each in departures), default=0) if any(each.short_of == "memory" for each in ended) else 0,
    )


def _cancelled_by_owner(departure: Departure, since: float) -> bool:
    """Whether the owner cancelled an element after the launch at `since`; holds until the next launch, whatever departs later."""
    after = departure.submitted >= since or departure.gone >= since + RELAUNCH_SECONDS
    return after and not departure.ours and cancelled_by_hand(departure.state)


def _begun_by_finished(graph: Graph, layout: Layout, sight: Sight, facts: Mapping[str, NodeFacts], jobs: Collection[str]) -> set[str]:
    """Of some jobs, those in which a stage began that is finished by now: what else they held did not get its turn."""
    found: set[str] = set()
    for key, departures in sight.departures([key for key in graph.nodes if facts[key].done]).items():
        if any(each.job in jobs for each in departures):
            attempts = _read_attempts(layout.stage(graph.nodes[key].stage, key), sight)
            found.update(attempt.job for attempt in attempts if attempt.job)
    return found


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
