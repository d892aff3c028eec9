"""Where a number comes from: commit and dirty diff at launch; packages, device, host, seeds, durations and memory of an attempt."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.own_memory import OwnPeak

GIT_SECONDS = 30.0
SLURM_FACTS = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_CLUSTER_NAME",
)


def code_facts(repository: Path) -> dict[str, Any]:
    """`commit` of a working tree and `dirty`, a digest of everything that differs from it ("" where nothing does).

    Both are None where there is no git or no repository. Called once per launch, never by workers.
    """
    commit = _git(repository, "rev-parse", "HEAD")
    changed = _git(repository, "diff", "HEAD", "--binary")
    untracked = _git(repository, "ls-files", "--others", "--exclude-standard", "-z")
    if commit is None or changed is None or untracked is None:
        return {"commit": None, "dirty": None}
    digest = hashlib.sha256(changed)
    names = sorted(filter(None, untracked.split(b"\0")))
    for name in names:
        digest.update(b"\0" + name + b"\0" + _content(repository / os.fsdecode(name)))
    return {"commit": commit.decode("ascii").strip(), "dirty": digest.hexdigest() if changed or names else ""}


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


def _content(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:  # removed since it was listed, or a folder of its own repository: its name has been taken down
        return b""


def _git(repository: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
