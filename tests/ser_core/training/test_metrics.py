from __future__ import annotations

import numpy as np
import pytest

from ser_core.training.metrics import scores


def test_scores_of_a_matrix_worked_out_by_hand() -> None:
    """Recalls 1/2, 2/3 and 0 of classes 0, 1, 2; class 3 does not occur and is not part of the mean recall."""
    found = scores([0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 0], 4)
    assert found.ua == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found.wa == pytest.approx(3 / 6)
    assert found.macro_f1 == pytest.approx((2 / 4 + 4 / 6 + 0) / 3)
    assert found.confusion == ((1, 1, 0, 0), (0, 2, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0))


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_counted_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = [*rng.integers(0, 4, 60).tolist(), 0, 1, 2, 3]
    predicted = [*rng.integers(0, 4, 60).tolist(), 3, 2, 1, 0]
    pairs = list(zip(true, predicted, strict=True))
    hits = [pairs.count((each, each)) for each in range(4)]
    found = scores(true, predicted, 4)
    assert found.ua == pytest.approx(sum(hit / true.count(each) for each, hit in enumerate(hits)) / 4)
    assert found.wa == pytest.approx(sum(hits) / len(pairs))
    assert found.macro_f1 == pytest.approx(sum(2 * hit / (true.count(each) + predicted.count(each)) for each, hit in enumerate(hits)) / 4)
    assert found.confusion == tuple(tuple(pairs.count((row, column)) for column in range(4)) for row in range(4))


def test_scores_of_no_utterances_are_an_error() -> None:
    with pytest.raises(ValueError, match="no utterances"):
        scores([], [], 3)
