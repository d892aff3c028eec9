"""Sums of a training since the last entry of its curves, kept on the device so that reading them is rare, and part of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ser_core.parallel.group import Group


@dataclass
class RunningSums:
    """Sums over steps: `sums` (2,) of the loss and of correct predictions, on the device, so that reading them is rare."""

    sums: Tensor
    counted: int = 0
    steps: int = 0

    def add(self, sums: Tensor, counted: int) -> None:
        self.sums = self.sums + sums
        self.counted += counted
        self.steps += 1

    def means(self) -> tuple[float, float]:
        """Mean loss of a step, and accuracy."""
        loss, correct = self.sums.tolist()
        return loss / self.steps, correct / max(1, self.counted)

    def facts(self) -> list[float]:
        """Values for the checkpoint, so that a mean over an interruption is the same."""
        return [*self.sums.tolist(), self.counted, self.steps]

    @staticmethod
    def start(device: torch.device, facts: Sequence[float] = (0.0, 0.0, 0, 0)) -> RunningSums:
        return RunningSums(torch.tensor(facts[:2], dtype=torch.float32, device=device), int(facts[2]), int(facts[3]))


class CurveSums:
    """Sums for the curves over the steps since the last entry. Each process has its own: they are added up only when they are read."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.own = torch.zeros(count, dtype=torch.float32, device=device)

    def gather(self, group: Group) -> Tensor:
        """Return the sums over the processes, on the CPU. Called in all processes."""
        if len(self.own) == 0:
            return self.own.cpu()
        group.all_reduce_([self.own])
        summed = self.own.cpu().clone()
        if not group.is_leader:  # the leader's are the sums of all from now on
            self.own.zero_()
        return summed

    def restore(self, saved: Sequence[float], group: Group) -> None:
        """Continue with the sums of a checkpoint; an older one has none."""
        if group.is_leader and len(saved) == len(self.own):
            self.own = torch.tensor(saved, dtype=torch.float32, device=self.own.device)
