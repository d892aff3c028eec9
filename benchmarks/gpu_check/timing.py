"""Seconds of work on a device, and the machine's own limits measured in the same run: matrix products and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

PEAK_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024)}  # of square matrices
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}


def synchronise(device: str) -> None:
    """Wait until the device has done all work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str, *, repeats: int = 5, warm_up: int = 2, inner: int = 1) -> float:
    """Return the median seconds of one call, over `repeats` measurements of `inner` calls each, after `warm_up` calls."""
    for _ in range(warm_up):
        work()
    found = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(inner):
            work()
        synchronise(device)
        found.append((time.perf_counter() - started) / inner)
    return median(found)


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Return the operations a second of the fastest of several square matrix products."""
    best = 0.0
    for size in PEAK_SIZES[device]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = seconds_of(lambda left=left, right=right: left @ right, device, inner=4)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        del left, right
    return best


def copy_bandwidth(device: str) -> float:
    """Return the bytes a second that a copy within the device's memory reads and writes."""
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / seconds_of(lambda: target.copy_(source), device, inner=4)


def half_type(device: str) -> torch.dtype:
    """The 16-bit type that `precision: auto` chooses on a GPU; on a CPU float32."""
    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
