"""The gain of one method over a base in percent of the gain of another, with its interval, and where it is no number. Pure.

A ratio of two means has no mean of its own: where the denominator may be zero, it is as likely +3000 % as -3000 %. Fieller's interval
of such a ratio is bounded exactly where the denominator differs from zero at the level of the interval (E. C. Fieller, "Some problems in
interval estimation", Journal of the Royal Statistical Society B 16, 1954, 175-185). Hence the rule: there is a ratio only where the 95 %
interval of the denominator, a gain, lies above zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from jobs.statistics import LEVEL, Interval, differences_by_key, mean, t_interval

Pairs = Mapping[tuple[str, int], float]  # (fold, slot) -> UA of the run that fills it


@dataclass(frozen=True)
class GainRatio:
    """A ratio of gains over the (fold, slot) pairs that all three methods have; gains in points of UA."""

    pairs: int
    gain: float | None  # of the denominator; None without pairs
    gain_interval: Interval | None  # 95 %, Student's t over pairs; None below two pairs
    percent: float | None  # None: the interval of the denominator is not above zero
    interval: Interval | None  # of `percent`, 95 %, Fieller's


def gain_ratio(base: Pairs, of: Pairs, to: Pairs) -> GainRatio:
    """The gain of `of` over `base` in percent of the gain of `to` over `base`, pair by pair."""
    top, bottom = differences_by_key(base, of), differences_by_key(base, to)
    shared = [key for key in top if key in bottom]
    numerators, denominators = [top[key] for key in shared], [bottom[key] for key in shared]
    gain, interval = mean(denominators), t_interval(denominators)
    if gain is None or interval is None or interval.low <= 0:
        return GainRatio(len(shared), gain, interval, None, None)
    exact = [sum(Fraction(repr(value)) for value in values) for values in (numerators, denominators)]
    low, high = _fieller(numerators, denominators)
    return GainRatio(len(shared), gain, interval, float(100 * exact[0] / exact[1]), Interval(100 * low, 100 * high))


def ratio(base: float, of: float, to: float) -> float | None:
    """The same of published means, which have no spread: from the means alone, exact in decimal; None where `to` has no gain."""
    exact = [Fraction(repr(float(value))) for value in (base, of, to)]
    gain = exact[2] - exact[0]
    return float(100 * (exact[1] - exact[0]) / gain) if gain > 0 else None


def _fieller(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """95 % interval of the ratio of two means of paired values, at least two, where the interval of the denominator excludes zero.

    The values r for which the mean of numerator - r * denominator does not differ from zero by a paired t-test.
    """
    from scipy.special import stdtrit

    n = len(numerators)
    above, below = statistics.fmean(numerators), statistics.fmean(denominators)
    factor = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) ** 2 / n
    a = below**2 - factor * statistics.variance(denominators)
    b = above * below - factor * statistics.covariance(numerators, denominators)
    c = above**2 - factor * statistics.variance(numerators)
    root = math.sqrt(max(0.0, b**2 - a * c))
    return Interval((b - root) / a, (b + root) / a)
