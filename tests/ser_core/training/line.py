"""A line with dropout, fitted in 20 steps: the smallest training that has everything a stage's training has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ser_core.parallel.group import Group
from ser_core.settings.execution import Precision
from ser_core.training.checkpoints import Checkpoints
from ser_core.training.device import choose_arithmetic
from ser_core.training.loop import Objective, PartLoss, StepParts, TrainingPlan, TrainingResult, train
from ser_core.training.randomness import generator
from ser_core.training.schedule import warmup_flat_linear

CPU = torch.device("cpu")


class Regression(Objective):
    """A line with dropout, fitted on data drawn by step. Its sums for the curves give the accuracy once more."""

    curve_sums = 2

    def __init__(self, parts: int = 1, dropout: float = 0.3) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.number = parts
        self.asked: list[int] = []
        self.best = torch.zeros(1)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def plan(self, step: int) -> StepParts:
        self.asked.append(step)
        data = torch.from_numpy(generator(0, "data", step).normal(size=(12, 5))).float()
        parts = list(data.chunk(self.number))
        return StepParts(parts, [len(part) for part in parts], len(data))

    def loss(self, part: Tensor) -> PartLoss:
        error = (self.model(part[:, :4])[:, 0] - part[:, :4].sum(1)) ** 2
        loss = error.sum() / 12
        return PartLoss(loss, loss, (error < 1).sum(), len(part), accuracy_sums(error))

    def curve_values(self, sums: Tensor) -> Mapping[str, float]:
        correct, counted = sums.tolist()
        return {"again/accuracy": correct / counted}

    def after_step(self, step: int) -> Mapping[str, float]:
        self.best = torch.maximum(self.best, torch.tensor([float(step % 7)]))
        return {"best": float(self.best)} if step % 5 == 0 else {}

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"best": self.best}, {"name": "best"}

    def load_extra_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        assert facts == {"name": "best"}
        self.best = tensors["best"]


def accuracy_sums(error: Tensor) -> Tensor:
    """Correct rows and rows."""
    return torch.stack([(error < 1).sum(), torch.tensor(len(error))]).float()


def line_plan(**changes: Any) -> TrainingPlan:
    """20 steps without a checkpoint on the way."""
    values: dict[str, Any] = {
        "name": "line",
        "steps": 20,
        "learning_rate": 0.05,
        "schedule": warmup_flat_linear(20, 3, 4),
        "seed": 1,
        "arithmetic": choose_arithmetic(CPU, Precision.float32),
        "checkpoint_seconds": 1e9,
        "log_every": 3,
    }
    return TrainingPlan(**{**values, **changes})


def train_line(
    objective: Objective,
    plan: TrainingPlan,
    checkpoint: Path,
    output: Path,
    *,
    identity: str = "mine",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda line: None,
    group: Group | None = None,
) -> TrainingResult:
    return train(objective, plan, Checkpoints(checkpoint, identity), output, should_stop, report, group)


def weights(objective: Objective) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in objective.parameters().values()]
