"""Progress messages at a limited rate."""

from __future__ import annotations

import time
from collections.abc import Callable

INTERVAL = 10.0  # seconds between lines


class Progress:
    """Passes messages on if the last one is at least `interval` seconds ago, and always the last one of work longer than that."""

    def __init__(self, report: Callable[[str], None], interval: float = INTERVAL) -> None:
        self._report = report
        self._interval = interval
        self._last = time.monotonic()
        self._started = self._last

    def report(self, line: str) -> None:
        """Pass a message on in any case."""
        self._last = time.monotonic()
        self._report(line)

    def due(self) -> bool:
        """Whether `update` would pass a message on now."""
        return time.monotonic() - self._last >= self._interval

    def update(self, done: int, total: int, what: str, more: str = "") -> None:
        """Pass on "`what` DONE/TOTAL`more`" if it is due, and the last one if the work took longer than the interval."""
        if self.due() or (done == total and time.monotonic() - self._started >= self._interval):
            self.report(f"{what} {done}/{total}{more}")
