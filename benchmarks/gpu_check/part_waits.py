"""Part 8: how much of a fine-tuning step the GPU computes, which lines make the host wait for it, and what copying features costs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.base_steps import BaseBench, StepClock
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runner import ROOT
from benchmarks.gpu_check.timing import seconds_of, synchronise

PROFILED = 3  # steps
SHOWN_KERNELS, SHOWN_LINES = 12, 20
SLOW_SECONDS = 10.0
BATCH = (64, 500, 768)  # utterances, frames, hidden units: 98 MB of features, a fine-tuning step at base size
SMALL_BATCH = (8, 50, 64)


def run(record: Record, plan: Plan) -> None:
    """Each of the three on its own: what fails leaves the others."""
    batch_copies(record, plan)
    base = BaseBench(plan, "waits")
    for stage in ("finetune",) if plan.small else ("finetune", "tapt", "ptapt"):
        if plan.device == "cuda" and record.has_time(SLOW_SECONDS, f"synchronising lines of {stage}"):
            synchronising_lines(record, base, stage)
    for stage in ("finetune",) if plan.small else ("finetune", "tapt"):
        if record.has_time(SLOW_SECONDS, f"profile of {stage}"):
            profile(record, base, stage)


class Profiled(StepClock):
    """Profiles the measured steps. On a CPU its own operations take the place of kernels."""

    profiler: Any = None

    def _mark(self, step: int) -> None:
        if step == self.first:
            synchronise(self.device)
            activities = [torch.profiler.ProfilerActivity.CUDA if self.device == "cuda" else torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        super()._mark(step)
        if step == self.first + self.count:
            self.profiler.__exit__(None, None, None)


def profile(record: Record, base: BaseBench, stage: str) -> None:
    """Record the share of the steps in which a kernel runs, and the kernels that take longest."""
    clock = Profiled(device=base.plan.device, first=2 if base.plan.small else 6, count=1 if base.plan.small else PROFILED)
    base.measure(stage, clock=clock)
    events = [event for event in clock.profiler.events() if not getattr(event, "is_user_annotation", False)]
    if base.plan.device == "cuda":
        events = [event for event in events if event.device_type == torch.profiler.DeviceType.CUDA]
    else:
        events = [event for event in events if event.cpu_parent is None]
    spans = [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]
    seconds = clock.seconds * clock.count
    record.row(
        "busy", stage=stage, step_seconds=clock.seconds, busy_share=covered(spans) / seconds, kernels_a_step=len(spans) / clock.count
    )
    totals: Counter[str] = Counter()
    for event, (start, end) in zip(events, spans, strict=True):
        totals[event.name] += end - start
    for name, taken in totals.most_common(SHOWN_KERNELS):
        record.row("kernels", stage=stage, kernel=name[:100], share_of_step=taken / seconds)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Synchronising(StepClock):
    """Collects torch's warnings of synchronising CUDA operations in the measured steps."""

    caught: Any = None
    found: list[warnings.WarningMessage] | None = None

    def _mark(self, step: int) -> None:
        if step == self.first + self.count:
            torch.cuda.set_sync_debug_mode(0)
            self.caught.__exit__(None, None, None)
        super()._mark(step)
        if step == self.first:
            self.caught = warnings.catch_warnings(record=True)
            self.found = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")


def synchronising_lines(record: Record, base: BaseBench, stage: str) -> None:
    """Record the lines in which the host waits for the GPU, and how often in a step."""
    clock = Synchronising(device=base.plan.device, first=6, count=PROFILED)
    base.measure(stage, clock=clock)
    for line, count in lines_of(clock.found or []).most_common(SHOWN_LINES):
        record.row("synchronising", stage=stage, line=line, times_a_step=count / clock.count)


def lines_of(found: Iterable[warnings.WarningMessage]) -> Counter[str]:
    """Count the warnings of synchronising operations by file and line, relative to the project or to site-packages."""
    counted: Counter[str] = Counter()
    for each in found:
        if "synchroniz" in str(each.message):
            path = Path(each.filename)
            short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
            counted[f"{short}:{each.lineno}"] += 1
    return counted


def batch_copies(record: Record, plan: Plan) -> None:
    """The features of a step: laid out on the host and copied, from pageable and pinned memory, and gathered on the device."""
    rows, frames, hidden = SMALL_BATCH if plan.small else BATCH
    arrays = [torch.randn(frames - number % 3, hidden) for number in range(rows)]
    pinned = plan.device == "cuda"

    def laid_out(pin: bool) -> Tensor:
        batch = torch.empty(rows, frames, hidden, pin_memory=pin)
        for row, array in zip(batch, arrays, strict=True):
            row[: len(array)] = array
            row[len(array) :] = 0
        return batch

    pageable, locked = laid_out(False), laid_out(pinned)
    packed = torch.cat(arrays).to(plan.device)
    index = torch.randint(len(packed), (rows * frames,), device=plan.device)
    ways = {
        "laid out, pageable": lambda: laid_out(False),
        "laid out, pinned": lambda: laid_out(pinned),
        "copied, pageable": lambda: pageable.to(plan.device, copy=True),
        "copied, pinned": lambda: locked.to(plan.device, non_blocking=True, copy=True),
        "gathered on the device": lambda: packed.index_select(0, index),
    }
    for way, work in ways.items():
        record.row("batch", way=way, megabytes=4 * rows * frames * hidden / 1e6, seconds=seconds_of(work, plan.device))
