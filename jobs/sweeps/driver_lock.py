"""One process at a time drives a sweep: two Tune drivers on one folder would overwrite each other's state.

Drivers take turns. Each turn is a numbered file that one process alone can make, and the highest number counts. It is over when its driver
has left or is taken for dead (jobs.store.attempts), and only then may the next number be taken. Numbers are never used again.
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

TAKE_OVER_SECONDS = GONE_SECONDS + 15  # that a driver in an allocation waits for the sign of life of the one before it to grow old
LOOK_AGAIN_SECONDS = 1.0


@dataclass
class Turn:
    """A driver's time with a sweep."""

    file: Path
    complete: bool = False  # set by the driver: every trial has ended


@dataclass(frozen=True)
class _Taken(Claim):
    """What the file of a turn says."""

    left: float | None = None  # when its driver left, seconds since the epoch
    complete: bool = False  # every trial had ended by then


_TURNS = Decoder(_Taken, None)


@contextlib.contextmanager
def driving(folder: SweepFolder, *, allocated: bool = False) -> Iterator[Turn]:
    """Be the driver of a sweep while the block lasts. UsageError in one line where another process is.

    `allocated`: this is the one driver of a Slurm allocation, of which a sweep never has two: another job that drove it is gone.
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
    """Whether every trial had ended when the last driver left."""
    turns = _turns(folder)
    last = _TURNS.read(turns[-1]) if turns else None
    return last is not None and last.complete


def driver_of(folder: SweepFolder, *, allocated: bool = False) -> Claim | None:
    """Who drives a sweep now; None: nobody."""
    turns = _turns(folder)
    return _holder(turns[-1], allocated=allocated) if turns else None


def refusal(folder: SweepFolder, holder: Claim) -> str:
    """Why no other driver can begin, and what can be done, in one line."""
    return f"{folder.path}: this sweep is under way in {in_words(holder)}: `sweep --show` shows how it stands, `sweep --cancel` ends it"


def in_words(holder: Claim) -> str:
    """Who drives a sweep: `process 4711 on alpha since 2026-11-21 09:26`."""
    where = f"job {holder.slurm_job}" if holder.slurm_job else f"process {holder.pid} on {holder.host}"
    return f"{where} since {time.strftime('%Y-%m-%d %H:%M', time.localtime(holder.started))}"


def _take(folder: SweepFolder, *, allocated: bool) -> Path | None:
    """The turn that comes next, now ours; None where somebody has the last one, or was quicker."""
    turns = _turns(folder)
    if turns and _holder(turns[-1], allocated=allocated):
        return None
    number = int(turns[-1].stem) + 1 if turns else 1
    mine = _place(folder) / f"{number:04d}.json"
    return mine if create_json(mine, asdict(new_claim(number))) else None


def _holder(turn: Path, *, allocated: bool) -> Claim | None:
    """Who has a turn and has not left."""
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
