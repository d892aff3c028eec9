"""The Slurm allocation of a sweep: its batch script, its submission, its state in the queue, its cancellation.

The job name follows from the results folder and the sweep, and the queue is asked for it first: a sweep that has a job is not submitted
again. The guard in jobs.slurm.submissions ensures one job per intent. If there were two jobs of a sweep all the same,
`--dependency=singleton` makes the second wait for the first, and it finds every stage done.

    submit ----> pending ----> running ----> ended                      what happens on the nodes: jobs/sweeps/ray/node.py
                    ^             |
                    +-------------+    requeued: by itself before its time limit, by another node if the first node is lost
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from jobs.errors import UsageError
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement, Refusal, describe_pending, why_stuck
from jobs.slurm.script import SweepJob, launcher_python, render_script
from jobs.slurm.submissions import SETTLE_SECONDS, Guard, State, Submission, SubmissionRecords, fixed_name, this_writer
from jobs.store.records import write_text
from jobs.store.snapshot import plan_snapshot, take_snapshot
from jobs.sweeps.records import Sweep

CANCELLED = "cancelled"  # content of the stop file if the user cancelled the sweep: the job must not requeue itself
LOOK_AGAIN_SECONDS = 2.0  # between two looks at the queue


class Phase(Enum):
    """State of the job of a sweep."""

    running = "running"
    pending = "pending"
    none = "none"


@dataclass(frozen=True)
class AllocationState:
    """State of the job of a sweep, with a sentence for the user."""

    phase: Phase
    sentence: str
    job: str = ""
    stuck: str = ""  # why the pending job cannot start without intervention


def job_name(sweep: Sweep) -> str:
    """Job name of a sweep; it depends on the results folder too."""
    return fixed_name(sweep.layout, "sweep", "sweep", sweep.digest)


def log_file(sweep: Sweep) -> Path:
    """The log to which all jobs of a sweep append."""
    return sweep.layout.logs.resolve() / f"{job_name(sweep)}.out"


def job_of(sweep: Sweep, folder: Path) -> SweepJob:
    """The job of a sweep that runs the code in `folder`."""
    place = sweep.folder.path.resolve()
    python = launcher_python(sweep.experiment.slurm, sys.executable)
    return SweepJob(
        name=job_name(sweep),
        resources=sweep.experiment.sweep.resources,
        command=(python, "-m", "jobs.sweeps.ray.node", str(place), "--", python, "launch.py", "tune", str(place)),
        description=str(place / sweep.folder.sweep.name),
        stop=str(place / sweep.folder.stop.name),
        meetings=str(place / "nodes"),
        folder=str(folder),
        output=str(log_file(sweep)),
        restarts=sweep.experiment.sweep.restarts,
        binds=(str(sweep.layout.root.resolve()), sweep.corpus.folder),
    )


def preview(sweep: Sweep, source: Path) -> str:
    """The batch script that would be submitted for the code in `source`; writes nothing."""
    return render_script(job_of(sweep, plan_snapshot(source, sweep.layout).path), sweep.experiment.slurm, source / "slurm_templates")


def submit(sweep: Sweep, source: Path, client: SlurmClient, *, job: SweepJob | None = None, settle_seconds: float = SETTLE_SECONDS) -> str:
    """Id of the job of a sweep: the one in the queue, or a new one that runs a snapshot of the code in `source`.

    `job` replaces the result of `job_of`. Raises UsageError if Slurm rejects the job, or it stays unknown whether there is one.
    """
    present = _elements(sweep, client)
    if present:
        return present[0].job
    snapshot = take_snapshot(source, sweep.layout)
    wanted = job or job_of(sweep, snapshot.path)
    records = SubmissionRecords(sweep.layout.submissions.resolve() / "scripts", lambda _: sweep.folder.submission)
    guard = Guard(records, client, settle_seconds=settle_seconds, clock=time.time)
    pause = min(LOOK_AGAIN_SECONDS, settle_seconds)

    def look() -> list[str]:
        return [element.job for element in _elements(sweep, client)]

    while not records.begin(intent := Submission(wanted.name, "sweep", "", (), time.time(), State.intent, writer=this_writer())):
        former = records.find(wanted.name)
        if former is None:
            records.check(wanted.name)
            continue
        found = _job_of(former, records, guard, look, pause)
        if found:
            return found
        records.withdraw(former)
    sweep.layout.logs.mkdir(parents=True, exist_ok=True)
    sweep.folder.stop.unlink(missing_ok=True)
    intent, reply = guard.send(intent, look, wanted, sweep.experiment.slurm, snapshot.path / "slurm_templates")
    if reply.refusal is Refusal.unknown:
        found = _job_of(intent, records, guard, look, pause)
        if found:
            return found
        raise UsageError(f"sbatch gave no answer ({reply.text}), and Slurm has no job {wanted.name}: run the same command again")
    if not reply.job:
        full = reply.refusal is Refusal.full
        advice = "the queue has no room for it now, try again later" if full else "see the site's profile and sweep.resources"
        raise UsageError(f"Slurm rejects the sweep's job ({reply.text}): {advice}")
    return reply.job


def state(sweep: Sweep, client: SlurmClient) -> AllocationState:
    """State of the job of a sweep. Raises SlurmUnavailableError if squeue fails."""
    found = _elements(sweep, client, patient=False, ending=not _cancelled(sweep))
    if not found:
        return AllocationState(Phase.none, f"no job of this sweep in Slurm (log {log_file(sweep)})")
    first = found[0]
    if first.state == "COMPLETING":
        return AllocationState(Phase.running, f"job {first.job} is ending, or is being requeued", first.job)
    if first.state != "PENDING":
        return AllocationState(Phase.running, f"job {first.job} runs (log {log_file(sweep)})", first.job)
    return AllocationState(Phase.pending, f"job {first.job} {describe_pending(first)}", first.job, why_stuck(first))


def cancel(sweep: Sweep, client: SlurmClient) -> tuple[str, ...]:
    """Cancel the jobs of a sweep and prevent their requeue; returns their ids. Raises SlurmUnavailableError if Slurm does not answer."""
    found = _elements(sweep, client)
    write_text(sweep.folder.stop, f"{CANCELLED}\n")  # before scancel: the signalled job must not requeue itself
    client.cancel_named(job_name(sweep))
    return tuple(element.job for element in found)


def _cancelled(sweep: Sweep) -> bool:
    try:
        return sweep.folder.stop.read_text(encoding="utf-8").strip() == CANCELLED
    except FileNotFoundError:
        return False


def _elements(sweep: Sweep, client: SlurmClient, *, patient: bool = True, ending: bool = False) -> list[QueuedElement]:
    """The jobs of a sweep in the queue, running before pending ones; COMPLETING ones only if `ending`.

    A job that requeues itself is COMPLETING, too, until its nodes are free.
    """
    name = job_name(sweep)
    queue = client.queue(name=name, patient=patient)
    order = ("RUNNING", "PENDING", "COMPLETING")
    found = [element for element in queue if element.name == name and (ending or element.state != "COMPLETING")]
    return sorted(found, key=lambda element: (order.index(element.state) if element.state in order else 0, int(element.job)))


def _job_of(record: Submission, records: SubmissionRecords, guard: Guard, look: Callable[[], Sequence[str]], pause: float) -> str:
    """Id of the job of a recorded submission once Slurm shows it; "" if it is certain that there is none, or the record is gone."""
    current: Submission | None = record
    while current is not None and current.created == record.created:
        abandoned = guard.abandoned([current])
        job = next(iter(look()), "")
        settled = guard.settle(current, job, abandoned=bool(abandoned)) if current.state is State.intent else None
        if job or settled is None:
            return job
        time.sleep(pause)
        current = records.find(record.name)
    return ""
