"""Comparisons of what two devices have computed, with the tolerances of the check. Pure functions on numbers and arrays."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tolerance:
    """`loss`: relative difference of the losses of a step; `first`: of the first step, before any update; `probability`: absolute."""

    first: float
    loss: float
    probability: float


# On one CPU two implementations of the encoder differ by 2e-7 in float32, and bfloat16 from float32 by 1e-2, after 20 steps. A GPU adds up
# in another order, and Adam turns a tiny difference of a gradient near zero into one of up to the learning rate. Chosen before a run on a
# GPU.
TOLERANCES = {
    "float32": Tolerance(first=1e-4, loss=2e-3, probability=0.01),
    "bfloat16": Tolerance(first=2e-2, loss=5e-2, probability=0.1),
    # The loss scale starts too high: the first optimiser steps are skipped, so later losses lag behind.
    "float16": Tolerance(first=2e-2, loss=3e-1, probability=0.3),
}
FEATURES = 1e-4  # of the largest feature; float32 without TF32
FRAMES = 2e-2  # relative error (norms) of the emotion states after training
LABELS = 0.99  # share of equal cluster labels from equal frames
INERTIA = 1e-4  # relative
RESUMED = 1e-2  # relative difference of the losses after a checkpoint has changed its device


def largest_difference(expected: Sequence[float], found: Sequence[float]) -> float:
    """Return the largest relative difference of two curves; infinite if they differ in length or hold no or no finite number."""
    if len(expected) != len(found) or not expected:
        return math.inf
    differences = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(expected, found, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def same_losses(expected: Sequence[float], found: Sequence[float], tolerance: Tolerance) -> tuple[bool, str]:
    """Whether two curves agree within the tolerance, and the figures as text."""
    first, worst = largest_difference(expected[:1], found[:1]), largest_difference(expected, found)
    text = (
        f"{len(found)} losses, first {_shown(found[:1])} (differs by {first:.1e}, allowed {tolerance.first:.0e}), "
        f"largest relative difference {worst:.1e} (allowed {tolerance.loss:.0e})"
    )
    return first <= tolerance.first and worst <= tolerance.loss, text


def array_difference(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """Return the largest absolute difference relative to the largest value; infinite for other shapes or values that are not finite."""
    if expected.shape != found.shape or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return math.inf
    return float(np.abs(expected - found).max() / max(float(np.abs(expected).max()), 1e-12))


def norm_difference(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """Return the norm of the difference relative to the norm of `expected`; infinite for other shapes or values that are not finite."""
    if expected.shape != found.shape or not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return math.inf
    return float(np.linalg.norm(expected - found) / max(float(np.linalg.norm(expected)), 1e-12))


def probabilities(predictions: Path) -> NDArray[np.float64]:
    """Return the class probabilities (utterances, classes) of a `predictions.csv`."""
    with predictions.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(value) for name, value in row.items() if name.startswith("p_")] for row in rows])


def same_predictions(expected: Path, found: Path, tolerance: Tolerance) -> tuple[bool, str]:
    """Whether two `predictions.csv` agree: probabilities within the tolerance."""
    first, second = probabilities(expected), probabilities(found)
    if first.shape != second.shape:
        return False, f"{second.shape} probabilities instead of {first.shape}"
    difference = float(np.abs(first - second).max())
    same = float((first.argmax(1) == second.argmax(1)).mean())
    text = f"{len(first)} predictions, largest difference of a probability {difference:.1e} (allowed {tolerance.probability:g})"
    return difference <= tolerance.probability, f"{text}, {100 * same:.0f} % of the classes equal"


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values) or "none"
