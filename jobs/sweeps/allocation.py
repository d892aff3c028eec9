"""A sweep inside one Slurm allocation: the script, its submission (once, whatever happens to sbatch's reply), how it stands, its end.

The name of the job follows from the results folder and the sweep, and the queue is asked for it first: whoever submits a sweep that Slurm
has already gets that job. An intent is on record before sbatch is called; while its outcome is unknown nothing is submitted. Should two
jobs of a sweep ever meet, `--dependency=singleton` has the second wait for the first, and it finds all done.

    submit ----> pending ----> running ----> ended                      jobs/sweeps/ray/node.py says what happens on the nodes
                    ^             |
                    +-------------+    time limit: told to stop, it puts itself back; first node lost: the others do
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.graph import canonical_json
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement, Refusal, read_refusal, why_stuck
from jobs.slurm.script import SweepJob, launcher_python, parameters, render
from jobs.store.attempts import claim_alive, process_start
from jobs.store.records import Claim, create_json, read_json, write_json, write_text
from jobs.store.snapshot import plan_snapshot, take_snapshot
from jobs.sweeps.records import Sweep

CANCELLED = "cancelled"  # what the file that stops a sweep says when its user wants it stopped for good
SCHEMA = 1
SETTLE_SECONDS = 60.0  # how long a submission of unknown outcome stays unfound before another one may be made
LOOK_AGAIN_SECONDS = 2.0


class Phase(Enum):
    """How the job of a sweep stands."""

    running = "running"
    pending = "pending"
    none = "none"


@dataclass(frozen=True)
class AllocationState:
    """How the job of a sweep stands, with a sentence for people."""

    phase: Phase
    sentence: str
    job: str = ""
    stuck: str = ""  # why it will never start unless somebody interferes


@dataclass(frozen=True)
class Intent:
    """A submission, written down before it is made."""

    name: str
    created: float  # seconds since the epoch
    host: str
    pid: int
    start: str  # of the process, as the kernel has it
    job: str = ""


def job_name(sweep: Sweep) -> str:
    """Name of a sweep's job; the same sweep in another results folder is another one."""
    layout = sweep.layout
    identity = canonical_json(["sweep", os.path.realpath(layout.root), layout.experiment, sweep.digest])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', layout.experiment[:40])}.sweep.{digest}"


def log_file(sweep: Sweep) -> Path:
    """The log of a sweep's jobs, one after another."""
    return sweep.layout.logs.resolve() / f"{job_name(sweep)}.out"


def job_of(sweep: Sweep, folder: Path) -> SweepJob:
    """The job of a sweep whose code lies in `folder`."""
    place = sweep.folder.path.resolve()
    python = launcher_python(sweep.experiment.slurm, sys.executable)
    return SweepJob(
        name=job_name(sweep),
        resources=sweep.experiment.sweep.resources,
        command=(python, "-m", "jobs.sweeps.ray.node", str(place), "--", python, "launch.py", "tune", str(place)),
        waited_for=str(place / sweep.folder.sweep.name),
        stop=str(place / sweep.folder.stop.name),
        meetings=str(place / "nodes"),
        folder=str(folder),
        output=str(log_file(sweep)),
        restarts=sweep.experiment.sweep.restarts,
        binds=(str(sweep.layout.root.resolve()), sweep.corpus.folder),
    )


def preview(sweep: Sweep, source: Path) -> str:
    """The script as it would be submitted from the code in `source`; touches nothing."""
    return render(job_of(sweep, plan_snapshot(source, sweep.layout).path), sweep.experiment.slurm, source / "slurm_templates")


def submit(sweep: Sweep, source: Path, client: SlurmClient, *, job: SweepJob | None = None, settle_seconds: float = SETTLE_SECONDS) -> str:
    """Number of the job of a sweep: of the one that Slurm has, or of a new one that runs a snapshot of the code in `source`.

    `job`: another one than `job_of` gives. UsageError in one line where there is none in the end, or none is known.
    """
    present = _elements(sweep, client)
    if present:
        return present[0].job
    snapshot = take_snapshot(source, sweep.layout)
    wanted = job or job_of(sweep, snapshot.path)
    site = sweep.experiment.slurm
    script = render(wanted, site, snapshot.path / "slurm_templates")
    if shutil.which("sbatch") is None:
        raise UsageError(f"sbatch is not in PATH on {socket.gethostname()}: no Slurm here (--cluster local needs none)")
    intent = Intent(wanted.name, time.time(), socket.gethostname(), os.getpid(), process_start(os.getpid()))
    while not create_json(_intent_file(sweep), {"schema": SCHEMA, **asdict(intent)}):
        found = _resolve(sweep, client, settle_seconds)
        if found:
            return found
    sweep.layout.logs.mkdir(parents=True, exist_ok=True)
    sweep.folder.stop.unlink(missing_ok=True)
    return _send(sweep, client, script, parameters(wanted, site), intent, settle_seconds)


def state(sweep: Sweep, client: SlurmClient) -> AllocationState:
    """How the job of a sweep stands. SlurmUnavailableError where Slurm does not say."""
    found = _elements(sweep, client, patient=False, ending=not _cancelled(sweep))
    if not found:
        return AllocationState(Phase.none, f"no job of this sweep in Slurm (log {log_file(sweep)})")
    first = found[0]
    if first.state == "COMPLETING":
        return AllocationState(Phase.running, f"job {first.job} is ending, or about to wait for its next turn", first.job)
    if first.state != "PENDING":
        return AllocationState(Phase.running, f"job {first.job} runs (log {log_file(sweep)})", first.job)
    stuck = why_stuck(first)
    text = f"will never start: {stuck}" if stuck else f"waits for its turn ({first.reason})"
    return AllocationState(Phase.pending, f"job {first.job} {text}", first.job, stuck)


def cancel(sweep: Sweep, client: SlurmClient) -> tuple[str, ...]:
    """End the job of a sweep and keep it from coming back; the jobs that were there. SlurmUnavailableError where Slurm does not answer."""
    found = _elements(sweep, client)
    write_text(sweep.folder.stop, f"{CANCELLED}\n")  # first: a job that is told to leave must not put itself back
    client.cancel_named(job_name(sweep))
    return tuple(element.job for element in found)


def _cancelled(sweep: Sweep) -> bool:
    try:
        return sweep.folder.stop.read_text(encoding="utf-8").strip() == CANCELLED
    except FileNotFoundError:
        return False


def _elements(sweep: Sweep, client: SlurmClient, *, patient: bool = True, ending: bool = False) -> list[QueuedElement]:
    """The jobs of a sweep that Slurm has, the one that runs or will run first at first. Those that are ending only if `ending`.

    A job that puts itself back is ending, too, until its nodes are free.
    """
    name = job_name(sweep)
    queue = client.queue(name=name, patient=patient)
    order = ("RUNNING", "PENDING", "COMPLETING")
    found = [element for element in queue if element.name == name and (ending or element.state != "COMPLETING")]
    return sorted(found, key=lambda element: (order.index(element.state) if element.state in order else 0, int(element.job)))


def _intent_file(sweep: Sweep) -> Path:
    return sweep.folder.path / "submission.json"


def _read_intent(sweep: Sweep) -> Intent | None:
    value = read_json(_intent_file(sweep))
    if value is None or value.pop("schema", None) != SCHEMA:
        return None
    try:
        return Intent(**value)
    except TypeError:
        return None


def _resolve(sweep: Sweep, client: SlurmClient, settle_seconds: float) -> str:
    """The job of a submission on record, as soon as Slurm has it; "" once the record may be made anew. Removes it then."""
    while True:
        intent = _read_intent(sweep)
        found = _elements(sweep, client)
        if found:
            return found[0].job
        if intent is None or intent.job or (time.time() - intent.created >= settle_seconds and not _writer_lives(intent)):
            _intent_file(sweep).unlink(missing_ok=True)
            return ""
        time.sleep(min(LOOK_AGAIN_SECONDS, settle_seconds))


def _writer_lives(intent: Intent) -> bool:
    """Whether the process that wrote an intent may still submit; False where it is known to have ended, or has had time enough."""
    claim = Claim(0, intent.host, intent.pid, intent.start, intent.created)
    return intent.pid != os.getpid() and claim_alive(claim, intent.created, live_jobs=None, now=time.time())


def _send(sweep: Sweep, client: SlurmClient, script: str, request: Mapping[str, Any], intent: Intent, settle_seconds: float) -> str:
    from jobs.errors import SubmissionFailedError

    try:
        number = client.submit(sweep.layout.submissions / "scripts", script, request, sweep.experiment.slurm)
    except SubmissionFailedError as error:
        text = " ".join(str(error).split()) or "sbatch said nothing"
        verdict = read_refusal(text)
        if verdict is Refusal.unknown:
            return _look_for(sweep, client, text, settle_seconds)
        _intent_file(sweep).unlink(missing_ok=True)
        advice = (
            "the queue has no room for it now, try again later" if verdict is Refusal.full else "see the site's profile and sweep.resources"
        )
        raise UsageError(f"Slurm declines the sweep's job ({text}): {advice}") from error
    except UsageError:
        _intent_file(sweep).unlink(missing_ok=True)
        raise
    write_json(_intent_file(sweep), {"schema": SCHEMA, **asdict(replace(intent, job=number))})
    return number


def _look_for(sweep: Sweep, client: SlurmClient, text: str, settle_seconds: float) -> str:
    """The job of an sbatch that gave no answer; UsageError if it does not turn up."""
    end = time.monotonic() + settle_seconds
    while True:
        found = _elements(sweep, client)
        if found:
            return found[0].job
        if time.monotonic() > end:
            raise UsageError(f"sbatch gave no answer ({text}), and Slurm has no job {job_name(sweep)}: run the same command again")
        time.sleep(min(LOOK_AGAIN_SECONDS, settle_seconds))
