"""Part 4: a stage is interrupted on one device and resumed from its checkpoint on the other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import compare
from benchmarks.gpu_check.corpora import tones
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import STAGES, calls_of, small_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.stage_runs import ON_CPU, Bench, Watch, comparable, on
from ser_core.errors import Interrupted
from ser_core.registry import StageCall
from ser_core.settings.execution import Precision

STEPS, STOP = 12, 5


def run(record: Record, plan: Plan) -> None:
    """CPU to GPU, GPU to CPU, and GPU to GPU, for every stage that trains by gradient descent."""
    corpus = tones(plan.folder)
    bench = Bench(corpus.folder, plan.folder / "resume", threads=1)
    calls = calls_of(small_recipe(Precision.float32, steps=STEPS))
    device = on(plan.device)
    name = "GPU" if plan.device == "cuda" else "transformers' encoder"
    ways = {f"CPU to {name}": (ON_CPU, device), f"{name} to CPU": (device, ON_CPU), f"{name} to {name}": (device, device)}
    with comparable():
        for stage in STAGES[:1] if plan.small else STAGES:
            call = calls[stage]
            upstream = {role: bench.run(parent, ON_CPU).output for role, parent in call.upstream.items()}
            whole = bench.run(call, ON_CPU, upstream=upstream).losses
            for way, (first, second) in ways.items():
                resumed_at, losses = _resumed(bench, call, upstream, first, second, bench.root / f"{stage}-{way.replace(' ', '-')}")
                difference = compare.largest_difference(whole, losses)
                text = f"resumed after step {resumed_at} of {STEPS}, losses differ by {difference:.1e} (allowed {compare.RESUMED:.0e})"
                record.proof(f"{stage}, {way}", resumed_at == STOP and difference <= compare.RESUMED, text)


def _resumed(
    bench: Bench, call: StageCall, upstream: Mapping[str, Path], first: Mapping[str, Any], second: Mapping[str, Any], folder: Path
) -> tuple[int, list[float]]:
    """Return the step after which the second run resumed, and the losses of all steps."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        bench.run(call, first, upstream=upstream, checkpoint=folder, watch=Watch(stop_at=STOP))
    except Interrupted:
        ran = bench.run(call, second, upstream=upstream, checkpoint=folder)
        return int(ran.outcome["durations"]["resumed_at_step"]), ran.losses
    return 0, []
