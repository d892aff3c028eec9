"""The clock by which records are compared: that of the file system that holds them, read in every process.

The clocks of machines differ by seconds, and by minutes where NTP fails. A file server stamps every file by its own clock, whatever machine
writes it. So times that another machine compares (start of an attempt, launch, submission) are taken from that clock, as heartbeats are.
It is measured once per process that writes; after that the kernel's boot-time clock counts, which no program sets and which runs while a
machine is suspended.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

AGREES_SECONDS = 1.0  # a smaller difference is the resolution of file times, or the time that the measurement took
_ZEROS: dict[str, float] = {}  # folder -> time of its file system when this machine's boot-time clock was 0


def measure(folder: Path) -> None:
    """Measure the clock of a folder's file system, once per process. For processes that write there; nothing if they cannot."""
    if str(folder) not in _ZEROS:
        with contextlib.suppress(OSError):
            _ZEROS[str(folder)] = _measured(folder)


def file_time(folder: Path) -> float:
    """Time by the clock of a folder's file system, in seconds since the epoch; by this machine's clock if it was not measured."""
    zero = _ZEROS.get(str(folder))
    return time.time() if zero is None else zero + _boot_seconds()


def _measured(folder: Path) -> float:
    """Time of the folder's file system when this machine's boot-time clock was 0, by a file that is created there."""
    before = time.time()
    descriptor, name = tempfile.mkstemp(prefix=".clock.", dir=folder)
    try:
        after, boot, stamp = time.time(), _boot_seconds(), os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        Path(name).unlink()
    offset = 0.0 if before - AGREES_SECONDS < stamp < after + AGREES_SECONDS else stamp - (before + after) / 2
    return after + offset - boot


def _boot_seconds() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
