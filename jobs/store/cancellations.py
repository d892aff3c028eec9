"""Stages that the user cancelled: a record that outlives their jobs, so that no later pass submits them again.

    EXPERIMENT/cancelled.json      {"schema": 1, "cancelled": [{"time": T, "keys": [...] or null}, ...]}     null: everything

A cancellation holds until the user launches the experiment again with `grid`.
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
    """Record that the user cancelled some stages, or everything (None). Call it before any job is cancelled."""
    record = _Record((*_entries(layout), _Entry(now, None if keys is None else tuple(sorted(keys)))))
    write_json(layout.cancellations, {"schema": SCHEMA, **asdict(record)})


def read_cancellations(layout: Layout, since: float) -> Cancelled:
    """What was cancelled after `since`, the last launch (seconds since the epoch)."""
    found = [entry.keys for entry in _entries(layout) if entry.time >= since]
    return Cancelled(any(keys is None for keys in found), frozenset(key for keys in found if keys is not None for key in keys))


def last_cancellation(layout: Layout) -> float:
    """Time of the last cancellation, seconds since the epoch by the clock of the machine that recorded it; 0 if there is none."""
    return max((entry.time for entry in _entries(layout)), default=0.0)


def _entries(layout: Layout) -> tuple[_Entry, ...]:
    try:
        record = _RECORDS.load(layout.cancellations)
    except DamagedRecordError as error:  # not an empty list: a cancellation is final
        raise UsageError(f"{layout.cancellations}: damaged ({error}); delete it if nothing is to stay cancelled") from error
    return record.cancelled if record else ()
