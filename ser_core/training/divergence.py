"""The test that a training has learnt anything, fixed in advance: its final loss lies below that of the best constant prediction.

A classifier that has collapsed gives every utterance the same probabilities, whatever it hears, and no loss of that kind is below the
class prior's. The line is one for all corpora and is not tuned: a training that ends within 1 % of the prior's loss has not left it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Of the loss of the class prior. A collapsed training ends at 1 or above: batches differ, and SpecAugment and dropout only add to its loss.
PRIOR_LOSS_FRACTION = 0.99


def prior_loss(counts: Sequence[int], weights: Sequence[float]) -> float:
    """The weighted mean cross-entropy, sum(w * ce) / sum(w), that the best constant prediction reaches on `counts` utterances a class.

    Class c holds the share q_c = w_c n_c / sum(w n) of the weight, so a constant p has the loss -sum(q_c log p_c). Gibbs' inequality puts
    its minimum at p = q: the entropy of q. With inverse class frequencies, as in fine-tuning, q is uniform and the loss log(classes),
    whatever the batch.
    """
    mass = [weight * count for weight, count in zip(weights, counts, strict=True)]
    total = math.fsum(mass)
    return -math.fsum(each / total * math.log(each / total) for each in mass if each > 0)


def still_at_prior(loss: float, prior: float) -> str:
    """Why a training with this final loss has not learnt, or "" where it has."""
    if loss < PRIOR_LOSS_FRACTION * prior:
        return ""
    return f"final training loss {loss:.3f} is still at that of the class prior, {prior:.3f}"
