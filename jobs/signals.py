"""How a process is asked to stop: stop signals, Slurm's warning before the time limit, Ctrl-C. All signal handlers are installed here."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SLICE_SECONDS = 0.2  # the longest delay between Ctrl-C and its effect
INTERRUPT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # stop a launcher
WARNING_SIGNAL = signal.SIGUSR1  # sent by Slurm before the time limit, as slurm_templates/stage.sh.j2 requests
STOP_SIGNALS = (signal.SIGTERM, WARNING_SIGNAL, signal.SIGUSR2, signal.SIGINT)  # stop a worker


def install_handler(numbers: Sequence[int], handler: Any) -> None:
    """Install one handler (a function, SIG_IGN or SIG_DFL) for several signals."""
    for number in numbers:
        signal.signal(number, handler)


@contextmanager
def restored_handlers(numbers: Sequence[int]) -> Iterator[None]:
    """Restore the handlers of these signals at the end of the block."""
    former = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class StopRequest:
    """A flag that turns true when this process is asked to write a checkpoint and exit."""

    def __init__(self) -> None:
        self.signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0

    def install(self) -> None:
        """Make the stop signals set this flag, and do nothing else."""
        install_handler(STOP_SIGNALS, lambda number, frame: self.request(number))

    def request(self, number: int) -> None:
        """Set the flag. The first signal is kept as the reason: at its time limit a job is warned first, then terminated."""
        self.signal = self.signal or number


class Interrupts:
    """Counts requests to stop while its `with` block lasts; the code inside decides when to act on them.

    `numbers`: signals that request a stop.
    `requests`: returns the count, where requests arrive some other way than by signals; no handler is installed then.
    """

    def __init__(self, requests: Callable[[], int] | None = None, *, numbers: Sequence[int] = INTERRUPT_SIGNALS) -> None:
        self._requests = requests
        self._count = 0
        self._numbers = () if requests else tuple(numbers)
        self._former = restored_handlers(self._numbers)

    def __enter__(self) -> Interrupts:
        self._former.__enter__()
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        self._former.__exit__(None, None, None)

    def install(self) -> None:
        """Install the handlers again, after other code has replaced them."""
        install_handler(self._numbers, self.note)

    @property
    def count(self) -> int:
        """Number of requests to stop so far."""
        return self._requests() if self._requests else self._count

    def pause(self, seconds: float) -> None:
        """Sleep until a request to stop arrives; not at all after one."""
        end = time.monotonic() + seconds
        while not self.count and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_SECONDS))

    def note(self, number: int = 0, frame: FrameType | None = None) -> None:
        """The signal handler: count a request."""
        self._count += 1
