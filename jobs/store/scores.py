"""The score of a finished run, by which runs are judged and compared, and the numbers of its confusion matrix. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import UsageError
from jobs.statistics import percent
from jobs.store.records import Result, usable_confusion


@dataclass(frozen=True)
class Confusion:
    """Counts of examples, `counts[true][predicted]`, in the order of `classes`."""

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


@dataclass(frozen=True)
class Score:
    """The number by which the runs of a registry are judged and compared, as its attribute `score` states it.

    Tables print it with one decimal: `scale` and `unit` are chosen so that this is precise enough.
    """

    name: str  # key in the metrics of a result, in JSON and in CSV
    label: str  # in headings
    title: str  # in the titles of tables
    unit: str = "%"  # "%": results hold fractions from 0 to 1; "": none
    scale: float = 100.0  # factor from the number in a result to the one in tables
    higher_is_better: bool = True
    of_confusion: str = ""  # attribute of `Confusion` that it is computed from, exactly, where a result has a matrix; "": none

    def of(self, result: Result) -> float | None:
        """The score of a run as tables print it, not rounded; None if its result has none. Its confusion matrix must be usable."""
        if self.of_confusion and result.confusion:
            percentage = float(getattr(Confusion(result.classes, result.confusion), self.of_confusion))
            return percentage if self.scale == 100 else percentage * self.scale / 100
        found = result.metrics.get(self.name)
        if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
            return None
        if self.unit == "%":
            return percent(found) if 0 <= found <= 1 else None
        return float(found) * self.scale

    @property
    def axis(self) -> str:
        """Label and unit: `UA (%)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def heading(self) -> str:
        """Title, label and unit: `Unweighted accuracy (UA, %)`."""
        return f"{self.title} ({self.label}, {self.unit})" if self.unit else f"{self.title} ({self.label})"

    def named(self, key: str) -> str:
        """A column or key with the name of the score in the place of `ua`."""
        return self.name if key == "ua" else key.replace("_ua", f"_{self.name}")

    def renamed(self, value: Any) -> Any:
        """A JSON value with `named` keys, in every dictionary in it; a key that would replace another one stays."""
        if isinstance(value, dict):
            return {self.named(key) if self.named(key) not in value else key: self.renamed(each) for key, each in value.items()}
        return [self.renamed(each) for each in value] if isinstance(value, list) else value

    def text(self, value: float) -> str:
        """`UA 71.2`."""
        return f"{self.label} {value:.1f}"

    def order(self, value: float) -> float:
        """A number by which the best value comes first."""
        return -value if self.higher_is_better else value


@dataclass(frozen=True)
class Terms:
    """What captions and reports call the data of a registry, in the plural."""

    examples: str = "examples"  # that a run is tested on
    groups: str = "test sets"  # that folds hold out: speakers, patients
    seeds: str = ""  # sentence of captions on what the seeds of a cell differ in; "": none


UNWEIGHTED = Score("ua", "UA", "Unweighted accuracy", of_confusion="ua")  # of CSV files, and of records that state no other
RECORDED = Terms("utterances", "speakers", "Seeds differ in fine-tuning only; upstream stages are computed once per fold.")  # as above
TAKEN = ("wa", "macro_f1", "n", "seed", "slot", "fold", "method", "corpus", "status")  # keys beside the score in JSON and CSV


def score_of(registry: Any) -> Score:
    """The score that a registry states, an object with attributes of `Score`; UNWEIGHTED if it states none. UsageError if it cannot be."""
    stated = getattr(registry, "score", None)
    if stated is None:
        return UNWEIGHTED
    try:
        values = {name: getattr(stated, name) for name in ("name", "label", "title")}
        values |= {name: getattr(stated, name) for name in Score.__dataclass_fields__ if name not in values and hasattr(stated, name)}
    except AttributeError as error:
        raise UsageError(f"the score of the registry: {error}; name, label and title are needed") from error
    found = Score(**values)
    if not found.name.isidentifier() or found.name in TAKEN:
        raise UsageError(f"the score of the registry: name {found.name!r}: use letters, digits and '_', and none of {', '.join(TAKEN)}")
    if found.of_confusion and not isinstance(getattr(Confusion, found.of_confusion, None), property):
        raise UsageError(f"the score of the registry: of_confusion {found.of_confusion!r}: known are ua, wa, macro_f1")
    if found.unit == "%" and found.scale != 100:
        raise UsageError(f"the score of the registry: scale {found.scale:g}: 100 with the unit %, or name another unit")
    return found


def terms_of(registry: Any) -> Terms:
    """The terms that a registry states, an object with attributes of `Terms`; those of records that state none if it states none."""
    stated = getattr(registry, "terms", None)
    return RECORDED if stated is None else Terms(**{name: str(getattr(stated, name)) for name in Terms.__dataclass_fields__})


def confusion_of(result: Result) -> Confusion | None:
    """The confusion matrix of a finished run, None if the stage reports none.

    Raises UsageError when it is not a square matrix of counts, one row per class, with at least one example.
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
