"""Divergence test: training has failed if its final loss is not below that of the best constant prediction (the class prior).

A collapsed classifier predicts the same probabilities for every utterance, and its loss cannot be below the class prior's. The threshold is
the same for all corpora and is not tuned: a final loss within 1 % of the prior's counts as divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Fraction of the class prior's loss. A collapsed training ends at 1 or above: batches differ, and SpecAugment and dropout increase its
# loss.
PRIOR_LOSS_FRACTION = 0.99


def prior_loss(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Return the weighted mean cross-entropy, sum(w * ce) / sum(w), of the best constant prediction for `counts` utterances per class.

    Class c has the share q_c = w_c n_c / sum(w n) of the weight, so a constant prediction p has the loss -sum(q_c log p_c). By Gibbs'
    inequality it is minimal at p = q, where it is the entropy of q. With inverse class frequencies, as in fine-tuning, q is uniform and the
    loss is log(classes).
    """
    mass = [weight * count for weight, count in zip(weights, counts, strict=True)]
    total = math.fsum(mass)
    return -math.fsum(each / total * math.log(each / total) for each in mass if each > 0)


def divergence_reason(loss: float, prior: float) -> str:
    """Return why a training with this final loss counts as diverged, or "" if it does not."""
    if loss < PRIOR_LOSS_FRACTION * prior:
        return ""
    return f"final training loss {loss:.3f} is still at that of the class prior, {prior:.3f}"
