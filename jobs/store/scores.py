"""Scores of a finished run, from the confusion matrix in its result. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.errors import UsageError
from jobs.store.records import Result, usable_confusion


@dataclass(frozen=True)
class Confusion:
    """Counts of utterances, `counts[true][predicted]`, in the order of `classes`."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(map(sum, self.counts))

    @property
    def ua(self) -> float:
        """Unweighted accuracy in percent."""
        totals = [sum(row) for row in self.counts]
        return _percent([(row[index], total) for index, (row, total) in enumerate(zip(self.counts, totals, strict=True)) if total])

    @property
    def wa(self) -> float:
        """Weighted accuracy in percent."""
        return _percent([(self._right, self.total)])

    @property
    def macro_f1(self) -> float:
        """Macro-averaged F1 in percent."""
        columns = [sum(column) for column in zip(*self.counts, strict=True)]
        seen = [(row[index], sum(row) + columns[index]) for index, row in enumerate(self.counts)]
        return _percent([(2 * right, both) for right, both in seen if both])

    @property
    def _right(self) -> int:
        return sum(row[index] for index, row in enumerate(self.counts))


def confusion_of(result: Result) -> Confusion | None:
    """The confusion matrix of a finished run, None if the stage reports none.

    Raises UsageError when it is not a square matrix of counts, one row per class, with at least one utterance.
    """
    if not result.confusion and not result.classes:
        return None
    if not usable_confusion(result.confusion, result.classes):
        raise UsageError(
            f"result {result.stage}/{result.key} (fold {result.fold}, seed {result.seed}) has no usable confusion matrix: "
            "delete its result.json and launch again"
        )
    return Confusion(result.classes, result.confusion)


def summed(confusions: Iterable[Confusion]) -> Confusion:
    """Counts added up, matched by class name; classes in order of appearance."""
    counts: dict[tuple[str, str], int] = {}
    classes: dict[str, None] = {}
    for confusion in confusions:
        classes.update(dict.fromkeys(confusion.classes))
        for true, row in zip(confusion.classes, confusion.counts, strict=True):
            for predicted, count in zip(confusion.classes, row, strict=True):
                counts[true, predicted] = counts.get((true, predicted), 0) + count
    names = tuple(classes)
    return Confusion(names, tuple(tuple(counts.get((true, predicted), 0) for predicted in names) for true in names))


def _percent(shares: Sequence[tuple[int, int]]) -> float:
    """The mean of some (numerator, denominator) in percent, rounded once: the division of two integers is exact to the last bit."""
    whole = math.lcm(*(denominator for _, denominator in shares))
    return 100 * sum(numerator * (whole // denominator) for numerator, denominator in shares) / (whole * len(shares))
