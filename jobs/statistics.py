"""Statistics of tables: means, standard deviations, intervals, paired tests and rank correlations, exact in decimal. Pure.

Every number is taken at its shortest decimal form (its `repr`): 62.25 is exactly 62.25, so that it prints as 62.3, and
differences that are equal in decimal are equal here. A statistic that the data are too few for is None, never NaN or infinity.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from typing import NamedTuple, TypeVar

ALPHA = 0.05
MIN_POINTS = 4  # of a rank correlation: with three points no p-value is below 1/3
EXACT_POINTS = 8  # up to here the p-value of a rank correlation is exact: all 8! = 40 320 permutations take 0.1 s
LEVEL = 0.95
POWER = 0.8  # of the smallest difference that counts as detectable
EXACT_PAIRS = 150  # the exact distribution of the signed-rank statistic costs n^4 bits of work: about 0.1 s here
_WIDE = Context(prec=700, rounding=ROUND_HALF_UP)  # a float has at most 309 digits before the point and 324 + 17 after it
Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """A two-sided confidence interval, in the units of the data."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Tests of paired differences against zero; None where there are too few data. p-values are two-sided and not corrected."""

    pairs: int
    mean: float | None
    interval: Interval | None  # Student's t, 95 %
    t_p: float | None  # paired t-test; None below 2 pairs or when all differences are equal
    wilcoxon_p: float | None  # signed-rank test, zero differences dropped; None when none is left


def known(values: Iterable[float | None]) -> list[float]:
    """The values that are not None."""
    return [value for value in values if value is not None]


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None of no values; raises ValueError for NaN and infinity."""
    return float(statistics.mean(_exact(values))) if values else None


def sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1), None below 2 values; exactly 0 for equal values."""
    if len(values) < 2:
        return None
    return math.sqrt(statistics.variance(_exact(values)))


def t_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of the mean by Student's t with n - 1 degrees of freedom, None below 2 values."""
    spread = sd(values)
    centre = mean(values)
    if spread is None or centre is None:
        return None
    return interval_about(centre, spread / math.sqrt(len(values)), len(values) - 1)


def interval_about(centre: float, error: float, degrees: float) -> Interval:
    """95 % interval of a mean with a standard error, by Student's t. `degrees`: of freedom of the error, at least 1."""
    from scipy.special import stdtrit

    reach = float(stdtrit(degrees, 0.5 + LEVEL / 2)) * error
    return Interval(centre - reach, centre + reach)


def differences_by_key(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    """`second - first`, exact in decimal, for the keys that both have."""
    shared = [key for key in first if key in second]
    left, right = _exact([first[key] for key in shared]), _exact([second[key] for key in shared])
    return {key: float(after - before) for key, before, after in zip(shared, left, right, strict=True)}


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Tests of `second - first`, pair by pair.

    Raises ValueError when the lengths differ.
    """
    differences = [right - left for left, right in zip(_exact(first), _exact(second), strict=True)]
    values = [float(difference) for difference in differences]
    return PairedTest(
        pairs=len(values),
        mean=float(statistics.mean(differences)) if differences else None,
        interval=t_interval(values),
        t_p=_t_p(differences),
        wilcoxon_p=_wilcoxon_p(differences),
    )


def paired_by_key(first: Mapping[Key, float], second: Mapping[Key, float]) -> PairedTest:
    """Tests of `second - first` over the keys that both have."""
    shared = [key for key in first if key in second]
    return paired_test([first[key] for key in shared], [second[key] for key in shared])


@dataclass(frozen=True)
class Shares:
    """Shares of the variance of one score that folds, seeds and the rest have; they sum to 1."""

    folds: float
    seeds: float
    rest: float


@dataclass(frozen=True)
class CrossedMean:
    """The mean of scores over folds and seeds, both taken as samples."""

    folds: int
    seeds: int
    mean: float
    error: float  # standard error
    degrees: float  # of freedom of the error, by Satterthwaite's approximation
    interval: Interval  # Student's t, 95 %
    p: float | None  # two-sided, of a mean of zero; None if all scores are equal
    shares: Shares | None  # None if all scores are equal
    detectable: float  # mean that a test at 5 % finds with probability `POWER`, if error and degrees stay


def crossed_mean(by_fold: Sequence[Mapping[int, float]]) -> CrossedMean | None:
    """Mean and interval for new folds and new seeds. `by_fold`: slot -> score, for each fold; slots that a fold lacks are left out.

    The model is score = mean + fold + seed + rest with three independent random effects, estimated by the method of moments from the
    mean squares of the two-way layout (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4); for such data it gives the
    estimates of REML unless one of them would be negative, which counts as zero. The variance of the mean is
    (MS_folds + MS_seeds - MS_rest) / (folds * seeds), with the degrees of freedom of Satterthwaite (Biometrics Bulletin 2, 1946).
    None below 2 folds or 2 seeds.
    """
    shared = [slot for slot in (by_fold[0] if by_fold else {}) if all(slot in scores for scores in by_fold)]
    folds, seeds = len(by_fold), len(shared)
    if folds < 2 or seeds < 2:
        return None
    rows = [_exact([scores[slot] for slot in shared]) for scores in by_fold]
    centre = statistics.mean(itertools.chain.from_iterable(rows))
    of_folds = [statistics.mean(row) - centre for row in rows]
    of_seeds = [statistics.mean(column) - centre for column in zip(*rows, strict=True)]
    rest = Fraction(0)
    for row, fold in zip(rows, of_folds, strict=True):
        rest += sum((value - centre - fold - seed) ** 2 for value, seed in zip(row, of_seeds, strict=True))
    squares = (
        float(seeds * sum(fold**2 for fold in of_folds) / (folds - 1)),
        float(folds * sum(seed**2 for seed in of_seeds) / (seeds - 1)),
        float(rest / ((folds - 1) * (seeds - 1))),
    )
    return _crossed(folds, seeds, float(centre), *squares)


def _crossed(folds: int, seeds: int, centre: float, ms_folds: float, ms_seeds: float, ms_rest: float) -> CrossedMean:
    """From the mean squares of folds, seeds and the rest."""
    degrees_of = (folds - 1, seeds - 1, (folds - 1) * (seeds - 1))
    # An effect whose mean square is below that of the rest has a variance of zero, and its mean square is no part of the error.
    parts = [(1, ms_folds, degrees_of[0])] if ms_folds > ms_rest else []
    parts += [(1, ms_seeds, degrees_of[1])] if ms_seeds > ms_rest else []
    parts += [(1 - len(parts), ms_rest, degrees_of[2])] if len(parts) != 1 else []
    variance = sum(sign * square for sign, square, _ in parts)
    error = math.sqrt(variance / (folds * seeds))
    degrees = variance**2 / sum(square**2 / freedom for _, square, freedom in parts) if variance else float(degrees_of[2])
    components = (max(0.0, ms_folds - ms_rest) / seeds, max(0.0, ms_seeds - ms_rest) / folds, ms_rest)
    total = sum(components)
    from scipy.special import stdtr, stdtrit

    reach = float(stdtrit(degrees, 0.5 + LEVEL / 2)) * error
    return CrossedMean(
        folds=folds,
        seeds=seeds,
        mean=centre,
        error=error,
        degrees=degrees,
        interval=Interval(centre - reach, centre + reach),
        p=float(2 * stdtr(degrees, -abs(centre) / error)) if error else None,
        shares=Shares(*(component / total for component in components)) if total else None,
        detectable=detectable(error, degrees),
    )


def detectable(error: float, degrees: float) -> float:
    """The smallest mean that a two-sided t-test at the level `ALPHA` finds, with the right sign, with the probability `POWER`.

    `error`: standard error of the mean, `degrees`: its degrees of freedom. From the noncentral t distribution (Cohen, Statistical Power
    Analysis, 1988, chapter 2).
    """
    from scipy.optimize import brentq
    from scipy.special import nctdtr, stdtrit

    limit = float(stdtrit(degrees, 1 - ALPHA / 2))

    def missing(shift: float) -> float:
        return POWER - float(1 - nctdtr(degrees, shift, limit))

    if not error:
        return 0.0
    shift = limit
    while missing(shift) > 0:
        shift *= 1.25
    return error * float(brentq(missing, 0.0, shift))


def percent(share: float) -> float:
    """A fraction in percent, by its shortest decimal form: 0.57 -> 57.0."""
    return float(100 * Fraction(repr(float(share))))


def round_half_up(value: float, digits: int = 1) -> str:
    """A number with `digits` decimals, halves away from zero: 62.25 -> `62.3`, -0.04 -> `0.0`; ValueError for NaN and infinity."""
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be rounded")
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), context=_WIDE)
    return f"{abs(rounded) if rounded.is_zero() else rounded:f}"


def p_text(value: float | None) -> str:
    """A p-value for a table: three decimals, `<0.001`, or a dash for None."""
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else round_half_up(value, 3)


def _exact(values: Sequence[float]) -> list[Fraction]:
    return [Fraction(repr(float(value))) for value in values]


def _t_p(differences: Sequence[Fraction]) -> float | None:
    if len(differences) < 2:
        return None
    variance = statistics.variance(differences)
    if variance == 0:
        return None
    from scipy.special import stdtr

    statistic = float(statistics.mean(differences)) / math.sqrt(variance / len(differences))
    return float(2 * stdtr(len(differences) - 1, -abs(statistic)))


def _wilcoxon_p(differences: Sequence[Fraction]) -> float | None:
    """Exact over all signs of the ranks, ties at their mid-rank; by the normal approximation above `EXACT_PAIRS`."""
    moved = sorted((difference for difference in differences if difference), key=abs)
    if not moved:
        return None
    if len(moved) > EXACT_PAIRS:
        from scipy.stats import wilcoxon

        return float(wilcoxon([float(difference) for difference in moved], method="asymptotic").pvalue)
    ranks = _doubled_ranks([abs(difference) for difference in moved])
    positive = sum(rank for rank, difference in zip(ranks, moved, strict=True) if difference > 0)
    smaller = min(positive, sum(ranks) - positive)
    return min(1.0, float(Fraction(2 * _signs_up_to(ranks, smaller), 2 ** len(ranks))))


def _doubled_ranks(ordered: Sequence[Fraction]) -> list[int]:
    """Twice the mid-rank of every value of an ascending sequence."""
    ranks: list[int] = []
    for _, tied in itertools.groupby(ordered):
        ties = len(list(tied))
        ranks.extend([2 * len(ranks) + 1 + ties] * ties)
    return ranks


def _signs_up_to(ranks: Sequence[int], limit: int) -> int:
    """How many of the 2^n subsets of ranks sum to at most `limit`.

    The number of subsets per sum is a coefficient of the product of (1 + x^rank). One long integer holds the coefficients in
    fields wide enough for 2^n, so that each multiplication is a shift and an addition.
    """
    width = len(ranks) // 8 + 1  # bytes
    product = 1
    for rank in ranks:
        product += product << (8 * width * rank)
    fields = product.to_bytes(width * (sum(ranks) + 1), "little")
    return sum(int.from_bytes(fields[place * width : (place + 1) * width], "little") for place in range(limit + 1))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's coefficient and its two-sided p-value under independence."""

    n: int
    rho: float
    p: float


def holm(values: Sequence[float | None]) -> tuple[float | None, ...]:
    """p-values corrected for multiple comparisons by Holm's step-down procedure (Scand. J. Statist. 6, 1979, 65-70).

    None is a comparison that could not be tested: it stays None and is not counted.
    """
    tested = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (value, place) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * value))
        corrected[place] = least
    return tuple(corrected)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation | None:
    """Spearman's rank correlation, ties at their mid-rank; None below `MIN_POINTS` points or where one side is constant.

    p is two-sided: exact over all permutations up to `EXACT_POINTS` points, by Student's t beyond. Raises ValueError when the
    lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: a correlation is of pairs")
    if len(first) < MIN_POINTS or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import rankdata, spearmanr

    left, right = ([round(2 * rank) for rank in rankdata(values)] for values in (first, second))  # whole numbers, so that ties are ties
    spearman = spearmanr(left, right)
    p = _exact_p(left, right) if len(left) <= EXACT_POINTS else float(spearman.pvalue)
    return RankCorrelation(len(left), float(spearman.statistic), p)


def _exact_p(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of the permutations of one side whose sum of products with the other is at least as far from its mean."""
    import numpy as np

    expected = sum(left) * sum(right)  # n times the mean of the sums
    arranged = np.array(list(itertools.permutations(right)), dtype=np.int64) @ np.array(left, dtype=np.int64)
    distance = np.abs(len(left) * arranged - expected)
    seen = abs(len(left) * sum(map(math.prod, zip(left, right, strict=True))) - expected)
    return float((distance >= seen).mean())


def slot_means(by_fold: Sequence[Mapping[int, float]]) -> list[float]:
    """The mean over folds of every slot that all folds have. `by_fold`: slot -> score, for each fold."""
    shared = [slot for slot in (by_fold[0] if by_fold else {}) if all(slot in scores for scores in by_fold)]
    return known(mean([scores[slot] for scores in by_fold]) for slot in shared)
