"""What a process that computes stages in forked children does to itself and to them: threads, and that none outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib.util import find_spec
from typing import NoReturn

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# What is loaded before a fork must start no threads and touch no GPU, or the children cannot use them: OpenBLAS starts its threads when it
# is loaded (children set their own number after the fork), and torch asks the CUDA runtime for GPUs unless told to ask the driver.
FORKABLE = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ORPHANED = 71  # exit code of a child whose parent was gone before it began (sysexits.h: system error)


def limit_threads(count: int) -> None:
    """Let this process compute with `count` threads, also where a parent has already loaded the libraries that do so."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    if find_spec("threadpoolctl") is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def die_with(parent: int, number: signal.Signals) -> None:
    """In a child: ask the kernel for a signal when the parent dies; where that cannot be had, the child ends by itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def end_child(code: int) -> NoReturn:
    """Leave a forked child, with what it has printed; the clean-up of the process it is a copy of is not its to run."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def kill_group(leader: int) -> None:
    """What a child that leads a group has started dies with it."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
