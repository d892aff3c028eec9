"""What the user cancelled: a record that outlives the jobs, so that nothing submits again what somebody has stopped.

    EXPERIMENT/cancelled.json      {"schema": 1, "cancelled": [{"time": T, "keys": [...] or null}, ...]}     null: everything

A cancellation holds until the experiment is launched again: `grid` is how a user says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from jobs.errors import UsageError
from jobs.store.layout import Layout
from jobs.store.records import DamagedRecordError, Decoder, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Cancelled:
    """Stages that are cancelled now."""

    everything: bool = False
    keys: frozenset[str] = frozenset()

    def __contains__(self, key: object) -> bool:
        return self.everything or key in self.keys


@dataclass(frozen=True)
class _Entry:
    """One cancellation."""

    time: float
    keys: tuple[str, ...] | None


@dataclass(frozen=True)
class _Record:
    """All of them, oldest first."""

    cancelled: tuple[_Entry, ...]


_RECORDS = Decoder(_Record, SCHEMA)


def record_cancellation(layout: Layout, keys: Collection[str] | None, now: float) -> None:
    """Remember that the user cancelled some stages, or everything (None); written before any job is told."""
    record = _Record((*_entries(layout), _Entry(now, None if keys is None else tuple(sorted(keys)))))
    write_json(layout.cancellations, {"schema": SCHEMA, **asdict(record)})


def read_cancellations(layout: Layout, since: float) -> Cancelled:
    """What was cancelled after `since`, the last launch (seconds since the epoch)."""
    found = [entry.keys for entry in _entries(layout) if entry.time >= since]
    return Cancelled(any(keys is None for keys in found), frozenset(key for keys in found if keys is not None for key in keys))


def last_cancellation(layout: Layout) -> float:
    """When something was cancelled last, seconds since the epoch by the clock of whoever did; 0 if nothing ever was."""
    return max((entry.time for entry in _entries(layout)), default=0.0)


def _entries(layout: Layout) -> tuple[_Entry, ...]:
    try:
        record = _RECORDS.load(layout.cancellations)
    except DamagedRecordError as error:  # a file that cannot be read is no leave to go on: a cancellation is final
        raise UsageError(f"{layout.cancellations}: damaged ({error}); delete it if nothing is to stay cancelled") from error
    return record.cancelled if record else ()
