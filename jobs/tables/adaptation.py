"""Methods that are trained on a source before the corpus of their table: scores before and after that adaptation. Pure.

Before: the model of the first stage, tested on the held-out fold of the corpus, on which it was not trained. As for every score, a method's
mean is the mean of its cell means, its sd is over slots of the mean over folds, and differences are paired by fold and slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.statistics import crossed_mean, differences_by_key, mean, paired_by_key, sd, slot_means
from jobs.tables.format import csv_text
from jobs.tables.metrics import FurtherMetric
from jobs.tables.summary import Comparison, MethodSummary, Summary, accepted, corrected

ADAPTATION_COLUMNS = ("source", "corpus", "method", "fold", "slot", "seed", "before", "after")


@dataclass(frozen=True)
class Adapted:
    """One method on one corpus. `before`: fold -> slot -> score of the runs that count, in the unit of the score."""

    source: str
    corpus: str
    method: str
    before: Mapping[str, Mapping[int, float]]
    after: Mapping[str, Mapping[int, float]]
    difference: Comparison  # after - before

    @property
    def mean_before(self) -> float | None:
        return _mean(self.before)

    @property
    def mean_after(self) -> float | None:
        return _mean(self.after)

    @property
    def sd_before(self) -> float | None:
        return sd(slot_means(list(self.before.values())))

    @property
    def sd_after(self) -> float | None:
        return sd(slot_means(list(self.after.values())))


def adaptations_of(summary: Summary) -> tuple[Adapted, ...]:
    """The adapted methods of a summary whose runs have a score before; p-values are corrected for all of them on a corpus."""
    wanted = {recipe.method: recipe.adaptation for recipe in summary.recipes if recipe.adaptation is not None}
    metrics = {(each.corpus, each.method, each.column.name): each for each in summary.further}
    found: list[Adapted] = []
    for method in summary.methods:
        adaptation = wanted.get(method.method)
        metric = metrics.get((method.corpus, method.method, adaptation.before)) if adaptation else None
        if adaptation is not None and metric is not None and metric.n:
            found.append(_adapted(method, metric, adaptation.source, adaptation.factor))
    corpora = dict.fromkeys(each.corpus for each in found)
    return tuple(each for corpus in corpora for each in _with_correction([each for each in found if each.corpus == corpus]))


def render_adaptation_csv(summary: Summary) -> str:
    """One row per run of an adapted method, columns `ADAPTATION_COLUMNS`; numbers are not rounded."""
    return csv_text(ADAPTATION_COLUMNS, _rows(summary))


def _rows(summary: Summary) -> Iterator[tuple[Any, ...]]:
    seeds = {
        (method.corpus, method.method, cell.fold, entry.slot): entry.seed
        for method in summary.methods
        for cell in method.cells
        for entry in cell.runs
        if entry.slot in accepted([entry])
    }
    for each in adaptations_of(summary):
        for fold, by_slot in each.after.items():
            for slot, after in by_slot.items():
                seed, before = seeds[each.corpus, each.method, fold, slot], each.before.get(fold, {}).get(slot)
                yield each.source, each.corpus, each.method, fold, slot, seed, before, after


def _adapted(method: MethodSummary, metric: FurtherMetric, source: str, factor: float) -> Adapted:
    before = {cell.fold: {slot: factor * value for slot, value in cell.by_slot.items()} for cell in metric.cells}
    after = {cell.fold: accepted(cell.runs) for cell in method.cells}
    differences = [differences_by_key(before.get(fold, {}), by_slot) for fold, by_slot in after.items()]
    comparison = Comparison(
        method.corpus,
        f"{method.method}, before",
        f"{method.method}, after",
        paired_by_key(_by_pair(before), _by_pair(after)),
        paired_by_key(_fold_means(before), _fold_means(after)),
        crossed_mean(list(filter(None, differences))),
    )
    return Adapted(source, method.corpus, method.method, before, after, comparison)


def _with_correction(found: Sequence[Adapted]) -> list[Adapted]:
    tests = corrected([each.difference for each in found])
    return [replace(each, difference=test) for each, test in zip(found, tests, strict=True)]


def _mean(cells: Mapping[str, Mapping[int, float]]) -> float | None:
    return mean(list(_fold_means(cells).values()))


def _fold_means(cells: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    means = {fold: mean(list(by_slot.values())) for fold, by_slot in cells.items()}
    return {fold: value for fold, value in means.items() if value is not None}


def _by_pair(cells: Mapping[str, Mapping[int, float]]) -> dict[tuple[str, int], float]:
    return {(fold, slot): value for fold, by_slot in cells.items() for slot, value in by_slot.items()}
