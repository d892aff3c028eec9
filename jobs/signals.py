"""How a process is asked to stop: stop signals, Slurm's warning before the time limit, Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SLICE_SECONDS = 0.2  # how soon Ctrl-C is heard
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
WARNING_SIGNAL = signal.SIGUSR1  # what Slurm is told to send before the time limit (slurm_templates/stage.sh.j2)


class StopRequest:
    """Turns true when this process is asked to write a checkpoint and leave."""

    def __init__(self) -> None:
        self.signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0

    def listen(self) -> None:
        """From now on the stop signals only set this flag."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: self.ask(number))

    def ask(self, number: int) -> None:
        """Ask by the number of a signal. The first says why: at its time limit a job is warned, then terminated."""
        self.signal = self.signal or number


class Interrupts:
    """Counts Ctrl-C and requests to terminate while its `with` block lasts, instead of being torn out of the middle of something.

    `stopped` tells the count in their place, where it is not signals that ask this process to stop.
    """

    def __init__(self, stopped: Callable[[], int] | None = None) -> None:
        self._stopped = stopped
        self._noted = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if self._stopped is None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._former[number] = signal.signal(number, self._note)
        return self

    @property
    def count(self) -> int:
        """How often this process was asked to stop."""
        return self._noted if self._stopped is None else self._stopped()

    def __exit__(self, *error: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def pause(self, seconds: float) -> None:
        """Sleep, but not on after an interrupt."""
        end = time.monotonic() + seconds
        while not self.count and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_SECONDS))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted += 1


class LinkSignals:
    """Notes what Slurm sends before it takes the job away: the warning, SIGTERM."""

    def __init__(self) -> None:
        self.asked_to_leave = False  # and nobody says how much time there is
        self.warned = False  # the time limit is near
        self._former: dict[int, Any] = {}

    def __enter__(self) -> LinkSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        warned = self.warned
        while not self.asked_to_leave and self.warned == warned and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_SECONDS))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.warned = True
        else:
            self.asked_to_leave = True


@contextmanager
def signals_heard() -> Iterator[Callable[[], bool]]:
    """Whether there was a Ctrl-C or a request to terminate while Ray starts or ends: neither is to be cut short."""
    heard = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: heard
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
