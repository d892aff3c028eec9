"""One stage, from claim to result: claim an attempt, verify its inputs, compute, publish the result or record the failure."""

from __future__ import annotations

import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.graph import Node
from jobs.signals import WARNING_SIGNAL, StopRequest
from jobs.store.access import denied_line
from jobs.store.attempts import (
    GONE_SECONDS,
    QUIET_SECONDS,
    SUPERSEDED,
    Heartbeat,
    claim_alive,
    divergence_of,
    holder,
    new_claim,
    newest_checkpoint,
    newest_claim,
    own_node,
    own_slurm_job,
    seconds_before,
)
from jobs.store.cancellations import read_cancellations
from jobs.store.clock import file_time
from jobs.store.disk_space import name_full_disk
from jobs.store.failures import FailureClass
from jobs.store.launches import launched_at
from jobs.store.layout import AttemptFolder, StageFolder
from jobs.store.records import (
    Ending,
    Outcome,
    Result,
    artifacts_present,
    attempt_numbers,
    claim_attempt,
    read_claim,
    read_outcome,
    read_result,
    result_intact,
    write_outcome,
    write_result,
)
from jobs.text import first_line
from jobs.worker.imports import failure_class
from jobs.worker.provenance import Stopwatch, process_facts
from jobs.worker.returned import artifact_digests, check_returned
from jobs.worker.task import Description, Workplace, check_code, compute, read_corpus_digest, stage_request
from jobs.worker.team_channel import TeamFailure
from jobs.worker.team_leader import Leader
from jobs.worker.waiting import job_times, queue_facts

DAMAGED = "an artifact is missing or is not the one that was written"
LAG_SECONDS = 20.0  # how long a shared file system may hide what another node has written


class Verdict(Enum):
    """How one stage of a task ended."""

    done = "done"
    already = "had a result already"
    failed = "failed"
    refused = "refused"
    interrupted = "interrupted"
    taken = "taken by another worker"
    unready = "upstream result is missing"
    cancelled = "cancelled"  # while other stages of its task are not: otherwise the whole array task is cancelled
    diverged = "diverged before"

    @property
    def exit_code(self) -> int:
        """See jobs.worker.main."""
        return {"done": 0, "already": 0, "failed": 1, "refused": 1}.get(self.name, 3)


class SupersededError(Exception):
    """The stage has a result, or a later attempt, which has taken over the checkpoints: this attempt may write neither."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass
class WorkerProcess:
    """The state of one worker process.

    `report` writes a line to the log, whose file is `log` ("": unknown). `concurrent` returns the highest number of other stages that have
    shared its GPU or memory so far. `verified` holds the folders of upstream artifacts that need not be read again for the next stage.
    """

    description: Description
    threads: int
    report: Callable[[str], None]
    stop: StopRequest = field(default_factory=StopRequest)
    log: str = ""
    lag_seconds: float = LAG_SECONDS
    concurrent: Callable[[], int] = lambda: 0
    team: Leader | None = None  # the processes that compute with this one
    verified: dict[str, Path] = field(default_factory=dict)
    began: float = field(default_factory=time.time)  # seconds since the epoch; as the folder's file system counts them from `run_task` on

    def ready(self) -> bool:
        """Whether every process of the team can start the next stage; reports the reason if not."""
        problem = self.team.wait_until_ready() if self.team else ""
        if problem:
            self.report(f"the team cannot continue: {problem}")
        return not problem

    @property
    def place(self) -> Workplace:
        return self.description.place

    def folder(self, node: Node) -> StageFolder:
        return self.place.layout.stage(node.stage, node.key)


def execute(process: WorkerProcess, node: Node) -> Verdict:
    """Compute and publish one stage, unless it has a result, has diverged, or another process holds a live claim on it."""
    folder = process.folder(node)
    if _has_result(folder, node):
        return Verdict.already
    if _is_cancelled(process.place, node):
        return Verdict.cancelled
    diverged = divergence_of(folder)
    if diverged:  # its slot has another seed by now, and this job was late
        process.report(f"{node.name}: an earlier attempt diverged ({diverged}): the same seed is not tried again")
        return Verdict.diverged
    upstream = _wait_for_upstream(process, node)
    if isinstance(upstream, str):
        process.report(f"{node.name}: {upstream}")
        return Verdict.unready
    # Before other claims are read: a worker that claims in between takes this very number. A folder without a claim belongs to a worker
    # that is about to claim it, or died before: the first to write the claim owns it.
    number = newest_claim(folder) + 1
    attempt = _wait_for_holder(process, folder, node) or _claim(process, node, number)
    if isinstance(attempt, str):
        process.report(f"{node.name}: {attempt}")
        return Verdict.taken
    watch = Stopwatch()
    with Heartbeat(attempt.claim, also=watch.sample):
        try:
            _require_newest(folder, node, attempt)
            if isinstance(upstream, OSError):
                raise upstream
            process.report(f"{node.name}: attempt {attempt.number} on {socket.gethostname()}, process {os.getpid()}")
            result = _compute(process, node, folder, attempt, upstream, watch)
            _require_newest(folder, node, attempt)
            write_result(folder, result)
        except SupersededError as error:
            process.report(f"{node.name}: {error}")
            write_outcome(attempt, _outcome(attempt, watch, Ending.interrupted, SUPERSEDED, str(error), kind=FailureClass.interrupted))
            return error.verdict
        except (Exception, SystemExit) as error:
            outcome = outcome_of(error, attempt, watch, at_limit=process.stop.signal == WARNING_SIGNAL, concurrent=process.concurrent())
            cause = process.team.root_cause() if process.team and outcome.kind == FailureClass.communication.name else None
            outcome = team_outcome(cause, attempt, watch) if cause else outcome
            if outcome.kind != FailureClass.divergence.name and newest_claim(folder) > attempt.number:  # its files are the newer one's now
                outcome = replace(outcome, ending=Ending.interrupted, error=SUPERSEDED, kind=FailureClass.interrupted.name)
            _record_outcome(process, node, attempt, outcome)
            return Verdict[outcome.ending.name]
    shutil.rmtree(folder.checkpoint, ignore_errors=True)  # resumable state is large and not read again
    return Verdict.done


def outcome_of(error: BaseException, attempt: AttemptFolder, watch: Stopwatch, *, at_limit: bool = False, concurrent: int = 0) -> Outcome:
    """The outcome of an attempt that an exception ended: interrupted, refused (wrong configuration or data), or failed.

    `at_limit`: it was asked to stop because its time limit is near. `concurrent`: stages that shared the memory; running out of it is then
    no proof that this stage needs too much.
    """
    name_full_disk(error, attempt.output)
    kind, name = failure_class(error), type(error).__name__
    if kind is FailureClass.interrupted:
        kind = FailureClass.time_limit if at_limit else kind
        return _outcome(attempt, watch, Ending.interrupted, name, first_line(error), kind=kind)
    if kind is FailureClass.refused:
        lines = [str(problem) for problem in getattr(error, "problems", ())]
        lines = lines or [denied_line(error) if isinstance(error, PermissionError) else str(error)]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return _outcome(attempt, watch, Ending.refused, name, lines[0] + more, "\n".join(lines), kind=kind)
    if kind is FailureClass.memory and concurrent:
        kind = FailureClass.crowded
    return _outcome(attempt, watch, Ending.failed, name, first_line(error), "".join(traceback.format_exception(error)), kind=kind)


def team_outcome(failure: TeamFailure, attempt: AttemptFolder, watch: Stopwatch) -> Outcome:
    """The outcome of an attempt that failed in another process of the team."""
    ending = Ending.refused if failure.kind is FailureClass.refused else Ending.failed
    outcome = _outcome(attempt, watch, ending, failure.error, failure.message, failure.detail, kind=failure.kind)
    return replace(outcome, node=failure.node)


def _record_outcome(process: WorkerProcess, node: Node, attempt: AttemptFolder, outcome: Outcome) -> None:
    process.report(f"{node.name}: {outcome.ending.value}: {outcome.error}: {outcome.message}\n{outcome.detail}")
    if outcome.kind == FailureClass.storage.name:  # its output is useless, and the record needs the space
        shutil.rmtree(attempt.output, ignore_errors=True)
    write_outcome(attempt, outcome)


def _has_result(folder: StageFolder, node: Node) -> bool:
    result = read_result(folder, node.key)
    return result is not None and artifacts_present(folder, result)


def _require_newest(folder: StageFolder, node: Node, attempt: AttemptFolder) -> None:
    """SupersededError if the stage has a result, or if this attempt counted as dead (its node was cut off) and another one was claimed."""
    if _has_result(folder, node):
        raise SupersededError("another attempt had the result first", Verdict.already)
    newest = newest_claim(folder)
    if newest > attempt.number:
        raise SupersededError(f"attempt {newest} was claimed, as attempt {attempt.number} counted as dead", Verdict.taken)


def _is_cancelled(place: Workplace, node: Node) -> bool:
    """Whether the user has cancelled a stage since the launch that submitted this job."""
    if not place.launched:
        return False
    try:
        return node.key in read_cancellations(place.layout, place.launched)
    except UsageError:  # a damaged record is reported by the controller
        return False


def _wait_for_upstream(process: WorkerProcess, node: Node) -> dict[str, Path] | str | OSError:
    """Role -> folder with the verified artifacts of that upstream stage; an error message if one is missing or damaged.

    Or the error of a file system that does not let them be read: what is stored there is then neither missing nor damaged.
    """
    deadline = time.monotonic() + process.lag_seconds
    while True:
        try:
            found = {role: _verified_output(process, key) for role, key in node.upstream.items()}
        except OSError as error:
            if process.stop() or time.monotonic() >= deadline:
                return error
        else:
            missing = [role for role, output in found.items() if output is None]
            if not missing:
                return {role: output for role, output in found.items() if output is not None}
            if process.stop() or time.monotonic() >= deadline:
                break
        time.sleep(min(1.0, process.lag_seconds / 4))
    damaged = [process.description.nodes[node.upstream[role]] for role in missing]
    try:
        withdrawn = [parent.name for parent in damaged if not process.stop() and _withdraw(process.folder(parent), parent)]
    except OSError as error:
        return error
    if withdrawn:
        return f"artifacts of {', '.join(withdrawn)} differ from the digests in its result; it will be computed again"
    return f"no result of {', '.join(parent.name for parent in damaged)}"


def _verified_output(process: WorkerProcess, key: str) -> Path | None:
    if key not in process.verified:
        parent = process.description.nodes[key]
        folder = process.folder(parent)
        result = read_result(folder, key)
        if result is None or not result_intact(folder, result):
            return None
        process.verified[key] = folder.attempt(result.attempt).output
    return process.verified[key]


def _withdraw(folder: StageFolder, node: Node) -> bool:
    """Move a result whose artifacts are missing or changed into the folder of its attempt; False if there is no such result."""
    result = read_result(folder, node.key)
    if result is None or result_intact(folder, result):
        return False
    attempt = folder.attempt(result.attempt)
    try:
        folder.result.rename(attempt.path / "withdrawn.json")
    except FileNotFoundError:  # another worker has moved it, or the folder of the attempt is gone
        folder.result.unlink(missing_ok=True)
    if attempt.path.is_dir() and read_outcome(attempt) is None:
        write_outcome(
            attempt,
            _outcome(attempt, Stopwatch(), Ending.failed, "ArtifactDamaged", DAMAGED, kind=FailureClass.disk),
        )
    return True


def _wait_for_holder(process: WorkerProcess, folder: StageFolder, node: Node) -> str:
    """Which other process works on a stage; "" if none.

    A claim that has missed several heartbeats probably belongs to a dead worker (one killed for its memory writes no outcome), so this
    waits until it has a heartbeat again or counts as dead: to exit now would only start the next job into the same situation.
    """
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        quiet, other = _live_claim(folder, node, process.description.gone)
        if not other or quiet < GONE_SECONDS or process.stop() or time.monotonic() >= deadline:
            return other
        time.sleep(1.0)


def _live_claim(folder: StageFolder, node: Node, gone: Collection[str]) -> tuple[float, str]:
    """Seconds since the last heartbeat of the live claim, and which process holds it; "" if none. `gone`: as for `claim_alive`."""
    result = read_result(folder, node.key)
    for number in attempt_numbers(folder):
        attempt = folder.attempt(number)
        claim = read_claim(attempt)
        if claim is None or read_outcome(attempt) is not None or (result is not None and result.attempt == number):
            continue
        heartbeat, now = attempt.claim.stat().st_mtime, file_time(folder.root)
        if claim_alive(claim, heartbeat, live_jobs=None, now=now, gone=gone):
            return now - heartbeat, f"{holder(claim)} works on it"
    return 0.0, ""


def _claim(process: WorkerProcess, node: Node, number: int) -> AttemptFolder | str:
    """Claim an attempt; a message if another worker was faster."""
    folder = process.folder(node)
    submitted = process.description.requested.get("submitted", 0.0)
    upstream = [process.folder(process.description.nodes[key]) for key in node.upstream.values()]
    team = ",".join(dict.fromkeys(process.team.nodes)) if process.team else ""
    claim = new_claim(
        number,
        started=file_time(folder.root),
        log=process.log,
        relief=process.description.relief,
        checkpoint=newest_checkpoint(folder),
        team=team,
        experiment=process.place.experiment,
        launch=launched_at(process.place.layout),
        **job_times(submitted, folder, number, upstream, process.began, os.environ),
    )
    if not claim_attempt(folder, number, claim):
        return f"another worker claimed attempt {number} just now"
    return folder.attempt(number)


def _compute(
    process: WorkerProcess, node: Node, folder: StageFolder, attempt: AttemptFolder, upstream: Mapping[str, Path], watch: Stopwatch
) -> Result:
    place = process.place
    check_code(place)
    _check_corpus(place, "")
    attempt.output.mkdir(parents=True, exist_ok=True)
    folder.checkpoint.mkdir(parents=True, exist_ok=True)
    relief = process.description.relief
    folders = {"output": attempt.output, "checkpoint": folder.checkpoint}
    request = stage_request(node, place, upstream=upstream, **folders, relief=relief, attempt=attempt.number)
    team = process.team

    def record_failure(cause: TeamFailure) -> None:
        _record_outcome(process, node, attempt, team_outcome(cause, attempt, watch))

    with team.computing(request, record_failure) if team else nullcontext():
        returned = compute(request, team, process.stop, process.report, lambda: newest_claim(folder) > attempt.number)
    values = check_returned(returned)
    _check_corpus(place, "while the stage was computed: it read parts of both; ")
    provenance = {
        **place.code,
        **process_facts(place.packages, threads=process.threads),
        **_team_facts(team, watch.facts()),
        "seed": node.seed,
        "durations": values["durations"],
        "arithmetic": values["arithmetic"],
        "runtime": dict(node.runtime),
        "relief": relief,
        "beside": process.concurrent(),
        "slurm_job": own_slurm_job(),
        "seconds_before": seconds_before(folder, attempt.number),
        "queue": queue_facts(folder, attempt.number),
        "requested": dict(process.description.requested),
    }
    return Result(
        key=node.key,
        stage=node.stage,
        version=node.version,
        fold=node.fold,
        seed=node.seed,
        corpus=place.corpus,
        corpus_digest=place.corpus_digest,
        settings=node.settings,
        upstream=node.upstream,
        attempt=attempt.number,
        metrics=values["metrics"],
        provenance=provenance,
        artifacts=artifact_digests(attempt.output),
        confusion=tuple(tuple(int(count) for count in row) for row in values["confusion"]),
        classes=tuple(str(name) for name in values["classes"]),
        # An earlier attempt that counted as dead may have diverged meanwhile: its slot has another seed then.
        diverged=str(values["diverged"]) or divergence_of(folder),
        warnings=tuple(str(line) for line in values["warnings"]),
    )


def _check_corpus(place: Workplace, when: str) -> None:
    """UsageError if the corpus has another digest than at the launch. `when`: a part of the message."""
    digest = read_corpus_digest(place)
    if digest != place.corpus_digest:
        raise UsageError(
            f"corpus {place.corpus} in {place.corpus_folder} was prepared again since the launch {when}"
            f"(digest {digest[:12]}, at launch {place.corpus_digest[:12]}): launch again, or prepare the former one again"
        )


def _team_facts(team: Leader | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a stopwatch with the largest peak memory of all processes, their number and their hosts."""
    if team is None:
        return {**facts, "processes": 1, "hosts": [own_node()]}
    peak = team.peak_rss_bytes(int(facts["peak_rss_bytes"]))
    return {**facts, "peak_rss_bytes": peak, "processes": team.size, "hosts": list(dict.fromkeys(team.nodes))}


def _outcome(
    attempt: AttemptFolder, watch: Stopwatch, ending: Ending, error: str, message: str, detail: str = "", *, kind: FailureClass
) -> Outcome:
    return Outcome(attempt.number, ending, error, message, detail, socket.gethostname(), watch.seconds, own_slurm_job(), kind.name)
