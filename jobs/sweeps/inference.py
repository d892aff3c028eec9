"""What a sweep may conclude from many comparisons: a correction for their number, and rank correlations. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
MIN_POINTS = 4  # of a rank correlation: with three points no arrangement is rarer than one in three
EXACT_POINTS = 8  # 8! = 40 320 arrangements are counted one by one in 0.1 s


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's coefficient, and how likely one as far from zero is where the two have nothing to do with one another."""

    n: int
    rho: float
    p: float


def holm(values: Sequence[float | None]) -> tuple[float | None, ...]:
    """p-values corrected for their number by the step-down procedure of Holm (Scand. J. Statist. 6, 1979, 65-70).

    None stands for a comparison that could not be tested; it stays None and does not count.
    """
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    found: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (value, place) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * value))
        found[place] = least
    return tuple(found)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation | None:
    """Spearman's rank correlation, ties at their mid-rank; None below `MIN_POINTS` points or where one of the two does not vary.

    p is two-sided: exact over all arrangements up to `EXACT_POINTS` points, by Student's t beyond. Raises ValueError when the lengths
    differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: a correlation is of pairs")
    if len(first) < MIN_POINTS or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import rankdata, spearmanr

    left, right = ([round(2 * rank) for rank in rankdata(values)] for values in (first, second))  # whole numbers, so that ties are ties
    told = spearmanr(left, right)
    p = _exact_p(left, right) if len(left) <= EXACT_POINTS else float(told.pvalue)
    return RankCorrelation(len(left), float(told.statistic), p)


def _exact_p(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of the arrangements of one side whose products with the other add up to as much or as little."""
    import numpy as np

    expected = sum(left) * sum(right)  # n times the mean of the sums
    arranged = np.array(list(itertools.permutations(right)), dtype=np.int64) @ np.array(left, dtype=np.int64)
    distance = np.abs(len(left) * arranged - expected)
    seen = abs(len(left) * sum(map(math.prod, zip(left, right, strict=True))) - expected)
    return float((distance >= seen).mean())
