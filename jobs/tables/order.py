"""Whether the order of methods is the same over kept runs and over all runs, dropped ones included. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from jobs.experiment.recipes import comparable
from jobs.statistics import round_half_up
from jobs.store.scores import Score
from jobs.tables.summary import MethodSummary, Summary


def order_sentences(summary: Summary, labels: Mapping[str, str]) -> dict[str, str]:
    """Corpus -> a sentence with both orders, where dropped runs decide which of two methods that are compared has the better mean score."""
    found = {}
    for corpus in dict.fromkeys(method.corpus for method in summary.methods):
        known = [
            (method.mean_ua, method.mean_ua_all_runs, method)
            for method in summary.methods
            if method.corpus == corpus and method.mean_ua is not None and method.mean_ua_all_runs is not None
        ]
        pairs = [(one, two) for one, two in itertools.combinations(known, 2) if _compared(summary, one[2], two[2])]
        if any((one[0] - two[0]) * (one[1] - two[1]) < 0 for one, two in pairs):
            kept = _ordered([(mean, method) for mean, _, method in known], labels, summary.score)
            every = _ordered([(mean, method) for _, mean, method in known], labels, summary.score)
            found[corpus] = f"The order of methods depends on the dropped runs: over kept runs {kept}; over all runs {every}."
    return found


def _compared(summary: Summary, one: MethodSummary, two: MethodSummary) -> bool:
    """Whether their means are over the same folds, and their recipes such that tests compare them."""
    return one.folds == two.folds and comparable(summary.recipes, one.method, two.method)


def _ordered(means: Sequence[tuple[float, MethodSummary]], labels: Mapping[str, str], score: Score) -> str:
    """`TAPT 71.2, V-FT 70.9`: the best mean first."""
    ordered = sorted(means, key=lambda each: score.order(each[0]))
    return ", ".join(f"{labels.get(method.method, method.method)} {round_half_up(mean)}" for mean, method in ordered)
