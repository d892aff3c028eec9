"""CPU cores, GPUs and memory of this machine, and which waiting tasks fit into what is free."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from jobs.experiment.config import Resources

CGROUP = Path("/sys/fs/cgroup")
GpuMemory = int | None  # bytes; None: unknown


@dataclass(frozen=True)
class Capacity:
    """What all tasks together may use."""

    cpus: int
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them
    memory_gb: float
    gpu_bytes: GpuMemory = 0  # memory of the smallest GPU; 0: no GPU


@dataclass(frozen=True)
class Needs:
    """What one task needs."""

    cpus: int
    gpus: int
    memory_gb: float
    share: int = 1  # tasks that may use its GPUs at the same time, this one included


def capacity_here() -> Capacity:
    """Cores, GPUs and memory this process may use, by its CPU affinity, CUDA_VISIBLE_DEVICES and control group."""
    gpus = _gpus()
    return Capacity(_cpus(), gpus, _memory_gb(), _gpu_bytes(gpus))


def free_memory() -> int:
    """Bytes of host memory that are free now and that this process may use."""
    return int(min(_meminfo("MemAvailable"), _memory_gb()) * 2**30)


def needs_here(resources: Resources, capacity: Capacity) -> Needs:
    """What a stage requests, at most the whole machine: a stage that requests more than that runs alone."""
    return Needs(
        cpus=min(resources.cpus * resources.nodes, capacity.cpus),
        gpus=min(resources.gpus * resources.nodes, len(capacity.gpus)),
        memory_gb=min(resources.memory_gb * resources.nodes, capacity.memory_gb),
    )


def processes_here(resources: Resources, needs: Needs) -> int:
    """How many processes compute a stage on this machine: as many as requested, each with its own GPU or, without GPUs, at least one core.

    One process if GPUs were requested and the machine has none.
    """
    return max(1, min(resources.team, needs.gpus if resources.gpus else needs.cpus))


def tasks_to_start(
    waiting: Sequence[Needs], in_use: Iterable[tuple[Needs, tuple[str, ...]]], capacity: Capacity
) -> list[tuple[int, tuple[str, ...]]]:
    """Indices of the waiting tasks to start now, each with its GPUs. Pure.

    `waiting` is sorted by priority, highest first. Resources that a task waits for are reserved for it, so that small tasks cannot delay a
    large urgent one; tasks that need none of them may start before it.
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
        chosen = sorted(capacity.gpus, key=lambda device: -free[device])[: needs.gpus]  # the freest first
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
        # CUDA ignores everything from the first invalid name on; "-1" is the usual way to hide all devices
        return tuple(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    listed = _nvidia_smi("-L") or ""
    return tuple(str(index) for index, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU ")))


def _gpu_bytes(gpus: Sequence[str]) -> GpuMemory:
    if not gpus:
        return 0
    lines = (_nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={','.join(gpus)}") or "").split()
    return min(int(line) << 20 for line in lines) if lines and all(line.isdigit() for line in lines) else None


def _nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where it is missing or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _memory_gb() -> float:
    total = _meminfo("MemTotal")
    limit = _read(CGROUP / "memory.max").strip()
    return min(total, int(limit) / 2**30) if limit.isdigit() else total


def _meminfo(name: str) -> float:
    """A value of /proc/meminfo in GiB; infinite if it is missing."""
    lines = _read(Path("/proc/meminfo")).splitlines()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")), math.inf)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
