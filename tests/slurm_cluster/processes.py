"""Processes of a test cluster, known by pid and start time, so that a pid used again is never taken for one of ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_until


@dataclass(frozen=True)
class Process:
    """One process of ours."""

    pid: int
    started: str  # field 22 of /proc/PID/stat: clock ticks after boot

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started != ""

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start_time(pid: int) -> str:
    """Start time of a living process, "" when there is none (or only its zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class ProcessBook:
    """The processes of one cluster, written down in its folder before anything waits for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "processes"
        self._logs = folder / "log"

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Start a detached process in a session of its own; output goes to log/NAME.out."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{name}.out").open("ab") as output:
            child = subprocess.Popen(
                ["prlimit", "--core=0:0", *command],  # a daemon that is killed on purpose leaves no core dump in a checkout
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
            )
        return self.record(name, child.pid)

    def record(self, name: str, pid: int) -> Process:
        process = Process(pid, start_time(pid))
        (self._folder / name).write_text(json.dumps([process.pid, process.started]))
        return process

    def get(self, name: str) -> Process | None:
        """The living process of that name, or None."""
        try:
            pid, started = json.loads((self._folder / name).read_text())
        except (OSError, ValueError):
            return None
        process = Process(int(pid), str(started))
        return process if process.alive else None

    def names(self) -> list[str]:
        return sorted(os.listdir(self._folder)) if self._folder.is_dir() else []

    def stop(self, names: Sequence[str], number: signal.Signals = signal.SIGTERM, patience: float = 5.0) -> None:
        """Signal all of `names` at once, wait, and kill what is still there."""
        found = [process for process in map(self.get, names) if process is not None]
        for process in found:
            process.send(number)
        if not wait_until(lambda: not any(_alive(process) for process in found), patience):
            for process in found:
                process.send(signal.SIGKILL)
            wait_until(lambda: not any(_alive(process) for process in found), 5.0)
        for name in names:
            (self._folder / name).unlink(missing_ok=True)


def _alive(process: Process) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)  # ours to reap when this very process started it
    return process.alive
