"""Memory of stages: the peak of this process, the peaks that finished stages recorded, and how many stages fit into memory at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import attempt_numbers, read_outcome, read_result
from jobs.worker.machine import GpuMemory, capacity_here, free_memory

KEPT_FREE = 0.1  # share of host and GPU memory: a peak is that of one finished stage, and the next may have longer utterances
CONTEXT_BYTES = 600 << 20  # GPU memory of a process outside of torch's allocator: CUDA context, kernels, libraries
SIBLINGS = 16  # the most results whose peaks are read


@dataclass(frozen=True)
class ResidentMemory:
    """Memory of a process in bytes."""

    peak: int  # the most that was resident since the process started
    private: int  # resident now, anonymous or shared without a file
    mapped: int  # resident now, pages of files, which the kernel can drop


def resident_memory(status: Path = Path("/proc/self/status")) -> ResidentMemory | None:
    """Memory of this process; None where the kernel does not report it."""
    try:
        lines = (line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines())
        found = {words[0]: int(words[1]) << 10 for words in lines if len(words) == 3 and words[2] == "kB"}
        return ResidentMemory(found["VmHWM:"], found["RssAnon:"] + found["RssShmem:"], found["RssFile:"])
    except (OSError, KeyError, ValueError):
        return None


class PrivatePeak:
    """The most private memory that this process had at any sample; `bytes` is 0 where the kernel does not report it."""

    def __init__(self, read: Callable[[], ResidentMemory | None] = resident_memory) -> None:
        self._read = read
        self._lock = threading.Lock()  # the heartbeat thread samples too
        self._last = read()
        self.bytes = self._last.private if self._last else 0

    def sample(self) -> None:
        """Include what the process has now, and a rise of its peak since the last sample."""
        with self._lock:
            last, now = self._last, self._read()
            if last is None or now is None:
                return
            risen = now.peak - min(last.mapped, now.mapped) if now.peak > last.peak else 0
            self.bytes, self._last = max(self.bytes, now.private, risen), now


@dataclass(frozen=True)
class Peak:
    """The most memory that a stage had at any time."""

    host_bytes: int
    gpu_bytes: int  # 0: it used no GPU


@dataclass(frozen=True)
class Room:
    """What concurrent stages share."""

    host_bytes: int
    gpu_bytes: GpuMemory  # of one GPU; 0: no GPU, None: unknown
    threads: int


def how_many_fit(peak: Peak, room: Room) -> int:
    """How many stages with such a peak can be computed at the same time; at least 1. Pure."""
    counts = [room.threads, int(room.host_bytes * (1 - KEPT_FREE)) // max(1, peak.host_bytes)]
    if room.gpu_bytes is None or (room.gpu_bytes and not peak.gpu_bytes):
        return 1
    if room.gpu_bytes:
        counts.append(int(room.gpu_bytes * (1 - KEPT_FREE)) // (peak.gpu_bytes + CONTEXT_BYTES))
    return max(1, min(counts))


def peak_of(provenance: Mapping[str, Any]) -> Peak | None:
    """The peak that a result records in its provenance; None if it records none."""
    host, gpu = provenance.get("peak_rss_bytes"), provenance.get("peak_gpu_bytes", 0)
    return Peak(host, gpu) if isinstance(host, int) and isinstance(gpu, int) and host > 0 else None


def larger_peak(first: Peak | None, second: Peak | None) -> Peak | None:
    """The maximum of two peaks, of host and GPU memory separately."""
    if first is None or second is None:
        return first or second
    return Peak(max(first.host_bytes, second.host_bytes), max(first.gpu_bytes, second.gpu_bytes))


def measured_peak(stages: Iterable[tuple[StageFolder, str]]) -> Peak | None:
    """The largest peak among the results of some stages (folder, key); reads at most `SIBLINGS` of them."""
    found: Peak | None = None
    read = 0
    for folder, key in stages:
        result = read_result(folder, key) if folder.result.exists() else None
        if result is not None:
            found, read = larger_peak(found, peak_of(result.provenance)), read + 1
        if read == SIBLINGS:
            break
    return found


def was_crowded(folder: StageFolder) -> bool:
    """Whether a stage ever ran out of memory while other stages ran beside it."""
    outcomes = (read_outcome(folder.attempt(number)) for number in attempt_numbers(folder))
    return any(outcome is not None and outcome.kind == FailureClass.crowded.name for outcome in outcomes)


def room_here(threads: int) -> Room:
    """What this array task has by its Slurm request; outside of Slurm, what is free on this machine."""
    capacity = capacity_here()
    requested = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) << 20 or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * threads << 20
    return Room(min(filter(None, (requested, free_memory()))), capacity.gpu_bytes, threads)
