"""Part 12: several fine-tunings at once on one GPU, each in its own process: steps a second of all together."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.base_steps import BaseBench, StepClock
from benchmarks.gpu_check.corpora import noise
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.team import FileTeam, run_team

AT_ONCE = (1, 2, 4)
MEASURED_SECONDS, SHORT_SECONDS = 5.0, 1.0  # with a GPU, without
START_SECONDS = 60.0
SLOW_SECONDS = 18.0
WARM_UP = 6
MOST_STEPS = 3_000  # a limit that no GPU reaches in the time


class EnoughError(Exception):
    """Ends the training: an interruption would write a checkpoint."""


class Together(StepClock):
    """After the warm-up waits for the other processes, then counts steps for a fixed time and stops."""

    team: FileTeam
    deadline: float = 0.0
    started: float = 0.0
    done: int = 0

    def _mark(self, step: int) -> None:
        if step == WARM_UP:
            self._synchronise()
            (self.team.folder / f"ready-{self.team.rank}").touch()
            limit = time.monotonic() + START_SECONDS
            while len(list(self.team.folder.glob("ready-*"))) < self.team.size and time.monotonic() < limit:
                time.sleep(0.01)
            self.started = time.monotonic()
            self.deadline = self.started + (MEASURED_SECONDS if self.device == "cuda" else SHORT_SECONDS)
        elif step > WARM_UP and time.monotonic() >= self.deadline:
            self._synchronise()
            self.done = step - WARM_UP
            self.deadline = time.monotonic()
            raise EnoughError

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def run(record: Record, plan: Plan) -> None:
    """One, two and four processes; the gain is the ratio of steps a second to those of one."""
    noise(plan.folder, small=plan.small)  # written before the processes ask for it
    alone = 0.0
    for count in AT_ONCE[:2] if plan.small else AT_ONCE:
        if not record.has_time(SLOW_SECONDS, f"{count} fine-tunings at once"):
            return
        folder = Path(tempfile.mkdtemp(dir=plan.folder, prefix="together-")) / "team"
        ended = run_team(folder, count, fine_tune, [plan], record.left() - 1)
        errors = [each.error for each in ended if each.error]
        if errors:
            record.note(f"{count} at once: {errors[0]}")
            continue
        found: list[dict[str, float]] = [each.returned for each in ended]
        rate = sum(each["steps"] / each["seconds"] for each in found)
        alone = alone or rate
        record.row(
            "together",
            at_once=count,
            steps_a_second=rate,
            gain=rate / alone,
            reserved_gib_each=max(each["reserved"] for each in found) / 2**30,
        )


def fine_tune(team: FileTeam, plan: Plan) -> dict[str, Any]:
    """In a process of its own: fine-tune at base size; return steps, seconds and memory."""
    clock = Together(device=plan.device, first=WARM_UP, count=MOST_STEPS)
    clock.team = team
    base = BaseBench(plan, f"together-{team.folder.parent.name}-{team.rank}")
    try:
        base.measure("finetune", clock=clock)
    except EnoughError:
        reserved = torch.cuda.max_memory_reserved() if plan.device == "cuda" else 0
        return {"steps": clock.done, "seconds": clock.deadline - clock.started, "reserved": reserved}
    raise ValueError(f"{MOST_STEPS} steps took less than the time to measure")
