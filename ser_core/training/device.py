"""Which device and arithmetic a stage uses, how memory is kept, and the switches of torch that make a CPU repeat itself to the bit."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ser_core.errors import InputError
from ser_core.settings import Precision

AMPERE = 8  # compute capability of the first GPUs with bfloat16 units

# Padded seconds of audio in one forward pass, where `execution.micro_batch` leaves it open. The same whatever the number of processes,
# because the parts of a step are what chance is drawn for.
AUTO_PART_SECONDS = {"cpu": 36.0, "cuda": 72.0}

# glibc's malloc.h. Left alone, it takes blocks above 32 MB from the kernel, zeroed, and gives them back at once, and trims what it has.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 30  # bytes; what is larger (a weight file) is given back when it is free

DTYPES = {Precision.float32: torch.float32, Precision.bfloat16: torch.bfloat16, Precision.float16: torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """A device and the type that autocast uses on it."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context in which matrix products are computed in `dtype`."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`. Raises InputError where a GPU is asked for and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("execution.device=cuda: torch sees no GPU here; use auto or cpu, or ask for a GPU in the stage's resources")
    return torch.device(name)


def choose_arithmetic(device: torch.device, precision: Precision) -> Arithmetic:
    """`auto`: bfloat16 on a GPU or CPU that has units for it, float16 on an older GPU, float32 on any other CPU."""
    if precision is not Precision.auto:
        return Arithmetic(device, DTYPES[precision])
    if device.type != "cuda":
        return Arithmetic(device, torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32)
    major, _ = torch.cuda.get_device_capability(device)
    return Arithmetic(device, torch.bfloat16 if major >= AMPERE else torch.float16)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16; without them it is several times slower than float32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


@functools.cache
def keep_memory() -> bool:
    """Make this process keep the memory that tensors leave, and take it in huge pages: no page is fetched from the kernel at every step.

    For good, and once a process; before its first large tensor, or torch will not ask for huge pages. False where the C library is not
    glibc, which has none of this.
    """
    if sys.platform != "linux":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's CPU allocator when it first allocates a large tensor
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all([libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT), libc.mallopt(M_TRIM_THRESHOLD, -1)])


@contextlib.contextmanager
def repeatable(device: torch.device, threads: int | None) -> Iterator[None]:
    """`threads` CPU threads (None: as they are) and, on a CPU, operations that give the same bits every time; restored on leaving."""
    before_threads = torch.get_num_threads()
    before_deterministic = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic
    before_fill = switches.fill_uninitialized_memory
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        switches.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every new tensor
    try:
        yield
    finally:
        torch.set_num_threads(before_threads)
        torch.use_deterministic_algorithms(before_deterministic)
        switches.fill_uninitialized_memory = before_fill
