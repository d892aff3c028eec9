"""Stages that the user cancelled: a record that outlives their jobs, so that no later pass submits them again.

    EXPERIMENT/cancelled.json      {"schema": 1, "cancelled": [{"time": T, "keys": [...] or null}, ...]}     null: everything

A cancellation holds until the user launches the experiment again with `grid`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jobs.errors import UsageError
from jobs.store.layout import Layout
from jobs.store.records import read_json, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Cancelled:
    """Stages that are cancelled now."""

    everything: bool = False
    keys: frozenset[str] = frozenset()

    def __contains__(self, key: object) -> bool:
        return self.everything or key in self.keys


def record_cancellation(layout: Layout, keys: Collection[str] | None, now: float) -> None:
    """Record that the user cancelled some stages, or everything (None). Call it before any job is cancelled."""
    entries = [{"time": time, "keys": names} for time, names in _entries(layout)]
    write_json(
        layout.cancellations, {"schema": SCHEMA, "cancelled": [*entries, {"time": now, "keys": None if keys is None else sorted(keys)}]}
    )


def read_cancellations(layout: Layout, since: float) -> Cancelled:
    """What was cancelled after `since`, the last launch (seconds since the epoch)."""
    found = [keys for time, keys in _entries(layout) if time >= since]
    return Cancelled(any(keys is None for keys in found), frozenset(key for keys in found if keys is not None for key in keys))


def last_cancellation(layout: Layout) -> float:
    """Time of the last cancellation, seconds since the epoch by the clock of the machine that recorded it; 0 if there is none."""
    return max((time for time, _ in _entries(layout)), default=0.0)


def _entries(layout: Layout) -> list[tuple[float, list[str] | None]]:
    value = read_json(layout.cancellations)
    if value is None and not layout.cancellations.exists():
        return []
    try:  # an unreadable file is an error, not an empty list: a cancellation is final
        if value is None or value["schema"] != SCHEMA:
            raise ValueError("incomplete, or written by another version of the program")
        return [(float(entry["time"]), _keys(entry["keys"])) for entry in value["cancelled"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{layout.cancellations}: damaged ({error!r}); delete it if nothing is to stay cancelled") from error


def _keys(value: object) -> list[str] | None:
    if value is not None and not isinstance(value, list):
        raise TypeError(f"keys {value!r}")
    return value if value is None else [str(key) for key in value]
