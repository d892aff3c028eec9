"""The last launch of an experiment, as every process reads it from `experiment.json`: workers and links of the controller chain too.

A launch is numbered by its time, which is later than that of the launch before it whatever the clocks of their machines say. Records carry
this number, so that what happened before a launch and what happened after it can be told apart without comparing clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.store.cancellations import last_cancellation
from jobs.store.clock import file_time
from jobs.store.layout import Layout
from jobs.store.records import Decoder

STEP_SECONDS = 0.001  # between two launches at least


@dataclass(frozen=True)
class _Launch:
    """The part of `experiment.json` that is read."""

    launched: float


_LAUNCHES = Decoder(_Launch, None)


def launched_at(layout: Layout) -> float:
    """Time of the last launch in seconds since the epoch, which is its number; 0 if there was none."""
    found = _LAUNCHES.read(layout.experiment_file)
    return found.launched if found else 0.0


def next_launch(layout: Layout) -> float:
    """Time of a launch that is made now: later than that of the launch before it, and than any cancellation, which it lifts."""
    return max(file_time(layout.root), launched_at(layout) + STEP_SECONDS, last_cancellation(layout) + STEP_SECONDS)


def in_launch(launch: float, when: float, since: float) -> bool:
    """Whether something belongs to the launch at `since`. `launch`: number of the launch that it states; 0: its time `when` decides."""
    return (launch or when) >= since
