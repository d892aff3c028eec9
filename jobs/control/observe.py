"""Reads what the store and the executor record of every stage. Judges nothing: that is jobs.control.failure_policy.

One directory listing per stage name finds the stages that were ever started. A finished stage costs one `stat` of its result, which is read
only if it is new (jobs.control.result_index); attempts are read of stages without a result, and of those that needed several.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs.control.facts import Blamed, Departure, StageFacts, needed_keys
from jobs.control.result_index import index_of
from jobs.experiment.graph import Graph
from jobs.store.access import denied_line
from jobs.store.attempts import (
    AttemptFiles,
    attempt_seconds,
    claim_alive,
    modified_at,
    newest_checkpoint,
    own_cluster,
    seconds_since_restart,
)
from jobs.store.cancellations import Cancelled
from jobs.store.launches import in_launch
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import artifacts_present, attempt_numbers, read_claim, read_outcome, read_result

BLANK = StageFacts()


@dataclass(frozen=True)
class PassContext:
    """What a pass knows beside the records of the store: the queue, the last launch, cancellations, and a limit of the policy."""

    since: float = 0.0  # time of the last launch, seconds since the epoch: only failures after it count
    max_attempts: int = 12
    live_jobs: Collection[str] | None = None  # this user's jobs in Slurm's queue; None if it was not read
    cluster: Callable[[], str] = own_cluster  # Slurm's name of the cluster with that queue; "": not known
    departures: Callable[[Collection[str]], Mapping[str, Sequence[Departure]]] = lambda keys: {}
    refusals: Callable[[Collection[str]], Mapping[str, Sequence[tuple[float, str]]]] = lambda keys: {}  # time and message of each
    settling: Collection[str] = frozenset()  # keys of stages whose last job has left the queue, its end not known yet
    cancelled: Cancelled = field(default_factory=Cancelled)
    clock: Callable[[], float] = time.time
    experiment: str = ""  # numbers of launches are its own
    folder: str = ""  # of the results, for messages


@dataclass(frozen=True)
class StageRecords:
    """The records of one stage, its result aside."""

    attempts: tuple[AttemptFiles, ...] = ()  # that have a claim, oldest first
    departures: tuple[Departure, ...] = ()  # jobs that have left the queue, oldest first
    unstarted: tuple[Departure, ...] = ()  # of them, those in which no stage was started
    newest_checkpoint: float = 0.0  # seconds since the epoch; 0: none
    seconds: float = 0.0  # of all attempts since the last start without a checkpoint
    denied: str = ""  # why its files cannot be read: path and owner; "": they can


NO_RECORDS = StageRecords()


@dataclass(frozen=True)
class Observation:
    """What a pass has read."""

    facts: Mapping[str, StageFacts]  # of every stage; of one that was read and has no result: blank
    unfinished: Mapping[str, StageRecords]  # of the stages that were read and have no result
    blamed: Mapping[str, tuple[Blamed, ...]]  # of those that were read and got their result by a later attempt, since the last launch


def observe(
    graph: Graph,
    layout: Layout,
    context: PassContext,
    *,
    keys: Iterable[str] | None = None,
    known: Mapping[str, StageFacts] | None = None,
    blame: Callable[[StageRecords, str], tuple[Blamed, ...]] = lambda records, experiment: (),
) -> Observation:
    """Read the results of all stages, and the attempts and jobs of those that are not done or needed several attempts.

    With `keys`, only those are read and the facts of the others are taken from `known`. Artifacts are checked where a stage still to be
    computed reads them: a finished run counts even if its weights were removed. `blame`: the nodes that failed under the attempts of a
    finished stage, from its records and the name of the experiment; asked again only if a job of it has ended since.
    """
    facts = dict(known or {})
    folders = {stage: layout.stage(stage, "_").path.parent for stage in {node.stage for node in graph.nodes.values()}}
    started = {stage: _names(folder) for stage, folder in folders.items()}
    wanted = list(graph.nodes if keys is None else keys)
    index = index_of(layout, graph.score)
    denied: dict[str, str] = {}
    for key in wanted:
        stage = graph.nodes[key].stage
        try:
            facts[key] = (index.facts(key, f"{folders[stage]}/{key}") if key in started[stage] else None) or BLANK
        except PermissionError as error:
            facts[key], denied[key] = BLANK, denied_line(error)
    damaged = _discount_missing_artifacts(graph, layout, facts, denied)
    undone = [key for key in dict.fromkeys([*wanted, *damaged]) if not facts[key].done]
    retried = [key for key in wanted if facts[key].done and facts[key].attempts > 1 and facts[key].finished >= context.since]
    incomplete = [*undone, *retried]
    departures = context.departures(incomplete) if incomplete else {}
    records: dict[str, StageRecords] = {}
    for key in undone:
        left = tuple(departures.get(key, ()))
        if key in denied:
            records[key] = StageRecords(departures=left, denied=denied[key])
        elif key in started[graph.nodes[key].stage]:
            try:
                records[key] = _read_records(layout.stage(graph.nodes[key].stage, key), context, left)
            except PermissionError as error:
                records[key] = StageRecords(departures=left, denied=denied_line(error))
        else:
            records[key] = StageRecords(departures=left) if left else NO_RECORDS
    blamed: dict[str, tuple[Blamed, ...]] = {}
    for key in retried:
        left = tuple(departures.get(key, ()))
        kept = index.blamed(key, left)
        if kept is None:
            try:
                read = _read_records(layout.stage(graph.nodes[key].stage, key), context, left)
            except PermissionError:  # the stage is done: nothing is lost but what can be learnt of its nodes
                continue
            kept = blame(read, context.experiment)
            if not any(attempt.alive for attempt in read.attempts):
                index.keep_blamed(key, left, kept)
        blamed[key] = kept
    own_jobs = {attempt.job for read in records.values() for attempt in read.attempts if attempt.job}
    unstarted = {key: [each for each in departures[key] if each.job not in own_jobs] for key in undone if departures.get(key)}
    ready = (key for key in unstarted if all(facts[parent].done for parent in graph.nodes[key].upstream.values()))
    doubtful = {each.job for key in ready for each in unstarted[key] if in_launch(each.launch, each.submitted, context.since)}
    if doubtful:
        doubtful -= _jobs_of_finished(graph, layout, context, facts, doubtful)
    for key, jobs in unstarted.items():
        records[key] = replace(records[key], unstarted=tuple(each for each in jobs if each.job in doubtful))
    return Observation(facts, {key: records[key] for key in undone}, blamed)


def read_attempts(folder: StageFolder, context: PassContext, gone: Collection[str] = ()) -> tuple[AttemptFiles, ...]:
    """Every attempt that has a claim, oldest first. `gone`: jobs that are known to have ended, whether or not the queue can be read."""
    result = read_result(folder, folder.path.name)  # also of a result whose artifacts are gone
    published = result.attempt if result else 0
    found: list[AttemptFiles] = []
    for number in attempt_numbers(folder):
        attempt = folder.attempt(number)
        claim, outcome = read_claim(attempt), read_outcome(attempt)
        if claim is None:
            continue
        over = outcome is not None or number == published
        alive = not over and claim_alive(
            claim,
            modified_at(attempt.claim),
            live_jobs=context.live_jobs,
            now=context.clock(),
            gone=gone,
            cluster=context.cluster,
        )
        found.append(AttemptFiles(number, claim, outcome, alive, number == published))
    last_of_job = {attempt.job: attempt.number for attempt in found if attempt.job}
    # Slurm ends one execution of a job before it starts the next: what runs under the number of a requeued job is the last attempt.
    return tuple(replace(each, alive=each.alive and last_of_job.get(each.job, each.number) == each.number) for each in found)


def _read_records(folder: StageFolder, context: PassContext, departures: tuple[Departure, ...]) -> StageRecords:
    attempts = read_attempts(folder, context, frozenset(each.job for each in departures))
    seconds = seconds_since_restart([(each.claim, attempt_seconds(folder, each)) for each in attempts if each.claim])
    return StageRecords(attempts, departures, (), newest_checkpoint(folder) if attempts else 0.0, seconds)


def _jobs_of_finished(
    graph: Graph, layout: Layout, context: PassContext, facts: Mapping[str, StageFacts], jobs: Collection[str]
) -> set[str]:
    """Those of some jobs that started a stage which is finished by now: the other stages of such a job did not get their turn."""
    found: set[str] = set()
    for key, departures in context.departures([key for key in graph.nodes if facts[key].done]).items():
        if any(each.job in jobs for each in departures):
            attempts = read_attempts(layout.stage(graph.nodes[key].stage, key), context)
            found.update(attempt.job for attempt in attempts if attempt.job)
    return found


def _discount_missing_artifacts(graph: Graph, layout: Layout, facts: dict[str, StageFacts], denied: dict[str, str]) -> set[str]:
    """Reset the facts of finished stages that still have to be read and whose artifacts are gone; returns their keys.

    Adds to `denied` the stages whose artifacts this user may not read, with path and owner.
    """
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
            try:
                result = read_result(folder, key)
                present = result is not None and artifacts_present(folder, result)
            except PermissionError as error:
                present, denied[key] = False, denied_line(error)
            if not present:
                facts[key] = BLANK
                damaged.add(key)


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
