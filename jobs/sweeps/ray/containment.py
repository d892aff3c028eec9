"""Contains the processes that a node starts for a sweep: in a PID namespace, or by killing all descendants.

The kernel kills all processes of a PID namespace with its first process, and a program that looks for "all Ray processes" sees only those
of this sweep. Without a namespace, orphans are adopted (PR_SET_CHILD_SUBREAPER) and killed one by one.
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
END_SECONDS = 10.0  # time to exit after SIGKILL


def private_table(command: Sequence[str]) -> list[str]:
    """The command in a PID namespace, killed with its parent (unshare --kill-child)."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    init = [sys.executable, "-m", "jobs.sweeps.ray.containment"]  # the first process of a namespace must reap orphans
    return ["unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc", *init, *command]


def private_table_works(environment: Mapping[str, str]) -> bool:
    """Whether this user can create a PID namespace here; never inside a container, as `unshare` may be restricted."""
    if any(name in environment for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")) or shutil.which("unshare") is None:
        return False
    words = [word for word in private_table(()) if word not in (sys.executable, "-m", "jobs.sweeps.ray.containment")]
    try:
        return subprocess.run([*words, "true"], capture_output=True, timeout=PROBE_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that `end_descendants` finds them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(command: Sequence[str], environment: Mapping[str, str], *, output: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a command that is killed when this process ends. `output`: file for its stdout and stderr."""
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
    """Kill and reap every descendant of this process; False if one is left after `END_SECONDS`."""
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
    """Run a command as the first process of a PID namespace: reap orphans, return its exit code.

    Signals that Slurm sends to every process of a job are ignored: the parent ends the namespace.
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
