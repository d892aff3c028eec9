"""That nothing a node starts for a sweep outlives it, and that it sees and ends only its own: a process table of its own, or descendants.

With a private process table (a pid namespace) the kernel ends everything in it with its first process, and whatever looks for "all Ray
processes" finds those of this sweep. Where none can be had, orphans are adopted and ended one by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from jobs.signals import install_handler
from jobs.worker.processes import die_with_parent, fork

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
PROBE_SECONDS = 10.0
END_SECONDS = 10.0  # to be gone after SIGKILL


def private_table(command: Sequence[str]) -> list[str]:
    """The command, in a process table of its own that ends with whoever starts it."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    init = [sys.executable, "-m", "jobs.sweeps.ray.containment"]  # the first process of a table must see to its orphans
    return ["unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc", *init, *command]


def private_table_works(environment: Mapping[str, str]) -> bool:
    """Whether this user may have one here; never inside a container, which may have been given just what its image needs."""
    if any(name in environment for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")) or shutil.which("unshare") is None:
        return False
    words = [word for word in private_table(()) if word not in (sys.executable, "-m", "jobs.sweeps.ray.containment")]
    try:
        return subprocess.run([*words, "true"], capture_output=True, timeout=PROBE_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `end_descendants` finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(command: Sequence[str], environment: Mapping[str, str], *, output: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a command that is killed when this process ends; with `output` it writes there."""
    with contextlib.ExitStack() as opened:
        sink = None if output is None else opened.enter_context(output.open("ab"))
        return subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=None if sink is None else subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGKILL),
        )


def end_descendants() -> bool:
    """Kill every descendant of this process and take note of its end; False if one is still there after `END_SECONDS`."""
    end = time.monotonic() + END_SECONDS
    while found := descendants(os.getpid()):
        if time.monotonic() > end:
            return False
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        time.sleep(0.05)
    return True


def descendants(ancestor: int) -> list[int]:
    """Pids of all that a process has started, and of what they have; its zombies too."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                parent = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(process.name))
    found, open_ends = [], [ancestor]
    while open_ends:
        own = children.get(open_ends.pop(), [])
        found += own
        open_ends += own
    return found


def run_as_init(command: Sequence[str]) -> int:
    """Run a command as the first process of a table must: take note of the end of every orphan. Its exit code.

    Signals of Slurm that reach every process of a job do not end the table: whoever started it does.
    """
    # Not SIG_IGN, which the command would inherit.
    install_handler((signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1), lambda number, frame: None)
    child = fork(lambda: _execute(command))
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _execute(command: Sequence[str]) -> int:
    try:
        os.execvp(command[0], list(command))  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
    return 127


if __name__ == "__main__":
    sys.exit(run_as_init(sys.argv[1:]))
