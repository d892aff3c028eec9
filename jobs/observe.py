"""What the files say of every stage: the only reader of results and attempts that the planner relies on.

One listing per stage name finds the stages that were ever begun; a finished one costs one further read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.graph import Graph, Node
from jobs.layout import AttemptFolder, Layout, StageFolder
from jobs.liveness import claim_alive
from jobs.plan import NodeFacts, needed_keys
from jobs.records import Claim, Ending, Outcome, artifacts_present, attempt_numbers, read_claim, read_outcome, read_result

MAX_LOST = 5  # attempts that may end by interruption or without a word, one after another and without a newer checkpoint


@dataclass(frozen=True)
class AttemptFacts:
    """What the files say of one attempt that is not known to have ended well."""

    claim: Claim | None
    alive: bool
    outcome: Outcome | None


def read_facts(
    graph: Graph,
    layout: Layout,
    *,
    keys: Iterable[str] | None = None,
    known: dict[str, NodeFacts] | None = None,
    live_jobs: Collection[str] | None = None,
    since: float = 0.0,
) -> dict[str, NodeFacts]:
    """Facts of every stage of the graph.

    `since` (seconds since the epoch): failures of attempts begun before are forgiven: launching again is how a user says "try again".
    `live_jobs`: all jobs in Slurm's queue, None where it was not asked. With `keys`, only those are read again and the rest is taken
    from `known`. Artifacts are looked for where a stage still to be computed reads them: a finished run counts even if its weights
    were removed.
    """
    facts = dict(known or {})
    begun = {stage: _names(layout.stage(stage, "_").path.parent) for stage in {node.stage for node in graph.nodes.values()}}
    now = time.time()
    for key in graph.nodes if keys is None else keys:
        node = graph.nodes[key]
        if key in begun[node.stage]:
            facts[key] = _read_node(layout.stage(node.stage, key), node, live_jobs=live_jobs, since=since, now=now)
        else:
            facts[key] = NodeFacts()
    return _without_missing_artifacts(graph, layout, facts, live_jobs=live_jobs, since=since, now=now)


def judge_attempts(attempts: Sequence[AttemptFacts], *, checkpoint: float, since: float) -> NodeFacts:
    """Facts of a stage without a result from its attempts, oldest first. Pure.

    `checkpoint` is when resumable state was last written (seconds since the epoch, 0: never): attempts that were lost or interrupted are
    free while they bring the stage forward, and beyond `MAX_LOST` without progress they count as failures.
    """
    failures = stalled = 0
    refused = False
    error = held = ""
    for attempt in attempts:
        started = attempt.claim.started if attempt.claim else 0.0
        ending = attempt.outcome.ending if attempt.outcome else None
        if ending is None and attempt.alive and attempt.claim:
            held = holder(attempt.claim)
            continue
        if started < since:
            continue
        refused = ending is Ending.refused
        if ending in (Ending.failed, Ending.refused) and attempt.outcome:
            failures += 1
            stalled = 0
            error = f"{attempt.outcome.error}: {attempt.outcome.message}"
        elif started >= checkpoint:
            stalled += 1
            error = error or (f"interrupted on {attempt.outcome.host}" if attempt.outcome else "ended without a word")
    if stalled > MAX_LOST:
        failures += stalled - MAX_LOST
        error = f"{stalled} attempts in a row were lost or interrupted without a newer checkpoint"
    return NodeFacts(failures=failures, refused=refused, error=error if failures else "", held=held, attempts=len(attempts))


def holder(claim: Claim) -> str:
    """Who executes an attempt, in words."""
    return f"Slurm job {claim.slurm_job}" if claim.slurm_job else f"process {claim.pid} on {claim.host}"


def _read_node(folder: StageFolder, node: Node, *, live_jobs: Collection[str] | None, since: float, now: float) -> NodeFacts:
    result = read_result(folder, node.key)
    if result is not None:
        return NodeFacts(done=True, attempts=result.attempt, seconds=_seconds(result.provenance.get("seconds")))
    return _read_attempts(folder, live_jobs=live_jobs, since=since, now=now)


def _read_attempts(folder: StageFolder, *, live_jobs: Collection[str] | None, since: float, now: float, finished: int = 0) -> NodeFacts:
    numbers = [number for number in attempt_numbers(folder) if number != finished]
    attempts = [_read_attempt(folder.attempt(number), live_jobs, now) for number in numbers]
    unexplained = any(attempt.outcome is None or attempt.outcome.ending is Ending.interrupted for attempt in attempts)
    return judge_attempts(attempts, checkpoint=_newest(folder.checkpoint) if unexplained else 0.0, since=since)


def _read_attempt(folder: AttemptFolder, live_jobs: Collection[str] | None, now: float) -> AttemptFacts:
    claim, outcome = read_claim(folder), read_outcome(folder)
    alive = claim is not None and outcome is None and claim_alive(claim, _modified(folder.claim), live_jobs=live_jobs, now=now)
    return AttemptFacts(claim, alive, outcome)


def _without_missing_artifacts(
    graph: Graph, layout: Layout, facts: dict[str, NodeFacts], *, live_jobs: Collection[str] | None, since: float, now: float
) -> dict[str, NodeFacts]:
    """Finished stages whose artifacts are gone are not finished for those who still have to read them."""
    checked: set[str] = set()
    while True:
        undone = [key for key in needed_keys(graph, facts) if not facts[key].done]
        read = {parent for key in undone for parent in graph.nodes[key].upstream.values() if facts[parent].done} - checked
        if not read:
            return facts
        checked |= read
        for key in read:
            folder = layout.stage(graph.nodes[key].stage, key)
            result = read_result(folder, key)
            if result is None or not artifacts_present(folder, result):
                finished = result.attempt if result else 0
                facts[key] = _read_attempts(folder, live_jobs=live_jobs, since=since, now=now, finished=finished)


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _newest(folder: Path) -> float:
    """When a folder or something directly in it was last written; 0 if it is not there."""
    newest = _modified(folder)
    try:
        with os.scandir(folder) as entries:
            return max([newest, *(entry.stat().st_mtime for entry in entries)])
    except (FileNotFoundError, NotADirectoryError):
        return newest


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
