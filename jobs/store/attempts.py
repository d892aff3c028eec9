"""Whether the process that claimed an attempt still works on it: by its pid where that can be seen, else by its heartbeat.

A worker touches its claim file every `HEARTBEAT_SECONDS`. A pid says nothing on another machine, nor in another pid namespace
(containers), nor after a reboot; so a claim carries the kernel's boot id, the namespace and the start time of the process, and
the pid is only believed where all of them can be compared.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import Claim, Outcome, attempt_numbers, read_claim, read_outcome

SUPERSEDED = "Superseded"  # error of an outcome that another attempt's result made pointless
HEARTBEAT_SECONDS = 10.0
QUIET_SECONDS = 300.0  # without a heartbeat a claim is given up after this: several times what attribute caches of NFS may hide (60 s)
GONE_SECONDS = 45.0  # the same where the queue says that the job is gone: the queue may have been read just before the job began
JOB_VARIABLE = "SER_GRID_JOB"  # set by whoever starts workers that are several in one Slurm job, or in none, and whom it tells apart


def own_node() -> str:
    """What Slurm calls this machine; its host name outside of Slurm."""
    return os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()


def new_claim(number: int, *, log: str = "", relief: int = 0, checkpoint: float = 0.0, team: str = "") -> Claim:
    """A claim of attempt `number` by this process; the rest is as in `Claim`."""
    return Claim(
        attempt=number,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        started=time.time(),
        slurm_job=own_job(),
        node=own_node(),
        log=log,
        relief=relief,
        checkpoint=checkpoint,
        team=team,
    )


def own_job() -> str:
    """The job that this process computes for, as claims name it: its starter's name for it, else the Slurm job it runs in.

    A job of one name has one execution at a time. A Slurm job does; the tasks that a sweep computes inside of one do not.
    """
    return os.environ.get(JOB_VARIABLE, "") or own_slurm_job()


def own_slurm_job() -> str:
    """`ARRAY_INDEX` or `JOB` of the Slurm job this process runs in; "" outside of Slurm."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def is_slurms(job: str) -> bool:
    """Whether a job that a claim names is one of Slurm's, and not a starter's name for a task of its own."""
    return job[:1].isdigit()


def process_start(pid: int) -> str:
    """`BOOT/NAMESPACE/TICKS` of a process that lives; "" if there is none, or the kernel does not say."""
    try:
        # The name in the second field may hold blanks and brackets: count from the last bracket. Field 22 is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    if fields[0] in "ZX":  # a zombie works on nothing
        return ""
    return f"{_kernel()}/{fields[19]}"


def claim_alive(claim: Claim, heartbeat: float, *, live_jobs: Collection[str] | None, now: float, gone: Collection[str] = ()) -> bool:
    """Whether the holder of a claim still works on it.

    `heartbeat` is the claim file's modification time and `now` the time to compare it with, both in seconds since the epoch.
    `live_jobs` are all jobs in Slurm's queue (`JOB` or `ARRAY_INDEX`), or None where nobody has asked; `gone` are some that have left it.
    """
    kernel, _, _ = claim.process_start.rpartition("/")
    if kernel and kernel == _kernel():
        return process_start(claim.pid) == claim.process_start
    quiet = now - heartbeat
    if is_slurms(claim.slurm_job) and live_jobs is not None:  # of a starter's own name Slurm knows nothing
        return claim.slurm_job in live_jobs or quiet < GONE_SECONDS
    if claim.slurm_job and claim.slurm_job in gone:
        return quiet < GONE_SECONDS
    if claim.slurm_job and claim.slurm_job == own_job() and claim.pid != os.getpid():
        return False  # we are the same job, requeued: its former execution was ended before this one began
    return quiet < QUIET_SECONDS


class Heartbeat:
    """Touches a file at intervals while the `with` block lasts, and calls `also` each time."""

    def __init__(self, path: Path, seconds: float = HEARTBEAT_SECONDS, also: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._seconds = seconds
        self._also = also
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(self._seconds):
            self._also()
            try:
                os.utime(self._path)
            except OSError:  # a shared folder that is away for a while; a beat that is missed is made good by the next
                continue


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


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


def holder(claim: Claim) -> str:
    """Who executes an attempt, in words."""
    return f"Slurm job {claim.slurm_job}" if is_slurms(claim.slurm_job) else f"process {claim.pid} on {claim.host}"


def newest_checkpoint(folder: StageFolder) -> float:
    """When complete resumable state was last written, seconds since the epoch; 0 if there is none."""
    try:
        with os.scandir(folder.checkpoint) as entries:
            return max((entry.stat().st_mtime for entry in entries if not entry.name.startswith(".")), default=0.0)
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


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
    return seconds_since_begun_anew([(each.claim, attempt_seconds(folder, each)) for each in files if each.claim])


def attempt_seconds(folder: StageFolder, attempt: AttemptFiles) -> float:
    """Seconds that an attempt took, as its end or its last heartbeat tells."""
    if attempt.outcome is not None or attempt.claim is None:
        return attempt.outcome.seconds if attempt.outcome else 0.0
    return max(0.0, modified_at(folder.attempt(attempt.number).claim) - attempt.claim.started)


def divergence_of(folder: StageFolder) -> str:
    """The error of the last attempt that ended in divergence; "" if none did. It is final: the same seed would diverge again."""
    outcomes = (read_outcome(folder.attempt(number)) for number in reversed(attempt_numbers(folder)))
    diverged = (outcome for outcome in outcomes if outcome is not None and outcome.kind == FailureClass.divergence.name)
    return next((f"{outcome.error}: {outcome.message}" for outcome in diverged), "")


def modified_at(path: Path) -> float:
    """Modification time of a file, seconds since the epoch; 0 if it is missing."""
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0
