"""What this machine has, and which waiting tasks fit into what is free of it."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from jobs.config import Resources

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
