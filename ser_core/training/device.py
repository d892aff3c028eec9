"""Device and autocast type of a stage, the memory allocator's settings, and torch's switches for bit-identical results on a CPU."""

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
from ser_core.settings.execution import Precision

AMPERE = 8  # major compute capability of the first GPUs with bfloat16 units

# Padded seconds of audio per micro-batch if `execution.micro_batch` is 0. Independent of the number of processes, because random numbers
# are drawn per micro-batch.
AUTO_PART_SECONDS = {"cpu": 36.0, "cuda": 72.0}

# mallopt parameters of glibc's malloc.h. By default glibc maps blocks above 32 MB, returns them at once when freed, and trims its heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 30  # bytes; larger blocks (a weight file) are returned to the kernel when freed

DTYPES = {Precision.float32: torch.float32, Precision.bfloat16: torch.bfloat16, Precision.float16: torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """A device and its autocast type (float32: no autocast)."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context manager: matrix products in `dtype`."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`. Raises InputError if `cuda` is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("recipe.execution.device=cuda: torch sees no GPU here; use auto or cpu, or ask for a GPU in the stage's resources")
    return torch.device(name)


def choose_arithmetic(device: torch.device, precision: Precision) -> Arithmetic:
    """Return device and autocast type. `auto`: bfloat16 if GPU or CPU has units for it, float16 on older GPUs, float32 on other CPUs."""
    if precision is not Precision.auto:
        return Arithmetic(device, DTYPES[precision])
    if device.type != "cuda":
        return Arithmetic(device, torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32)
    major, _ = torch.cuda.get_device_capability(device)
    return Arithmetic(device, torch.bfloat16 if major >= AMPERE else torch.float16)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions to multiply bfloat16; without them bfloat16 is several times slower than float32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in the process and use huge pages, so that steps do not request pages from the kernel again and again.

    Permanent. Must be called before the first large tensor is allocated, otherwise torch does not request huge pages. Returns False without
    glibc, which provides these settings.
    """
    if sys.platform != "linux":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's CPU allocator when it first allocates a large tensor
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all([libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT), libc.mallopt(M_TRIM_THRESHOLD, -1)])


@contextlib.contextmanager
def deterministic(device: torch.device, threads: int | None) -> Iterator[None]:
    """Context with `threads` CPU threads (None: unchanged) and, on a CPU, deterministic operations; restores the settings on leaving."""
    before_threads = torch.get_num_threads()
    before_deterministic = torch.are_deterministic_algorithms_enabled()
    switches: Any = torch.utils.deterministic
    before_fill = switches.fill_uninitialized_memory
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        switches.fill_uninitialized_memory = False  # for debugging; it would write every new tensor once more
    try:
        yield
    finally:
        torch.set_num_threads(before_threads)
        torch.use_deterministic_algorithms(before_deterministic)
        switches.fill_uninitialized_memory = before_fill
