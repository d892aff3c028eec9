"""What this machine has, and which waiting tasks fit into what is free of it."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from jobs.experiment.config import Resources
from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import attempt_numbers, read_outcome, read_result

KEPT_FREE = 0.1  # of either memory: what is measured is one stage's, and the next may have longer utterances
CONTEXT_BYTES = 600 << 20  # of GPU memory that a process takes beside what its allocator counts: context, kernels, libraries
SIBLINGS = 16  # results that are read for their peaks, at most
CGROUP = Path("/sys/fs/cgroup")
GpuMemory = int | None  # bytes; None where nobody says


@dataclass(frozen=True)
class Capacity:
    """What tasks may use at once."""

    cpus: int
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them
    memory_gb: float
    gpu_bytes: GpuMemory = 0  # memory of the smallest GPU; 0: there is none


@dataclass(frozen=True)
class Needs:
    """What one task uses."""

    cpus: int
    gpus: int
    memory_gb: float
    share: int = 1  # tasks that may be on its GPUs at the same time, this one included


def capacity_here() -> Capacity:
    """Cores this process may run on, GPUs it may see, memory it may use; control groups are heeded."""
    gpus = _gpus()
    return Capacity(_cpus(), gpus, _memory_gb(), _gpu_bytes(gpus))


def free_memory() -> int:
    """Bytes of host memory that nobody uses now, as far as this process may use them."""
    free = _meminfo("MemAvailable")
    return int(min(free, _memory_gb()) * 2**30)


def whole(resources: Resources, capacity: Capacity) -> Needs:
    """What a stage asks for, cut down to the whole machine: what asks for more than there is runs alone."""
    return Needs(
        cpus=min(resources.cpus * resources.nodes, capacity.cpus),
        gpus=min(resources.gpus * resources.nodes, len(capacity.gpus)),
        memory_gb=min(resources.memory_gb * resources.nodes, capacity.memory_gb),
    )


def processes_here(resources: Resources, needs: Needs) -> int:
    """How many processes compute a stage on this machine: as many as asked for, each with a GPU of its own, or at least a core.

    Without the GPUs that were asked for, one does it all.
    """
    return max(1, min(resources.team, needs.gpus if resources.gpus else needs.cpus))


def fitting(
    waiting: Sequence[Needs], in_use: Iterable[tuple[Needs, tuple[str, ...]]], capacity: Capacity
) -> list[tuple[int, tuple[str, ...]]]:
    """Indices of the waiting tasks to start now, each with its GPUs. Pure.

    `waiting` comes with the most urgent first. What a task lacks is kept free for it, so that small tasks cannot hold up a large urgent
    one, while tasks that need none of it may pass.
    """
    used = list(in_use)
    cpus = capacity.cpus - sum(needs.cpus for needs, _ in used)
    memory = capacity.memory_gb - sum(needs.memory_gb for needs, _ in used)
    free = dict.fromkeys(capacity.gpus, Fraction(1))
    for needs, devices in used:
        for device in devices:
            free[device] = free.get(device, Fraction(1)) - Fraction(1, needs.share)
    found: list[tuple[int, tuple[str, ...]]] = []
    for index, needs in enumerate(waiting):
        if cpus <= 0:
            break
        part = Fraction(1, needs.share)
        chosen = sorted(capacity.gpus, key=lambda device: -free[device])[: needs.gpus]  # the emptiest, in their order
        enough = len(chosen) == needs.gpus and all(free[device] >= part for device in chosen)
        if needs.cpus <= cpus and needs.memory_gb <= memory + 1e-6 and enough:
            found.append((index, tuple(chosen)))
        cpus -= needs.cpus
        memory -= needs.memory_gb
        for device in chosen:
            free[device] -= part
    return found


def _cpus() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        allowed = min(allowed, max(1, math.ceil(int(quota) / int(period))))
    return allowed


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores everything from the first invalid name on; "-1" is how people hide all devices
        valid = names[: next((index for index, name in enumerate(names) if not name or name == "-1"), len(names))]
        return tuple(valid)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if listed.returncode != 0:
        return ()
    return tuple(str(index) for index, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU ")))


def _gpu_bytes(gpus: Sequence[str]) -> GpuMemory:
    if not gpus:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={','.join(gpus)}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = asked.stdout.split()
    return min(int(line) << 20 for line in lines) if asked.returncode == 0 and lines and all(line.isdigit() for line in lines) else None


def _memory_gb() -> float:
    total = _meminfo("MemTotal")
    limit = _read(CGROUP / "memory.max").strip()
    return min(total, int(limit) / 2**30) if limit.isdigit() else total


def _meminfo(name: str) -> float:
    """GiB."""
    lines = _read(Path("/proc/meminfo")).splitlines()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")), math.inf)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Peak:
    """The most memory that a stage had at any time."""

    host_bytes: int
    gpu_bytes: int  # 0: it used none, or was computed where there is none


@dataclass(frozen=True)
class Room:
    """What stages computed at the same time have in all."""

    host_bytes: int
    gpu_bytes: GpuMemory  # of one GPU; 0: there is none, None: nobody says
    threads: int


def fits(peak: Peak, room: Room) -> int:
    """How many stages with such a peak can be computed at the same time; at least 1. Pure."""
    counts = [room.threads, int(room.host_bytes * (1 - KEPT_FREE)) // max(1, peak.host_bytes)]
    if room.gpu_bytes is None or (room.gpu_bytes and not peak.gpu_bytes):
        return 1
    if room.gpu_bytes:
        counts.append(int(room.gpu_bytes * (1 - KEPT_FREE)) // (peak.gpu_bytes + CONTEXT_BYTES))
    return max(1, min(counts))


def peak_of(provenance: Mapping[str, Any]) -> Peak | None:
    """What a result says of the memory of its stage; None if it does not."""
    host, gpu = provenance.get("peak_rss_bytes"), provenance.get("peak_gpu_bytes", 0)
    return Peak(host, gpu) if isinstance(host, int) and isinstance(gpu, int) and host > 0 else None


def larger(first: Peak | None, second: Peak | None) -> Peak | None:
    """A peak that both stay below."""
    if first is None or second is None:
        return first or second
    return Peak(max(first.host_bytes, second.host_bytes), max(first.gpu_bytes, second.gpu_bytes))


def measured_peak(stages: Iterable[tuple[StageFolder, str]]) -> Peak | None:
    """The largest peak among the results that some stages (folder, key) have; of a few, which is as good as all."""
    found: Peak | None = None
    read = 0
    for folder, key in stages:
        result = read_result(folder, key) if folder.result.exists() else None
        if result is not None:
            found, read = larger(found, peak_of(result.provenance)), read + 1
        if read == SIBLINGS:
            break
    return found


def was_crowded(folder: StageFolder) -> bool:
    """Whether memory has ever run out for a stage while others ran beside it."""
    outcomes = (read_outcome(folder.attempt(number)) for number in attempt_numbers(folder))
    return any(outcome is not None and outcome.kind == FailureClass.crowded.name for outcome in outcomes)


def room_here(threads: int) -> Room:
    """What this array element, or this machine, has: Slurm's request where there is one, else what is free."""
    capacity = capacity_here()
    asked = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) << 20 or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * threads << 20
    return Room(min(filter(None, (asked, free_memory()))), capacity.gpu_bytes, threads)
