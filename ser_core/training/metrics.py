"""UA, WA, macro-F1 and the confusion matrix of a test split, as scikit-learn computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Fractions in [0, 1]."""

    ua: float  # unweighted accuracy: mean of the recalls of the classes that occur in the split
    wa: float  # weighted accuracy: share of utterances classified correctly
    macro_f1: float  # mean of F1 over the classes that occur in the split or were predicted
    confusion: tuple[tuple[int, ...], ...]  # (classes, classes), rows: true class


def scores(true: Sequence[int], predicted: Sequence[int], classes: int) -> Scores:
    """Return the scores of class indices. UA ignores classes without an utterance. Raises ValueError for no utterances."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

    if not len(true):
        raise ValueError("no utterances to score")
    matrix = confusion_matrix(true, predicted, labels=range(classes))
    return Scores(
        ua=float(recall_score(true, predicted, labels=sorted(set(true)), average="macro", zero_division=0)),
        wa=float(accuracy_score(true, predicted)),
        macro_f1=float(f1_score(true, predicted, average="macro", zero_division=0)),
        confusion=tuple(tuple(int(count) for count in row) for row in matrix),
    )
