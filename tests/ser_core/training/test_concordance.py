"""CCC as a metric and as a loss: closed forms, constants, missing targets, and a batch in parts against the whole batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.training.concordance import batch_sums, ccc, ccc_loss, part_term

RNG = np.random.default_rng(7)
TARGET = RNG.normal(size=(24, 3))
PREDICTED = 0.6 * TARGET + RNG.normal(size=(24, 3))


def test_closed_forms() -> None:
    """The identity has 1, a shift by c has 2 v / (2 v + c^2), a sign -1; a factor and a shift of both change nothing."""
    y, p = TARGET[:, 0], PREDICTED[:, 0]
    assert ccc(y, y) == pytest.approx(1)
    assert ccc(y + 0.7, y) == pytest.approx(2 * y.var() / (2 * y.var() + 0.49))
    assert ccc(-(y - y.mean()), y - y.mean()) == pytest.approx(-1)
    assert ccc(5 * p + 3, 5 * y + 3) == pytest.approx(ccc(p, y))
    correlation = float(np.corrcoef(p, y)[0, 1])
    assert ccc(p, y) == pytest.approx(2 * correlation * p.std() * y.std() / (p.var() + y.var() + (p.mean() - y.mean()) ** 2))


def test_constants_and_single_utterances_have_no_agreement() -> None:
    """0, not what rounding leaves of 0 / 0: a mean of equal numbers may differ from them in the last bit."""
    constant = np.full(10, 0.1)
    for predicted, target in ((constant, constant), (constant, RNG.normal(size=10)), (RNG.normal(size=10), constant), ([0.3], [0.4])):
        assert ccc(np.asarray(predicted), np.asarray(target)) == 0
    with pytest.raises(ValueError, match="no utterances"):
        ccc(np.zeros(0), np.zeros(0))


def test_the_loss_is_one_minus_the_metric() -> None:
    """The mean over attributes; utterances without a target count for nothing."""
    predicted, target = torch.from_numpy(PREDICTED), torch.from_numpy(TARGET).clone()
    expected = np.mean([1 - ccc(PREDICTED[:, place], TARGET[:, place]) for place in range(3)])
    assert float(ccc_loss(batch_sums(predicted, target))) == pytest.approx(expected, abs=1e-5)
    target[::2] = math.nan
    expected = np.mean([1 - ccc(PREDICTED[1::2, place], TARGET[1::2, place]) for place in range(3)])
    assert float(ccc_loss(batch_sums(predicted, target))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.full((8, 3), 0.1), np.full((8, 3), 0.1)),
        (PREDICTED, np.ones((24, 3))),
        (PREDICTED[:1], TARGET[:1]),
        (PREDICTED, np.full((24, 3), math.nan)),
    ],
    ids=["constant", "constant target", "one utterance", "no target"],
)
def test_a_batch_without_information_has_the_loss_1_and_no_gradient(given: NDArray[np.float64], wanted: NDArray[np.float64]) -> None:
    """Finite, so that training continues with the other batches."""
    predicted, target = torch.from_numpy(given).float().requires_grad_(), torch.from_numpy(wanted).float()
    loss = ccc_loss(batch_sums(predicted, target))
    assert loss.item() == pytest.approx(1, abs=1e-6)
    assert gradient(loss, predicted).abs().max() < 1e-6


def test_a_constant_prediction_is_left() -> None:
    """The gradient points to the targets: training can start from a head that predicts one value."""
    predicted = torch.zeros(24, 3, requires_grad=True)
    slope = gradient(ccc_loss(batch_sums(predicted, torch.from_numpy(TARGET).float())), predicted)
    assert float((slope * torch.from_numpy(TARGET)).sum()) < 0


@pytest.mark.parametrize("sizes", [[24], [12, 12], [1, 2, 7, 14], [1] * 24])
def test_parts_have_the_gradient_of_the_whole_batch(sizes: list[int]) -> None:
    """However a batch is cut, with missing targets; the mean of the parts' own losses has another gradient."""
    target = torch.from_numpy(TARGET).float().clone()
    target[5] = math.nan
    predicted = torch.from_numpy(PREDICTED).float().requires_grad_()
    whole = gradient(ccc_loss(batch_sums(predicted, target)), predicted)
    ends = np.cumsum(sizes).tolist()
    parts = [(predicted[end - size : end], target[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    sums = sum((batch_sums(p, y).detach() for p, y in parts), torch.zeros(6, 3))
    cut = gradient(sum((part_term(batch_sums(p, y), sums) for p, y in parts), torch.zeros(())), predicted)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-7)
    assert cut[5].abs().max() == 0
    if len(sizes) > 1:
        own_losses = sum((ccc_loss(batch_sums(p, y)) * len(p) / 24 for p, y in parts), torch.zeros(()))
        assert not torch.allclose(gradient(own_losses, predicted), whole, rtol=0.1)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, of)
    return found
