"""UA, WA, macro-F1 and the confusion matrix of a test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """Fractions in [0, 1]."""

    ua: float  # unweighted accuracy: mean of the recalls of the classes that occur in the split
    wa: float  # weighted accuracy: share of utterances classified correctly
    macro_f1: float  # mean of F1 over the classes that occur in the split or were predicted
    confusion: tuple[tuple[int, ...], ...]  # (classes, classes), rows: true class


def confusion_matrix(true: Sequence[int], predicted: Sequence[int], classes: int) -> NDArray[np.int64]:
    """Counts (classes, classes), rows: true class."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(true, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return matrix


def scores(true: Sequence[int], predicted: Sequence[int], classes: int) -> Scores:
    """Scores of predictions; a class that no utterance has counts in no mean of recalls. Raises ValueError without utterances."""
    if not len(true):
        raise ValueError("no utterances to score")
    matrix = confusion_matrix(true, predicted, classes)
    hits, support, chosen = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    recalls = hits[support > 0] / support[support > 0]
    seen = (support + chosen) > 0
    f1 = 2 * hits[seen] / (support + chosen)[seen]
    return Scores(
        ua=float(recalls.mean()),
        wa=float(hits.sum() / matrix.sum()),
        macro_f1=float(f1.mean()),
        confusion=tuple(tuple(int(count) for count in row) for row in matrix),
    )
