"""One stage, from claim to result: claim an attempt, check what is read, compute, publish, or say how it ended."""

from __future__ import annotations

import math
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.graph import Node, canonical_json
from jobs.signals import WARNING_SIGNAL, StopRequest
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
    own_node,
    own_slurm_job,
    seconds_before,
)
from jobs.store.cancellations import read_cancellations
from jobs.store.failures import FailureClass, class_of_exception
from jobs.store.layout import AttemptFolder, Layout, StageFolder
from jobs.store.records import (
    UNUSABLE,
    Ending,
    Outcome,
    Result,
    artifacts_present,
    attempt_numbers,
    claim_attempt,
    file_digest,
    read_claim,
    read_outcome,
    read_result,
    result_intact,
    usable_confusion,
    write_outcome,
    write_result,
)
from jobs.worker.provenance import Stopwatch, process_facts
from jobs.worker.task import Description, Workplace, compute, order_of, read_corpus_digest
from jobs.worker.team_follower import Loss
from jobs.worker.team_leader import Leader

DAMAGED = "an artifact is missing or is not the one that was written"
LAG_SECONDS = 20.0  # how long a shared file system may take to show what another node has finished


class Verdict(Enum):
    """What became of one stage in this task."""

    done = "done"
    already = "had a result already"
    failed = "failed"
    refused = "refused"
    interrupted = "interrupted"
    taken = "taken by another worker"
    unready = "upstream is not there"
    cancelled = "cancelled"  # alone of its task: otherwise the whole element is withdrawn
    diverged = "diverged before"


EXIT_CODES = {
    Verdict.done: 0,
    Verdict.already: 0,
    Verdict.failed: 1,
    Verdict.refused: 1,
    Verdict.interrupted: 3,
    Verdict.taken: 3,
    Verdict.unready: 3,
    Verdict.cancelled: 3,
    Verdict.diverged: 3,
}
ENDINGS = {Ending.failed: Verdict.failed, Ending.refused: Verdict.refused, Ending.interrupted: Verdict.interrupted}


def nobody_beside() -> int:
    """For a stage that is computed by itself."""
    return 0


class NotFiniteError(Exception):
    """A stage returned a number that is none."""

    diverged = True


@dataclass
class WorkerProcess:
    """One process and what it has learnt: upstream artifacts it has verified are not read again for the next stage."""

    description: Description
    threads: int
    tell: Callable[[str], None]
    stop: StopRequest = field(default_factory=StopRequest)
    log: str = ""  # file that `tell` writes to, where it is one
    lag_seconds: float = LAG_SECONDS
    beside: Callable[[], int] = nobody_beside  # how many other stages shared its GPU or memory, the most so far (jobs.worker.packing)
    team: Leader | None = None  # the processes that compute with this one
    verified: dict[str, Path] = field(default_factory=dict)

    def ready(self) -> bool:
        """Whether every process of the team can take the next stage; tells what keeps one from it."""
        lacks = self.team.gather() if self.team else ""
        if lacks:
            self.tell(f"the team cannot go on: {lacks}")
        return not lacks

    @property
    def place(self) -> Workplace:
        return self.description.place

    def folder(self, node: Node) -> StageFolder:
        return Layout(Path(self.place.results), self.place.experiment).stage(node.stage, node.key)


def execute(process: WorkerProcess, node: Node) -> Verdict:
    """One stage, at most once: leave if it has a result or has diverged, or a live claim; else claim an attempt, compute and publish."""
    folder = process.folder(node)
    if _has_result(folder, node):
        return Verdict.already
    if _is_cancelled(process.place, node):
        return Verdict.cancelled
    diverged = divergence_of(folder)
    if diverged:  # its slot has another seed by now; this job is one that turned up late
        process.tell(f"{node.name}: an earlier attempt diverged ({diverged}): the same seed is not tried again")
        return Verdict.diverged
    upstream = _wait_for_upstream(process, node)
    if isinstance(upstream, str):
        process.tell(f"{node.name}: {upstream}")
        return Verdict.unready
    number = _next_attempt(folder)  # before the look at who works on it: whoever claims in between has claimed this very number
    attempt = _wait_for_holder(process, folder, node) or _claim(process, folder, number)
    if isinstance(attempt, str):
        process.tell(f"{node.name}: {attempt}")
        return Verdict.taken
    watch = Stopwatch()
    with Heartbeat(attempt.claim, also=watch.look):
        try:
            if _has_result(folder, node):
                late = "another attempt had the result first"
                write_outcome(attempt, _outcome(attempt, watch, Ending.interrupted, SUPERSEDED, late, kind=FailureClass.interrupted))
                return Verdict.already
            process.tell(f"{node.name}: attempt {attempt.number} on {socket.gethostname()}, process {os.getpid()}")
            result = _compute(process, node, folder, attempt, upstream, watch)
            write_result(folder, result)
        except (Exception, SystemExit) as error:
            outcome = outcome_of(error, attempt, watch, at_limit=process.stop.signal == WARNING_SIGNAL, beside=process.beside())
            loss = process.team.reason() if process.team and outcome.kind == FailureClass.communication.name else None
            outcome = outcome_of_loss(loss, attempt, watch) if loss else outcome
            _state_end(process, node, attempt, outcome)
            return ENDINGS[outcome.ending]
    shutil.rmtree(folder.checkpoint, ignore_errors=True)  # resumable state is large, and nothing reads it any more
    return Verdict.done


def outcome_of(error: BaseException, attempt: AttemptFolder, watch: Stopwatch, *, at_limit: bool = False, beside: int = 0) -> Outcome:
    """How an attempt ended, from the exception that ended it: interrupted, refused (the user's to mend), or failed.

    `at_limit`: it was asked to stop because its time is nearly up. `beside`: stages that it shared the memory with; only one that runs
    out of memory by itself wants too much.
    """
    kind, name = class_of_exception(error), type(error).__name__
    if kind is FailureClass.interrupted:
        kind = FailureClass.time_limit if at_limit else kind
        return _outcome(attempt, watch, Ending.interrupted, name, _first_line(error), kind=kind)
    if kind is FailureClass.refused:
        lines = [str(problem) for problem in getattr(error, "problems", ())] or [str(error)]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        return _outcome(attempt, watch, Ending.refused, name, lines[0] + more, "\n".join(lines), kind=kind)
    if kind is FailureClass.memory and beside:
        kind = FailureClass.crowded
    return _outcome(attempt, watch, Ending.failed, name, _first_line(error), "".join(traceback.format_exception(error)), kind=kind)


def outcome_of_loss(loss: Loss, attempt: AttemptFolder, watch: Stopwatch) -> Outcome:
    """How an attempt ended that another process of the team has ended."""
    ending = Ending.refused if loss.kind is FailureClass.refused else Ending.failed
    return replace(_outcome(attempt, watch, ending, loss.error, loss.message, loss.detail, kind=loss.kind), node=loss.node)


def _state_end(process: WorkerProcess, node: Node, attempt: AttemptFolder, outcome: Outcome) -> None:
    process.tell(f"{node.name}: {outcome.ending.value}: {outcome.error}: {outcome.message}\n{outcome.detail}")
    if outcome.kind == FailureClass.disk.name:  # what it wrote is of no use, and its last word needs the room
        shutil.rmtree(attempt.output, ignore_errors=True)
    write_outcome(attempt, outcome)


def _has_result(folder: StageFolder, node: Node) -> bool:
    result = read_result(folder, node.key)
    return result is not None and artifacts_present(folder, result)


def _is_cancelled(place: Workplace, node: Node) -> bool:
    """Whether the user has cancelled a stage since the launch that this job is of."""
    if not place.launched:
        return False
    try:
        return node.key in read_cancellations(Layout(Path(place.results), place.experiment), place.launched)
    except UsageError:  # a damaged record: it is the controller's to say so
        return False


def _wait_for_upstream(process: WorkerProcess, node: Node) -> dict[str, Path] | str:
    """Role -> folder with the artifacts of that upstream stage, verified byte by byte; or what is wrong with one."""
    deadline = time.monotonic() + process.lag_seconds
    while True:
        found = {role: _verified_output(process, key) for role, key in node.upstream.items()}
        missing = [role for role, output in found.items() if output is None]
        if not missing:
            return {role: output for role, output in found.items() if output is not None}
        if process.stop() or time.monotonic() >= deadline:
            break
        time.sleep(min(1.0, process.lag_seconds / 4))
    damaged = [process.description.nodes[node.upstream[role]] for role in missing]
    withdrawn = [parent.name for parent in damaged if not process.stop() and _withdraw(process.folder(parent), parent)]
    if withdrawn:
        return f"artifacts of {', '.join(withdrawn)} are not the ones its result states; it will be computed again"
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
    """Take back a result whose artifacts are gone or changed, keeping it beside its attempt; False if there was none."""
    result = read_result(folder, node.key)
    if result is None or result_intact(folder, result):
        return False
    attempt = folder.attempt(result.attempt)
    try:
        folder.result.rename(attempt.path / "withdrawn.json")
    except FileNotFoundError:  # another worker was quicker, or the whole attempt is gone and the result cannot be kept beside it
        folder.result.unlink(missing_ok=True)
    if attempt.path.is_dir() and read_outcome(attempt) is None:
        write_outcome(
            attempt,
            _outcome(attempt, Stopwatch(), Ending.failed, "ArtifactDamaged", DAMAGED, kind=FailureClass.disk),
        )
    return True


def _wait_for_holder(process: WorkerProcess, folder: StageFolder, node: Node) -> str:
    """Who else works on a stage; "" if nobody does.

    A holder that has missed several heartbeats is probably dead (a worker killed for its memory says nothing), and whoever submitted us
    may know that its job is gone. So it is waited for until it beats again or counts as dead: leaving would only bring the next job here.
    """
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        quiet, who = _live_claim(folder, node, process.description.gone)
        if not who or quiet < GONE_SECONDS or process.stop() or time.monotonic() >= deadline:
            return who
        time.sleep(1.0)


def _live_claim(folder: StageFolder, node: Node, gone: Collection[str]) -> tuple[float, str]:
    """Seconds since the last heartbeat of the claim that lives, and whose it is; "" if there is none. `gone`: as for `claim_alive`."""
    result = read_result(folder, node.key)
    for number in attempt_numbers(folder):
        attempt = folder.attempt(number)
        claim = read_claim(attempt)
        if claim is None or read_outcome(attempt) is not None or (result is not None and result.attempt == number):
            continue
        heartbeat, now = attempt.claim.stat().st_mtime, time.time()
        if claim_alive(claim, heartbeat, live_jobs=None, now=now, gone=gone):
            return now - heartbeat, f"{holder(claim)} works on it"
    return 0.0, ""


def _next_attempt(folder: StageFolder) -> int:
    """Number of the first attempt that nobody has claimed.

    A folder without a claim is about to be claimed by another worker, or was when that died: whoever writes the claim has it.
    """
    return max((number for number in attempt_numbers(folder) if folder.attempt(number).claim.exists()), default=0) + 1


def _claim(process: WorkerProcess, folder: StageFolder, number: int) -> AttemptFolder | str:
    """Take an attempt; or say that somebody was quicker."""
    team = ",".join(dict.fromkeys(process.team.nodes)) if process.team else ""
    claim = new_claim(number, log=process.log, relief=process.description.relief, checkpoint=newest_checkpoint(folder), team=team)
    if not claim_attempt(folder, number, claim):
        return f"another worker took attempt {number} just now"
    return folder.attempt(number)


def _compute(
    process: WorkerProcess, node: Node, folder: StageFolder, attempt: AttemptFolder, upstream: Mapping[str, Path], watch: Stopwatch
) -> Result:
    place = process.place
    digest = read_corpus_digest(place)
    if digest != place.corpus_digest:
        raise UsageError(
            f"corpus {place.corpus} in {place.corpus_folder} is not the one this experiment was launched with "
            f"(digest {digest[:12]}, then {place.corpus_digest[:12]}): launch again, or prepare the former one anew"
        )
    attempt.output.mkdir(parents=True, exist_ok=True)
    folder.checkpoint.mkdir(parents=True, exist_ok=True)
    relief = process.description.relief
    order = order_of(node, place, upstream=upstream, output=attempt.output, checkpoint=folder.checkpoint, relief=relief)
    with _together(process, node, attempt, order, watch):
        returned = compute(order, process.team, process.stop, process.tell)
    values = check_returned(returned)
    provenance = {
        **place.code,
        **process_facts(place.packages, threads=process.threads),
        **_facts_of_team(process.team, watch.facts()),
        "seed": node.seed,
        "durations": values["durations"],
        "runtime": dict(node.runtime),
        "relief": relief,
        "beside": process.beside(),
        "slurm_job": own_slurm_job(),
        "seconds_before": seconds_before(folder, attempt.number),
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
        artifacts=_artifact_digests(attempt.output),
        confusion=tuple(tuple(int(count) for count in row) for row in values["confusion"]),
        classes=tuple(str(name) for name in values["classes"]),
        # An earlier attempt that counted as dead may have diverged meanwhile; then the slot has moved on to another seed.
        diverged=str(values["diverged"]) or divergence_of(folder),
    )


def _together(
    process: WorkerProcess, node: Node, attempt: AttemptFolder, order: Mapping[str, Any], watch: Stopwatch
) -> AbstractContextManager[None]:
    """While the block lasts, the team computes, and may end the attempt."""
    if process.team is None:
        return nullcontext()
    return process.team.computing(order, lambda loss: _state_end(process, node, attempt, outcome_of_loss(loss, attempt, watch)))


def _facts_of_team(team: Leader | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a stopwatch says, with the memory of the process that used the most, and how many there were and where."""
    if team is None:
        return {**facts, "processes": 1, "hosts": [own_node()]}
    peak = team.peak_rss_bytes(int(facts["peak_rss_bytes"]))
    return {**facts, "peak_rss_bytes": peak, "processes": team.size, "hosts": list(dict.fromkeys(team.nodes))}


def check_returned(returned: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics`, `durations`, `confusion`, `classes` and `diverged` of what a stage returned.

    Raises NotFiniteError where a metric is NaN or infinite, ValueError for keys that a result does not hold, TypeError for values
    outside JSON.
    """
    known: dict[str, Any] = {"metrics": {}, "durations": {}, "confusion": (), "classes": (), "diverged": ""}
    unknown = sorted(set(returned) - set(known))
    if unknown:
        raise ValueError(f"the stage returned {', '.join(unknown)}: a result holds {', '.join(known)}")
    values = {**known, **returned}
    wrong = _not_finite("metrics", values["metrics"])
    if wrong:
        raise NotFiniteError(f"{wrong} is not a finite number: the training diverged")
    canonical_json(values)
    if not usable_confusion(values["confusion"], values["classes"]):
        raise ValueError(f"the stage returned a result that cannot be scored: {UNUSABLE}")
    return values


def _not_finite(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return next(filter(None, (_not_finite(f"{name}.{key}", inner) for key, inner in value.items())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, (_not_finite(f"{name}[{index}]", inner) for index, inner in enumerate(value))), "")
    return name if isinstance(value, float) and not math.isfinite(value) else ""


def _artifact_digests(output: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file, each flushed to the disk: a result must not outlive what it names."""
    found: dict[str, str] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        found[path.relative_to(output).as_posix()] = file_digest(path)
    return found


def _outcome(
    attempt: AttemptFolder, watch: Stopwatch, ending: Ending, error: str, message: str, detail: str = "", *, kind: FailureClass
) -> Outcome:
    return Outcome(attempt.number, ending, error, message, detail, socket.gethostname(), watch.seconds, own_slurm_job(), kind.name)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or "no message"
