"""Forked child processes: starting them, reaping them, their number of threads, and that none outlives its parent."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NoReturn

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# Libraries loaded before a fork must start no threads and initialise no GPU, or the children cannot use them: OpenBLAS starts its threads
# on import (a child sets its own number after the fork), and torch queries GPUs by the CUDA runtime unless it is set to use NVML.
FORKABLE = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ORPHANED = 71  # exit code of a child whose parent died before it had started (sysexits.h: system error)


def preload(imports: Iterable[Callable[[], object]]) -> None:
    """Import once what all forked children need; these functions must start no thread and initialise no GPU."""
    for run in imports:
        try:
            run()
        except Exception:  # the stages that need it will fail and record why
            traceback.print_exc()
    gc.collect()
    gc.freeze()  # children's garbage collection must not write to shared pages


@dataclass(frozen=True)
class Exit:
    """How a process ended: one of the two is None."""

    code: int | None
    signal: int | None  # that killed it


def fork(work: Callable[[], int], *, death_signal: signal.Signals | None = None) -> int:
    """Fork a child that runs `work` and exits with the code it returns, or with 1 after an exception; returns its pid.

    `death_signal`: what the kernel sends to the child when this process dies. Raises OSError where no process can be forked.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if death_signal is not None:
            die_with_parent(parent, death_signal)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        exit_now(code)


def reap(pid: int) -> Exit | None:
    """How a child ended, after killing the rest of its process group; None while it runs. ChildProcessError if it was reaped before."""
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    kill_group(pid)  # before its pid can be given to another process
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Exit(code, None) if code >= 0 else Exit(None, -code)


def kill_group(leader: int) -> None:
    """Kill what is left of the process group that a child leads."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """In a child: have the kernel send a signal when the parent dies. Exits at once if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def exit_now(code: int) -> NoReturn:
    """Exit from any thread, after flushing the output: no clean-up handlers run, which in a forked child belong to its parent."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def limit_threads(count: int) -> None:
    """Make this process compute with `count` threads, also where a parent has loaded the numerical libraries already."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    if find_spec("threadpoolctl") is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
