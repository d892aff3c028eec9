"""How much memory a process had at its peak that the kernel cannot take back: what is mapped from files it can drop and read again.

The kernel keeps the peak of all resident pages, not of these alone. So it is looked at now and then: where that peak has risen since the
last look, the pages of files are taken for no more than at the two looks. What is said is therefore too much rather than too little.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resident:
    """Bytes of a process."""

    peak: int  # resident at the most, since it began
    own: int  # resident now and its own, or shared without a file
    mapped: int  # resident now, pages of files


def resident(status: Path = Path("/proc/self/status")) -> Resident | None:
    """Of this process; None where the kernel does not say."""
    try:
        lines = (line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines())
        found = {words[0]: int(words[1]) << 10 for words in lines if len(words) == 3 and words[2] == "kB"}
        return Resident(found["VmHWM:"], found["RssAnon:"] + found["RssShmem:"], found["RssFile:"])
    except (OSError, KeyError, ValueError):
        return None


class OwnPeak:
    """The most that a process had of its own, as far as was looked; `bytes` is 0 where the kernel does not say."""

    def __init__(self, read: Callable[[], Resident | None] = resident) -> None:
        self._read = read
        self._lock = threading.Lock()  # looked at by the thread that keeps the heartbeat too
        self._last = read()
        self.bytes = self._last.own if self._last else 0

    def look(self) -> None:
        """Take in what the process has now, and what it has had since the last look."""
        with self._lock:
            last, now = self._last, self._read()
            if last is None or now is None:
                return
            risen = now.peak - min(last.mapped, now.mapped) if now.peak > last.peak else 0
            self.bytes, self._last = max(self.bytes, now.own, risen), now
