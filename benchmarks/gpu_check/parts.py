"""The parts of the check in their order, and how the time is divided among them. Pure: imports nothing that needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """`module` of this package has the function `run(record, plan)`. `gpu_seconds`, `cpu_seconds`: shares of the total time."""

    name: str
    title: str
    module: str
    gpu_seconds: float
    cpu_seconds: float

    def share(self, device: str) -> float:
        """Return its share of the total time on `device`, in seconds of a complete check."""
        return self.gpu_seconds if device == "cuda" else self.cpu_seconds


@dataclass(frozen=True)
class Plan:
    """Arguments of a part: its folder, and the device under test."""

    folder: Path  # for corpora and stages
    device: str  # "cuda", or "cpu": the CPU halves, with transformers' encoder in place of the GPU

    @property
    def small(self) -> bool:
        """Whether to measure small models: on a CPU, where the figures mean nothing."""
        return self.device != "cuda"


# The first part imports torch and transformers from a cold disk: a minute on a slow file server. What it leaves is for the others.
PARTS = (
    Part("environment", "versions and devices", "part_environment", 60, 60),
    Part("suite", "the GPU tests of the test suite", "part_suite", 30, 8),
    Part("stages", "every stage and method: CPU against GPU", "part_stages", 60, 45),
    Part("resume", "checkpoints resumed on the other device", "part_resume", 30, 25),
    Part("memory", "out of memory met by halving", "part_memory", 25, 25),
    Part("processes", "two processes, NCCL and gloo", "part_processes", 60, 35),
    Part("steps", "steps at base size", "part_steps", 75, 14),
    Part("waits", "where the device and the host wait", "part_waits", 50, 10),
    Part("part_seconds", "length of the parts of a step", "part_lengths", 75, 10),
    Part("attention", "attention kernels", "part_attention", 15, 10),
    Part("optimiser", "Adam and k-means", "part_optimiser", 30, 8),
    Part("together", "several fine-tunings on one GPU", "part_together", 55, 18),
    Part("compile", "torch.compile and CUDA graphs", "part_compile", 60, 10),
)


def seconds_for(remaining: Sequence[float], seconds_left: float) -> float:
    """Return the time limit of the first part of `remaining` (their shares): its share of what is left of the total.

    What a part does not use is divided among the later ones, and no part can use up the time of the later ones.
    """
    return max(0.0, seconds_left * remaining[0] / sum(remaining))


def chosen_parts(names: Sequence[str]) -> list[Part]:
    """Return the parts named, in their order; all for no name. Raises ValueError for an unknown name."""
    known = {part.name for part in PARTS}
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name}: no such part; known are {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not names or part.name in names]
