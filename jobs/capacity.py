"""What this machine has, and which waiting tasks fit into what is free of it."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.config import Resources

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Capacity:
    """What tasks may use at once."""

    cpus: int
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them
    memory_gb: float


@dataclass(frozen=True)
class Needs:
    """What one task uses."""

    cpus: int
    gpus: int
    memory_gb: float


def capacity_here() -> Capacity:
    """Cores this process may run on, GPUs it may see, memory it may use; control groups are heeded."""
    return Capacity(_cpus(), _gpus(), _memory_gb())


def whole(resources: Resources, capacity: Capacity) -> Needs:
    """What a stage asks for, cut down to the whole machine: what asks for more than there is runs alone."""
    return Needs(
        cpus=min(resources.cpus, capacity.cpus),
        gpus=min(resources.gpus * resources.nodes, len(capacity.gpus)),
        memory_gb=min(resources.memory_gb, capacity.memory_gb),
    )


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
    taken = {device for _, devices in used for device in devices}
    devices = [device for device in capacity.gpus if device not in taken]
    found: list[tuple[int, tuple[str, ...]]] = []
    for index, needs in enumerate(waiting):
        if cpus <= 0:
            break
        if needs.cpus <= cpus and needs.memory_gb <= memory + 1e-6 and needs.gpus <= len(devices):
            found.append((index, tuple(devices[: needs.gpus])))
        cpus -= needs.cpus
        memory -= needs.memory_gb
        devices = devices[needs.gpus :]
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


def _memory_gb() -> float:
    total = next(
        (int(line.split()[1]) / 2**20 for line in _read(Path("/proc/meminfo")).splitlines() if line.startswith("MemTotal:")), math.inf
    )
    limit = _read(CGROUP / "memory.max").strip()
    return min(total, int(limit) / 2**30) if limit.isdigit() else total


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
