"""A lock that allows one driver of a sweep at a time on users' machines. Two would be harmless, as passes are, but confusing.

Each driver has a numbered file, created exclusively; the highest number holds the lock. The lock is free when its driver has released it
or counts as dead (jobs.store.attempts), and the next driver takes the next number. Numbers are not reused. The drivers in Slurm need no
lock: they are links of one chain.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.errors import UsageError
from jobs.store.attempts import Heartbeat, claim_alive, new_claim
from jobs.store.clock import file_time, measure
from jobs.store.records import Claim, Decoder, create_json, read_json, write_json


@dataclass(frozen=True)
class _Turn(Claim):
    """The content of a lock file."""

    left: float | None = None  # when the lock was released, seconds since the epoch


_TURNS = Decoder(_Turn, None)


@contextlib.contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold the driver lock of the sweep in a folder. UsageError in one line if another process holds it."""
    measure(folder)
    while (mine := _take(folder)) is None:
        if (holder := driver_of(folder)) is not None:
            raise UsageError(refusal(folder, in_words(holder)))
    try:
        with Heartbeat(mine):
            yield
    finally:
        write_json(mine, {**(read_json(mine) or {}), "left": time.time()})


def driver_of(folder: Path) -> Claim | None:
    """The claim of the current driver of a sweep; None without one."""
    turns = _turns(folder)
    return _holder(turns[-1]) if turns else None


def refusal(folder: Path, driver: str) -> str:
    """Error message of a second driver: why it cannot start, and what to do."""
    return f"{folder}: this sweep is under way in {driver}: `sweep --show` shows its state, `sweep --cancel` ends it"


def in_words(holder: Claim) -> str:
    """The driver of a sweep in words: `process 4711 on alpha since 2026-11-21 09:26`."""
    return f"process {holder.pid} on {holder.host} since {time.strftime('%Y-%m-%d %H:%M', time.localtime(holder.started))}"


def _take(folder: Path) -> Path | None:
    """Create the next lock file; None if the lock is held, or another process created the file first."""
    turns = _turns(folder)
    if turns and _holder(turns[-1]):
        return None
    number = int(turns[-1].stem) + 1 if turns else 1
    mine = folder / "driver" / f"{number:04d}.json"
    return mine if create_json(mine, asdict(new_claim(number))) else None


def _holder(turn: Path) -> Claim | None:
    """The claim in a lock file; None if it was released, is damaged, or its driver is dead."""
    claim = _TURNS.read(turn)
    if claim is None or claim.left is not None:
        return None
    try:
        heartbeat = turn.stat().st_mtime
    except OSError:
        return None
    return claim if claim_alive(claim, heartbeat, live_jobs=None, now=file_time(turn.parents[1])) else None


def _turns(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "driver").glob("[0-9]*.json"), key=lambda path: int(path.stem))
