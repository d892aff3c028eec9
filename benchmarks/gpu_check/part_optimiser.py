"""Part 11: Adam's implementations on the weights of a base model, and a pass of k-means on CPU and GPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.base_steps import release
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import base_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.timing import seconds_of
from ser_core.clustering.kmeans import KMeans
from ser_core.models.backbone import load_encoder
from ser_core.parallel.threads import DeterministicPool

ADAMS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
FRAMES, CHANNELS = 100_000, 512
COUNTS = (64, 512, 4096)
SLOW_SECONDS = 8.0


def run(record: Record, plan: Plan) -> None:
    """Record seconds of an optimiser step, and of a k-means pass for each k."""
    adam(record, plan)
    release()
    k_means(record, plan)


def adam(record: Record, plan: Plan) -> None:
    """The transformer's weights of a base model with random gradients."""
    model = load_encoder(base_recipe(steps=1, small=plan.small).backbone).encoder.to(plan.device)
    parameters = list(model.parameters())
    for name, options in ADAMS.items():
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimiser = torch.optim.Adam(parameters, lr=1e-6, **options)
        taken = seconds_of(optimiser.step, plan.device)
        record.row("adam", implementation=name, parameters=sum(each.numel() for each in parameters), step_seconds=taken)


def k_means(record: Record, plan: Plan) -> None:
    """One pass of assignment and update, as `cluster` computes it: on all CPU threads, and on the GPU."""
    frames, channels = (2_000, 16) if plan.small else (FRAMES, CHANNELS)
    rng = np.random.default_rng(0)
    data = np.maximum(0, rng.standard_normal((frames, channels), dtype=np.float32))
    for k in (4, 16) if plan.small else COUNTS:
        centroids = data[rng.choice(frames, size=k, replace=False)].copy()
        for device in dict.fromkeys((plan.device, "cpu")):
            if not record.has_time(SLOW_SECONDS, f"k-means, k = {k}, {device}"):
                return
            threads = torch.get_num_threads() if device == "cpu" else 1
            with DeterministicPool(threads) as pool:
                means = KMeans(data, pool, torch.device(device))
                start = centroids - means.mean
                if device != "cpu":
                    means.assign(start)  # the first one loads kernels
                started = time.perf_counter()
                found = means.assign(start)
                means.update(found, start)
                taken = time.perf_counter() - started
            record.row("k_means", k=k, device=device, threads=threads, frames=frames, pass_seconds=taken, inertia=found.inertia)
