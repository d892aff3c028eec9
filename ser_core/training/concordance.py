"""Concordance correlation coefficient (CCC; Lin 1989, Biometrics 45, 255-268): a metric of a test split, and a loss of a batch.

CCC = 2 cov(p, y) / (var(p) + var(y) + (mean(p) - mean(y))^2) with population moments, between -1 and 1. It is no sum over utterances: a
batch that is computed in parts has the loss and the gradient of the whole batch only through the sums of the whole batch, six for each
attribute. With them each part has a term with its share of the gradient (`part_term`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Added to the denominator of the loss, where targets have a variance of about 1: it is finite if predictions and targets are constant.
EPSILON = 1e-6


def ccc(predicted: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Return the CCC of (utterances,) predictions and targets.

    0 if either is constant, also for a single utterance: the covariance is 0. Raises ValueError for no utterances.
    """
    if not len(target):
        raise ValueError("no utterances to score")
    if np.ptp(predicted) == 0 or np.ptp(target) == 0:
        return 0.0
    covariance = float(np.mean((predicted - predicted.mean()) * (target - target.mean())))
    return 2 * covariance / float(predicted.var() + target.var() + (predicted.mean() - target.mean()) ** 2)


def batch_sums(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the sums (6, A) float64 of 1, p, y, p^2, y^2 and p y over utterances: those of parts add up to those of the batch.

    `predicted`, `target`: (utterances, A). An utterance counts for the attributes in which its target is not NaN.
    """
    known = ~torch.isnan(target)
    p = predicted.double() * known
    y = torch.where(known, target, 0).double()
    return torch.stack([known.double(), p, y, p * p, y * y, p * y]).sum(1)


def ccc_loss(sums: Tensor) -> Tensor:
    """Return 1 - CCC, the mean over attributes, of the `batch_sums` of a whole batch.

    It is 1, with a gradient of 0, for targets that are constant in the batch, a batch of one utterance, and no utterance with a target.
    """
    count = sums[0].clamp(min=1)
    p, y, pp, yy, py = sums[1:] / count
    difference = p - y
    value = 2 * (py - p * y) / ((pp - p * p) + (yy - y * y) + difference * difference + EPSILON)
    loss: Tensor = (1 - value).mean()
    return loss


def part_term(own: Tensor, whole: Tensor) -> Tensor:
    """Return a scalar whose gradient is that of `ccc_loss(whole)` with respect to the predictions of one part.

    `own`: the part's `batch_sums`, with gradient; `whole`: those of the batch. By the chain rule it is the sum of d loss / d sums times the
    part's sums; its value has no meaning.
    """
    known = whole.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(ccc_loss(known), known)
    return (slope * own).sum()
