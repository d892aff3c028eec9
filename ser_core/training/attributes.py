"""Dimensional attributes (valence, activation, dominance) as targets of fine-tuning: their scale, their part of the loss, their scores.

Targets are standardised with the mean and standard deviation of the training utterances, so that a corpus' scale does not matter. CCC is
the same in either scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.corpora.manifest import DIMENSIONS, Utterance
from ser_core.errors import InputError
from ser_core.training.concordance import ccc

SCORE = "ccc"  # metric of a result: mean over the attributes; `ccc_valence` and so on: of one


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each attribute in the training utterances; a constant attribute has the deviation 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def standardised(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert (utterances, attributes) from the corpus' scale."""
        found: NDArray[np.float64] = (values - np.asarray(self.mean)) / np.asarray(self.deviation)
        return found

    def restored(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Convert (utterances, attributes) to the corpus' scale."""
        found: NDArray[np.float64] = values * np.asarray(self.deviation) + np.asarray(self.mean)
        return found


def values_of(utterances: Sequence[Utterance]) -> NDArray[np.float64]:
    """Return the attributes (utterances, 3) in the corpus' scale, NaN for an utterance without them."""
    missing = (float("nan"),) * len(DIMENSIONS)
    return np.array([utterance.dimensions or missing for utterance in utterances], dtype=np.float64).reshape(-1, len(DIMENSIONS))


def scale_of(values: NDArray[np.float64]) -> Scale:
    """Return the scale of (utterances, attributes). Raises InputError if no utterance has attributes."""
    known = values[~np.isnan(values).any(axis=1)]
    if not len(known):
        raise InputError(f"no training utterance has {', '.join(DIMENSIONS)}")
    deviation = np.where(np.ptp(known, axis=0) > 0, known.std(axis=0), 1.0)
    return Scale(tuple(known.mean(axis=0).tolist()), tuple(deviation.tolist()))


@dataclass(frozen=True)
class AttributeTask:
    """The attributes of the training utterances as targets. `weight`: of their loss; that of the classes has 1 - weight."""

    weight: float
    scale: Scale
    targets: Tensor  # (utterances, 3) float32, standardised, NaN where missing

    @property
    def alone(self) -> bool:
        """Whether the classes are not trained."""
        return self.weight == 1


def attribute_task(weight: float, utterances: Sequence[Utterance]) -> AttributeTask | None:
    """Return the task of training on attributes; None if `weight` is 0. Raises InputError if no utterance has attributes."""
    if weight == 0:
        return None
    values = values_of(utterances)
    scale = scale_of(values)
    return AttributeTask(weight, scale, torch.from_numpy(scale.standardised(values)).float())


def nearest_class_logits(predicted: NDArray[np.float64], training: Sequence[Utterance], classes: Sequence[str]) -> NDArray[np.float32]:
    """Return logits (utterances, classes) of predicted attributes (utterances, 3) in the corpus' scale: the largest is the nearest class.

    They are minus half the squared distance, in standardised attributes, to the mean of the class' training utterances: equally frequent
    normal distributions of the standard deviation 1. A class without attributes in the training utterances has minus infinity.
    """
    values = values_of(training)
    scale = scale_of(values)
    known = ~np.isnan(values).any(axis=1)
    labels = np.array([utterance.label for utterance in training])
    logits = np.full((len(predicted), len(classes)), -np.inf, dtype=np.float32)
    for place, name in enumerate(classes):
        members = values[known & (labels == name)]
        if len(members):
            distance = scale.standardised(predicted) - scale.standardised(members).mean(axis=0)
            logits[:, place] = -0.5 * (distance**2).sum(axis=1)
    return logits


def score_attributes(predicted: NDArray[np.float64], utterances: Sequence[Utterance]) -> dict[str, float]:
    """Return the CCC of each attribute over a test split and their mean, and the number of utterances that have attributes.

    `predicted`: (utterances, 3) in the corpus' scale. Raises InputError if no utterance has attributes.
    """
    values = values_of(utterances)
    known = ~np.isnan(values).any(axis=1)
    if not known.any():
        raise InputError(f"no test utterance has {', '.join(DIMENSIONS)}")
    found = {f"{SCORE}_{name}": ccc(predicted[known, place], values[known, place]) for place, name in enumerate(DIMENSIONS)}
    return {SCORE: float(np.mean(list(found.values()))), **found, "test_attributes": int(known.sum())}
