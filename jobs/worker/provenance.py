"""Provenance of a result: host, device, package versions, Slurm ids, durations and memory of an attempt."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.worker.memory import PrivatePeak

SLURM_FACTS = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_CLUSTER_NAME",
)


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed versions of the named distributions; None for one that is not installed."""
    return {name: _version(name) for name in names}


class Stopwatch:
    """Measures time and memory of one attempt, from its construction on."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._cpu = _cpu_seconds()
        self._started = datetime.now(UTC)
        self._private = PrivatePeak()
        _reset_gpu_peak()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return round(time.monotonic() - self._begun, 3)

    def sample(self) -> None:
        """Measure the memory that the process has now; called at intervals, from any thread."""
        self._private.sample()

    def facts(self) -> dict[str, Any]:
        """`started` and `finished` (ISO 8601, UTC), `seconds`, `cpu_seconds`, `peak_gpu_bytes`, `peak_rss_bytes` (of the process so far),
        `peak_own_bytes` (private memory: without pages of files, which the kernel can drop; 0: unknown)."""
        self.sample()
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_own_bytes": self._private.bytes,
            "peak_gpu_bytes": peak_gpu_bytes(),
        }


def process_facts(packages: Iterable[str], *, threads: int, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Host, processor, device, Python and package versions, threads and Slurm ids of this process."""
    values = os.environ if environment is None else environment
    return {
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": device_name(),
        "python": platform.python_version(),
        "packages": package_versions(packages),
        "threads": threads,
        "slurm": {name.removeprefix("SLURM_").lower(): values[name] for name in SLURM_FACTS if name in values},
    }


def device_name() -> str:
    """Number and name of the GPUs, if a stage of this process has initialised CUDA, else `cpu`."""
    cuda = _initialised_cuda()
    return f"{cuda.device_count()} x {cuda.get_device_name()}" if cuda else "cpu"


def peak_gpu_bytes() -> int:
    """The most memory of one GPU that torch's allocator has reserved since the attempt began; 0 if no stage of this process used a GPU."""
    cuda = _initialised_cuda()
    return max(int(cuda.max_memory_reserved(device)) for device in range(cuda.device_count())) if cuda else 0


def peak_rss_bytes() -> int:
    """The most memory that was resident since this process started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_gpu_peak() -> None:
    """Release cached GPU memory first, so that the peak of an attempt does not include what the previous stage of this process freed."""
    cuda = _initialised_cuda()
    if cuda:
        cuda.empty_cache()
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _initialised_cuda() -> Any:
    """`torch.cuda`, or None if this process has not imported torch or not initialised CUDA: asking must do neither."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
