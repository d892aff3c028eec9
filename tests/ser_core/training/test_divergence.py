from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_core.models.classifier import class_weights, weighted_cross_entropy
from ser_core.training.divergence import PRIOR_LOSS_FRACTION, divergence_reason, prior_loss

COUNTS = st.lists(st.integers(1, 40), min_size=2, max_size=7)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), counts=COUNTS)
def test_no_constant_prediction_has_a_lower_loss_than_the_prior(data: st.DataObject, counts: list[int]) -> None:
    """Minimising fine-tuning's loss over constant predictions reaches the closed form and not less."""
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(counts), max_size=len(counts)))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    constant = torch.zeros(len(counts), requires_grad=True)
    search = torch.optim.LBFGS([constant], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        search.zero_grad()
        found = weighted_cross_entropy(constant.expand(len(labels), -1), labels, torch.tensor(weights))
        torch.autograd.backward(found)
        return float(found.detach())

    search.step(loss)  # type: ignore[no-untyped-call]
    expected, best = prior_loss(counts, weights), loss()
    assert best == pytest.approx(expected, rel=1e-3)
    assert best >= expected * (1 - 1e-5)


@given(counts=COUNTS)
def test_inverse_frequencies_make_the_prior_uniform(counts: list[int]) -> None:
    assert prior_loss(counts, class_weights(counts).tolist()) == pytest.approx(math.log(len(counts)), rel=1e-6)


def test_the_threshold_is_one_percent_below_the_prior() -> None:
    """A loss at the prior or above is divergence, and the reason contains both numbers; a loss clearly below is not."""
    prior = math.log(4)
    assert divergence_reason(1.3861, prior) == "final training loss 1.386 is still at that of the class prior, 1.386"
    assert divergence_reason(1.7, prior) == "final training loss 1.700 is still at that of the class prior, 1.386"
    assert divergence_reason(PRIOR_LOSS_FRACTION * prior, prior)
    assert divergence_reason(0.98 * prior, prior) == ""
