"""Speed of this machine: large matrix products, and copies of memory."""

from __future__ import annotations

import time

import torch


def matrix_gflops(threads: int, device: str) -> float:
    """GFLOP/s of a large matrix product, the best of five: float32 on a CPU, bfloat16 on a GPU."""
    torch.set_num_threads(threads)
    size = 2048 if device == "cpu" else 8192
    left = torch.ones(size, size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def copy_bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy, the best of five."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        float(target[0])
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * 4 / best
