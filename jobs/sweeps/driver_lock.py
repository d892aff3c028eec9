"""A lock that allows one driver of a sweep at a time: two Tune drivers on one folder would overwrite each other's state.

Each driver has a numbered file, created exclusively; the highest number holds the lock. The lock is free when its driver has released it
or counts as dead (jobs.store.attempts), and the next driver takes the next number. Numbers are not reused.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.errors import UsageError
from jobs.store.attempts import GONE_SECONDS, Heartbeat, claim_alive, new_claim
from jobs.store.records import Claim, Decoder, create_json, read_json, write_json
from jobs.sweeps.records import SweepFolder

TAKE_OVER_SECONDS = GONE_SECONDS + 15  # in an allocation: wait until the heartbeat of the former driver is stale
LOOK_AGAIN_SECONDS = 1.0


@dataclass
class Turn:
    """The lock, held by this process."""

    file: Path
    complete: bool = False  # set by the driver when every trial has ended


@dataclass(frozen=True)
class _Taken(Claim):
    """The content of a lock file."""

    left: float | None = None  # when the lock was released, seconds since the epoch
    complete: bool = False  # whether every trial had ended by then


_TURNS = Decoder(_Taken, None)


@contextlib.contextmanager
def driving(folder: SweepFolder, *, allocated: bool = False) -> Iterator[Turn]:
    """Hold the driver lock of a sweep. UsageError in one line if another process holds it.

    `allocated`: this driver runs in the sweep's Slurm allocation, of which there is one at a time, so a driver in another job is gone.
    """
    end = time.monotonic() + (TAKE_OVER_SECONDS if allocated else 0.0)
    while (mine := _take(folder, allocated=allocated)) is None:
        holder = driver_of(folder, allocated=allocated)
        if holder is not None and time.monotonic() >= end:
            raise UsageError(refusal(folder, holder))
        time.sleep(LOOK_AGAIN_SECONDS if holder else 0.0)
    turn = Turn(mine)
    try:
        with Heartbeat(mine):
            yield turn
    finally:
        write_json(mine, {**(read_json(mine) or {}), "left": time.time(), "complete": turn.complete})


def complete(folder: SweepFolder) -> bool:
    """Whether every trial had ended when the last driver released the lock."""
    turns = _turns(folder)
    last = _TURNS.read(turns[-1]) if turns else None
    return last is not None and last.complete


def driver_of(folder: SweepFolder, *, allocated: bool = False) -> Claim | None:
    """The claim of the current driver of a sweep; None without one."""
    turns = _turns(folder)
    return _holder(turns[-1], allocated=allocated) if turns else None


def refusal(folder: SweepFolder, holder: Claim) -> str:
    """Error message of a second driver: why it cannot start, and what to do."""
    return f"{folder.path}: this sweep is under way in {in_words(holder)}: `sweep --show` shows how it stands, `sweep --cancel` ends it"


def in_words(holder: Claim) -> str:
    """The driver of a sweep in words: `process 4711 on alpha since 2026-11-21 09:26`."""
    where = f"job {holder.slurm_job}" if holder.slurm_job else f"process {holder.pid} on {holder.host}"
    return f"{where} since {time.strftime('%Y-%m-%d %H:%M', time.localtime(holder.started))}"


def _take(folder: SweepFolder, *, allocated: bool) -> Path | None:
    """Create the next lock file; None if the lock is held, or another process created the file first."""
    turns = _turns(folder)
    if turns and _holder(turns[-1], allocated=allocated):
        return None
    number = int(turns[-1].stem) + 1 if turns else 1
    mine = _place(folder) / f"{number:04d}.json"
    return mine if create_json(mine, asdict(new_claim(number))) else None


def _holder(turn: Path, *, allocated: bool) -> Claim | None:
    """The claim in a lock file; None if it was released, is damaged, or its driver is dead."""
    claim = _TURNS.read(turn)
    if claim is None or claim.left is not None:
        return None
    try:
        heartbeat = turn.stat().st_mtime
    except OSError:
        return None
    gone = [claim.slurm_job] if allocated and claim.slurm_job else []
    return claim if claim_alive(claim, heartbeat, live_jobs=None, now=time.time(), gone=gone) else None


def _turns(folder: SweepFolder) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in _place(folder).glob("[0-9]*.json")), key=lambda path: int(path.stem))


def _place(folder: SweepFolder) -> Path:
    return folder.path / "driver"
