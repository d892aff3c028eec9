"""Where a number comes from: commit and dirty diff at launch; packages, device, host, seeds, durations and memory of an attempt."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """Times one attempt, from its construction on."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._cpu = _cpu_seconds()
        self._started = datetime.now(UTC)
        self._own = OwnPeak()
        _forget_gpu_peak()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return round(time.monotonic() - self._begun, 3)

    def look(self) -> None:
        """Take in how much memory the process has now; called at intervals, from any thread."""
        self._own.look()

    def facts(self) -> dict[str, Any]:
        """`started`, `finished` (ISO 8601, UTC), `seconds`, `cpu_seconds`, `peak_gpu_bytes`, `peak_rss_bytes` (of the process so far),
        `peak_own_bytes` (without pages of files, which the kernel can drop; 0: not known)."""
        self.look()
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "peak_own_bytes": self._own.bytes,
            "peak_gpu_bytes": peak_gpu_bytes(),
        }


def process_facts(packages: Iterable[str], *, threads: int, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What this process runs on: host, processor, device, Python, packages, threads, Slurm ids."""
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
    """The GPU that a stage of this process has used, else `cpu`. Asks torch only if a stage has imported it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "cpu"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def peak_gpu_bytes() -> int:
    """What torch's allocator held of a GPU at the most in this process since the last attempt began; 0 where no stage has used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max(int(torch.cuda.max_memory_reserved(device)) for device in range(torch.cuda.device_count()))


def _forget_gpu_peak() -> None:
    """An attempt's peak begins with what the former stage of this process really keeps, not with what the allocator kept for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    torch.cuda.empty_cache()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


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
