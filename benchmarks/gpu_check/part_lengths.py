"""Part 9: the length of the parts of a step (`AUTO_PART_SECONDS`), from 36 to 600 s of padded audio."""

from __future__ import annotations

from unittest import mock

from benchmarks.gpu_check.base_steps import BaseBench, StepClock
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record
from ser_core.errors import first_line, is_memory_error
from ser_core.training import device

LENGTHS = (72.0, 600.0, 36.0, 150.0, 300.0)  # seconds; the default and the extremes first, if time runs out
SLOW_SECONDS = 6.0


def run(record: Record, plan: Plan) -> None:
    """Fine-tuning, TAPT and P-TAPT with each length, twelve steps each."""
    base = BaseBench(plan, "lengths")
    for length in (2.0, 8.0) if plan.small else LENGTHS:
        for stage in ("finetune",) if plan.small else ("finetune", "tapt", "ptapt"):
            if not record.has_time(SLOW_SECONDS, f"{stage} in parts of {length:g} s"):
                return
            clock = StepClock(device=plan.device, first=1 if plan.small else 3, count=2 if plan.small else 9)
            with mock.patch.dict(device.AUTO_PART_SECONDS, {plan.device: length}):
                try:
                    found = base.measure(stage, clock=clock)
                except (RuntimeError, MemoryError) as error:
                    if not is_memory_error(error):
                        raise
                    record.note(f"{stage} in parts of {length:g} s: {first_line(error)}")
                    continue
            record.row(
                "part_seconds",
                stage=stage,
                part_seconds=length,
                step_seconds=found.seconds,
                frames_a_second=found.frames_a_step / found.seconds,
                peak_reserved_gib=found.reserved / 2**30,
            )
