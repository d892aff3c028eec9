from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score

from ser_core.training.metrics import scores


def test_scores_of_a_matrix_worked_out_by_hand() -> None:
    """Recalls 1/2, 2/3 and 0 of classes 0, 1, 2; class 3 does not occur and counts in no mean of recalls."""
    found = scores([0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 0], 4)
    assert found.ua == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found.wa == pytest.approx(3 / 6)
    assert found.macro_f1 == pytest.approx((2 / 4 + 4 / 6 + 0) / 3)
    assert found.confusion == ((1, 1, 0, 0), (0, 2, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0))


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = [*rng.integers(0, 4, 60).tolist(), 0, 1, 2, 3]
    predicted = [*rng.integers(0, 4, 60).tolist(), 3, 2, 1, 0]
    found = scores(true, predicted, 4)
    assert found.ua == pytest.approx(balanced_accuracy_score(true, predicted))
    assert found.wa == pytest.approx(accuracy_score(true, predicted))
    assert found.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro"))
    assert np.array_equal(found.confusion, confusion_matrix(true, predicted))


def test_no_utterances_are_no_score() -> None:
    with pytest.raises(ValueError, match="no utterances"):
        scores([], [], 3)
