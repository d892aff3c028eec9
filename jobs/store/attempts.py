"""Claims of attempts, and whether the process that holds one is alive: by its pid where that is visible, else by its heartbeat.

A worker touches its claim file every `HEARTBEAT_SECONDS`. A pid means nothing on another machine, in another PID namespace (containers) or
after a reboot. So a claim records the kernel's boot id, the namespace and the start time of the process, and the pid is checked only where
all of them can be compared.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import Claim, Outcome, attempt_numbers, read_claim, read_outcome

SUPERSEDED = "Superseded"  # error of the outcome of an attempt whose stage got its result from another attempt
HEARTBEAT_SECONDS = 10.0
QUIET_SECONDS = 300.0  # without a heartbeat a claim counts as dead: several times the attribute cache of NFS (60 s)
GONE_SECONDS = 45.0  # the same if the job is not in Slurm's queue, which may have been read just before the job started


def own_node() -> str:
    """Slurm's name of this machine; its host name outside of Slurm."""
    return os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()


def new_claim(number: int, *, started: float | None = None, **known: Any) -> Claim:
    """A claim of attempt `number` by this process, `started` (None: now, by this machine's clock). `known`: other fields of `Claim`."""
    return Claim(
        attempt=number,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        started=time.time() if started is None else started,
        slurm_job=own_slurm_job(),
        node=own_node(),
        uid=os.getuid(),
        cluster=own_cluster(),
        **known,
    )


def own_slurm_job() -> str:
    """`ARRAY_INDEX` or `JOB` of the Slurm job this process runs in; "" outside of Slurm."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def own_cluster() -> str:
    """Slurm's name of the cluster that this process is a job of; "" outside of Slurm."""
    return os.environ.get("SLURM_CLUSTER_NAME", "")


def is_slurm_job(job: str) -> bool:
    """Whether the job named in a claim is a Slurm job; older versions have recorded other names for stages of a sweep."""
    return job[:1].isdigit()


def process_start(pid: int) -> str:
    """`BOOT/NAMESPACE/TICKS` of a living process; "" if there is none, or the kernel does not report it."""
    try:
        # The second field, the name, may contain blanks and brackets: count from the last bracket. Field 22 is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    if fields[0] in "ZX":  # a zombie
        return ""
    return f"{_kernel()}/{fields[19]}"


def claim_alive(
    claim: Claim,
    heartbeat: float,
    *,
    live_jobs: Collection[str] | None,
    now: float,
    gone: Collection[str] = (),
    cluster: Callable[[], str] = own_cluster,
) -> bool:
    """Whether the process that holds a claim still works on it.

    `heartbeat`: modification time of the claim file; `now`: the time by the same clock (jobs.store.clock); both in seconds since the epoch.
    `live_jobs`: jobs of this user in Slurm's queue (`JOB` or `ARRAY_INDEX`), None if the queue was not read; `gone`: some that have left
    it. `cluster`: name of the cluster with that queue, "" if not known. The queue shows no job of another user or cluster: there the
    heartbeat decides.
    """
    kernel, _, _ = claim.process_start.rpartition("/")
    if kernel and kernel == _kernel():
        return process_start(claim.pid) == claim.process_start
    quiet = now - heartbeat
    if claim.uid not in (None, os.getuid()) or (claim.cluster and cluster() not in ("", claim.cluster)):
        return quiet < QUIET_SECONDS
    if is_slurm_job(claim.slurm_job) and live_jobs is not None:
        return claim.slurm_job in live_jobs or quiet < GONE_SECONDS
    if claim.slurm_job and claim.slurm_job in gone:
        return quiet < GONE_SECONDS
    if claim.slurm_job and claim.slurm_job == own_slurm_job() and claim.pid != os.getpid():
        return False  # this is the same job, requeued: its previous execution has ended
    return quiet < QUIET_SECONDS


class Heartbeat:
    """Touches a file every `seconds` while the `with` block lasts, and calls `also` each time."""

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
            except OSError:  # a shared folder that is unavailable for a while: the next heartbeat suffices
                continue


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


@dataclass(frozen=True)
class AttemptFiles:
    """The records of one attempt; None where there is none."""

    number: int
    claim: Claim | None
    outcome: Outcome | None
    alive: bool
    published: bool = False  # the result of the stage is that of this attempt

    @property
    def job(self) -> str:
        return self.claim.slurm_job if self.claim else ""


def holder(claim: Claim) -> str:
    """The job or process that executes an attempt, for messages."""
    return f"Slurm job {claim.slurm_job}" if is_slurm_job(claim.slurm_job) else f"process {claim.pid} on {claim.host}"


def newest_checkpoint(folder: StageFolder) -> float:
    """When the last complete checkpoint was written, seconds since the epoch; 0 if there is none."""
    try:
        with os.scandir(folder.checkpoint) as entries:
            return max((entry.stat().st_mtime for entry in entries if not entry.name.startswith(".")), default=0.0)
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def seconds_since_restart(attempts: Sequence[tuple[Claim, float]]) -> float:
    """Seconds of the last attempt that started without a checkpoint, and of all after it. `attempts`: (claim, seconds), oldest first."""
    total = 0.0
    for claim, seconds in reversed(attempts):
        total += seconds
        if not claim.checkpoint:
            break
    return round(total, 3)


def seconds_before(folder: StageFolder, number: int) -> float:
    """Seconds that earlier attempts spent on the checkpoint that attempt `number` resumed from; 0 if it started without one."""
    claims = {each: claim for each in attempt_numbers(folder) if each <= number and (claim := read_claim(folder.attempt(each)))}
    if number not in claims or not claims[number].checkpoint:
        return 0.0
    earlier = [AttemptFiles(each, claim, read_outcome(folder.attempt(each)), False) for each, claim in claims.items() if each < number]
    return seconds_since_restart([(claims[each.number], attempt_seconds(folder, each)) for each in earlier])


def attempt_seconds(folder: StageFolder, attempt: AttemptFiles) -> float:
    """Seconds that an attempt took, by its outcome or else by its last heartbeat."""
    if attempt.outcome is not None or attempt.claim is None:
        return attempt.outcome.seconds if attempt.outcome else 0.0
    return max(0.0, modified_at(folder.attempt(attempt.number).claim) - attempt.claim.started)


def newest_claim(folder: StageFolder) -> int:
    """Number of the last attempt that was claimed; 0: none. Opening the folder makes NFS ask its server (close-to-open consistency)."""
    return next((number for number in reversed(attempt_numbers(folder)) if folder.attempt(number).claim.exists()), 0)


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
