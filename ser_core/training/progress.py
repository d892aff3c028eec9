"""Progress lines at a bounded rate."""

from __future__ import annotations

import time
from collections.abc import Callable

INTERVAL = 10.0  # seconds between lines


class Progress:
    """Passes on a line when the last one is long enough ago, and always the final one of a long stretch of work."""

    def __init__(self, report: Callable[[str], None], interval: float = INTERVAL) -> None:
        self._report = report
        self._interval = interval
        self._last = time.monotonic()
        self._started = self._last

    def report(self, line: str) -> None:
        """A line that must not be missed."""
        self._last = time.monotonic()
        self._report(line)

    def due(self) -> bool:
        """Whether a line would be passed on now."""
        return time.monotonic() - self._last >= self._interval

    def update(self, done: int, total: int, what: str, more: str = "") -> None:
        """`what` DONE/TOTAL `more`; the last one only where the work took longer than an interval."""
        if self.due() or (done == total and time.monotonic() - self._started >= self._interval):
            self.report(f"{what} {done}/{total}{more}")
