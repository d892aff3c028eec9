"""The arithmetic of tables: exact in decimal, and silent where data carry no statistic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple
from decimal import ROUND_HALF_UP, Decimal
from random import Random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.statistics import (
    EXACT_PAIRS,
    CrossedMean,
    crossed_mean,
    detectable,
    differences_by_key,
    mean,
    p_text,
    paired_test,
    percent,
    round_half_up,
    sd,
    t_interval,
)

TENTHS = st.integers(0, 1000).map(lambda tenths: tenths / 10)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (62.25, 1, "62.3"),
        (66.45, 1, "66.5"),
        (2.675, 2, "2.68"),  # below 2.675 as a binary number
        (0.05, 1, "0.1"),
        (-0.05, 1, "-0.1"),
        (-0.04, 1, "0.0"),
        (100.0, 1, "100.0"),
        (99.95, 1, "100.0"),
        (0.5, 0, "1"),
        (1e22, 1, "10000000000000000000000.0"),
        (5e-324, 1, "0.0"),
    ],
)
def test_halves_round_up(value: float, digits: int, text: str) -> None:
    """A number prints rounded half away from zero in decimal, as the paper's own means do."""
    assert round_half_up(value, digits) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12), st.integers(0, 6))
def test_rounding_agrees_with_decimal(value: float, digits: int) -> None:
    """Rounding is that of the decimal module on the shortest text of the number, whatever the number."""
    expected = Decimal(repr(value)).quantize(Decimal(10) ** -digits, rounding=ROUND_HALF_UP)
    text = round_half_up(value, digits)
    assert Decimal(text) == expected
    assert not (text.startswith("-") and expected == 0)
    assert len(text.partition(".")[2]) == digits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_numbers_are_rounded(value: float) -> None:
    """NaN and infinity are refused: they must not reach a table as text."""
    with pytest.raises(ValueError, match="cannot be rounded"):
        round_half_up(value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((71.0, 76.2, 66.3, 68.7, 67.3), "69.9"),
        ((71.8, 79.6, 70.2, 73.2, 72.5), "73.5"),
        ((72.8, 80.2, 71.0, 73.6, 73.7), "74.3"),
        ((75.2, 78.8, 56.0, 39.0), "62.3"),
        ((81.6, 83.3, 69.9, 49.7), "71.1"),
        ((86.7, 84.2, 66.8, 45.8), "70.9"),
        ((73.7, 67.7, 71.2, 53.2), "66.5"),
    ],
)
def test_means_of_the_paper(values: tuple[float, ...], text: str) -> None:
    """From the published cells the published means come out, ties included."""
    found = mean(values)
    assert found is not None
    assert round_half_up(found) == text


@given(st.lists(TENTHS, min_size=1, max_size=30))
def test_mean_is_exact_in_decimal(values: list[float]) -> None:
    """The mean of decimal numbers is the float nearest to their decimal mean, whatever their order."""
    exact = sum(Decimal(repr(value)) for value in values) / Decimal(len(values))
    assert mean(values) == mean(values[::-1]) == float(exact)


@given(st.lists(TENTHS, min_size=2, max_size=30))
def test_sd_is_the_sample_sd(values: list[float]) -> None:
    """The sd divides by n - 1, and is zero exactly when all values are equal."""
    found = sd(values)
    assert found == pytest.approx(float(np.std(values, ddof=1)), abs=1e-9)
    assert (found == 0) == (len(set(values)) == 1)


@given(st.floats(0, 1))
def test_percent_is_exact_in_decimal(share: float) -> None:
    """A fraction times 100 moves the decimal point: 0.57 is 57.0, not 56.99999999999999."""
    assert percent(share) == float(Decimal(repr(share)) * 100)
    assert percent(0.57) == 57.0


def test_statistics_of_too_few_values_are_none() -> None:
    """Too few values give None, never NaN."""
    assert (mean([]), sd([]), sd([1.0]), t_interval([]), t_interval([1.0])) == (None, None, None, None, None)


@settings(deadline=None)
@given(st.lists(TENTHS, min_size=2, max_size=30).filter(lambda values: len(set(values)) > 1))
def test_interval_is_students(values: list[float]) -> None:
    """The 95 % interval is that of scipy's t distribution."""
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    found = t_interval(values)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_interval_of_equal_values_is_a_point() -> None:
    """Values without spread give an interval without width."""
    found = t_interval([70.1, 70.1, 70.1])
    assert found is not None
    assert (found.low, found.high) == (70.1, 70.1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(TENTHS, TENTHS), min_size=3, max_size=30))
def test_paired_t_test_agrees_with_scipy(pairs: list[tuple[float, float]]) -> None:
    """Where the data carry a test, t is scipy's; no p-value is ever NaN or outside [0, 1]."""
    first, second = [left for left, _ in pairs], [right for _, right in pairs]
    found = paired_test(first, second)
    differences = {Decimal(repr(right)) - Decimal(repr(left)) for left, right in pairs}
    for p in (found.t_p, found.wilcoxon_p):
        assert p is None or 0 <= p <= 1
    assert (found.t_p is None) == (len(differences) == 1)
    assert (found.wilcoxon_p is None) == (differences == {Decimal(0)})
    if found.t_p is not None:
        assert found.t_p == pytest.approx(float(scipy.stats.ttest_rel(second, first).pvalue), rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50, unique=True), st.randoms())
def test_signed_rank_test_agrees_with_scipy(sizes: list[int], random: Random) -> None:
    """Without ties the p-value is that of scipy's exact test."""
    differences = [float(size) * random.choice((-1, 1)) for size in sizes]
    found = paired_test([0.0] * len(differences), differences)
    assert found.wilcoxon_p == pytest.approx(float(scipy.stats.wilcoxon(differences, method="exact").pvalue))


@given(st.lists(st.integers(-3, 3).filter(bool), min_size=1, max_size=9))
def test_signed_rank_test_with_ties(values: list[int]) -> None:
    """With ties the p-value is the share of all sign patterns whose smaller rank sum is no larger, counted one by one."""
    ranks = scipy.stats.rankdata(np.abs(values))
    observed = min(ranks[np.array(values) > 0].sum(), ranks[np.array(values) < 0].sum())
    patterns = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(values))]
    expected = min(1.0, 2 * sum(total <= observed for total in patterns) / len(patterns))
    assert paired_test([0.0] * len(values), [float(value) for value in values]).wilcoxon_p == pytest.approx(expected)


def test_signed_rank_test_of_many_pairs() -> None:
    """Where the exact test would cost too much, the approximation gives nearly the same."""
    generator = np.random.default_rng(0)
    differences = [float(value) for value in generator.normal(0.1, 1.0, EXACT_PAIRS + 1)]
    exact = float(scipy.stats.wilcoxon(differences, method="exact").pvalue)
    assert paired_test([0.0] * len(differences), differences).wilcoxon_p == pytest.approx(exact, rel=0.02)
    fewer = paired_test([0.0] * EXACT_PAIRS, differences[1:])
    assert fewer.wilcoxon_p == pytest.approx(float(scipy.stats.wilcoxon(differences[1:], method="exact").pvalue))


def test_signed_rank_test_of_a_textbook_case() -> None:
    """Ten differences of one sign: the exact two-sided p is 2 / 2^10; and the sign of the mean is second - first."""
    first = [60.0 + place for place in range(10)]
    second = [value + 1 + place / 10 for place, value in enumerate(first)]
    found = paired_test(first, second)
    assert found.wilcoxon_p == pytest.approx(2 / 2**10)
    assert found.mean == 1.45


@pytest.mark.parametrize(
    ("first", "second", "t_known", "wilcoxon_known"),
    [
        ([], [], False, False),
        ([70.0], [71.0], False, True),
        ([70.1, 71.2, 69.3], [70.1, 71.2, 69.3], False, False),  # identical
        ([70.1, 71.2, 69.3], [70.2, 71.3, 69.4], False, True),  # all moved by 0.1, equal only in decimal
        ([70.0, 71.0], [71.0, 70.0], True, True),
    ],
)
def test_degenerate_pairs(first: list[float], second: list[float], t_known: bool, wilcoxon_known: bool) -> None:
    """Tests that the data cannot carry are None, without a warning or an error."""
    found = paired_test(first, second)
    assert (found.t_p is not None, found.wilcoxon_p is not None) == (t_known, wilcoxon_known)
    assert found.pairs == len(first)


def test_unpaired_values_are_refused() -> None:
    """Lists of different lengths are no pairs."""
    with pytest.raises(ValueError, match="shorter"):
        paired_test([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "<0.001"), (0.00099, "<0.001"), (0.001, "0.001"), (0.0495, "0.050"), (1.0, "1.000")]
)
def test_p_values_print_in_three_decimals(value: float | None, text: str) -> None:
    """A p-value is never printed as 0."""
    assert p_text(value) == text


# Five folds of six seeds. MixedLM of statsmodels 0.15.0 (REML, `y ~ 1`, variance components 0+C(fold) and 0+C(seed)) gives for them an
# intercept of 63.325 with standard error 0.886326 and the variances 2.37878 (folds), 1.67410 (seeds) and 0.924054 (rest).
CROSSED = (
    (63.95, 65.22, 65.9, 64.23, 64.91, 64.13),
    (64.16, 64.0, 66.66, 63.25, 64.98, 65.41),
    (62.74, 64.18, 65.69, 60.15, 62.33, 64.58),
    (60.09, 59.69, 62.87, 59.53, 59.54, 63.45),
    (60.72, 63.23, 66.25, 61.74, 62.12, 64.05),
)


def crossed_of(rows: Sequence[Sequence[float]]) -> CrossedMean:
    found = crossed_mean([dict(enumerate(row)) for row in rows])
    assert found is not None
    return found


def test_mixed_model_agrees_with_statsmodels() -> None:
    """Mean, standard error and variances are those of an independent mixed model; the interval is Student's t about them."""
    found = crossed_of(CROSSED)
    assert (found.folds, found.seeds, found.mean) == (5, 6, 63.325)
    assert found.error == pytest.approx(0.886326, rel=1e-5)
    variances = (2.37878, 1.67410, 0.924054)
    assert found.shares is not None
    assert astuple(found.shares) == pytest.approx([variance / sum(variances) for variance in variances], rel=1e-4)
    assert found.interval == pytest.approx(scipy.stats.t.interval(0.95, found.degrees, loc=found.mean, scale=found.error))
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(found.mean / found.error, found.degrees))
    assert 4 < found.degrees < 4 + 5


def test_without_an_effect_of_seeds_only_the_fold_means_count() -> None:
    """Then the interval is that of scipy over the fold means, with folds - 1 degrees of freedom."""
    rows = [[60.0, 61.0, 62.0], [65.0, 67.0, 66.0], [71.0, 70.0, 69.0]]
    found = crossed_of(rows)
    means = [float(np.mean(row)) for row in rows]
    assert found.shares is not None
    assert found.shares.seeds == 0
    assert found.degrees == pytest.approx(2)
    assert found.interval == pytest.approx(scipy.stats.t.interval(0.95, 2, loc=np.mean(means), scale=scipy.stats.sem(means)))


def test_mixed_model_takes_slots_that_all_folds_have() -> None:
    """A slot that a fold lacks is left out; below two folds or seeds there is no interval, and equal scores have no test."""
    rows = [dict(enumerate(row)) for row in CROSSED]
    assert crossed_mean([{**rows[0], 9: 1.0}, *rows[1:]]) == crossed_mean(rows)
    assert crossed_mean(rows[:1]) is None
    assert crossed_mean([{0: 1.0}, {0: 2.0}]) is None
    assert crossed_mean([]) is None
    equal = crossed_of([[1.5, 1.5], [1.5, 1.5]])
    assert (equal.p, equal.shares, equal.error, equal.interval, equal.detectable) == (None, None, 0.0, (1.5, 1.5), 0.0)


@pytest.mark.slow
def test_mixed_model_covers_the_mean_over_new_folds() -> None:
    """In 95 % of simulated grids the true mean lies within it; within the interval over seeds, which knows no folds, far less often."""
    generator = np.random.default_rng(20261129)
    covered, over_seeds = 0, 0
    for _ in range(600):
        rows = 3 * generator.standard_normal((5, 1)) + generator.standard_normal((1, 5)) + 1.5 * generator.standard_normal((5, 5))
        low, high = crossed_of(rows.round(3).tolist()).interval
        covered += low <= 0 <= high
        slots = t_interval(rows.mean(0).tolist())
        over_seeds += slots is not None and slots.low <= 0 <= slots.high
    assert 0.93 <= covered / 600 <= 0.98
    assert over_seeds / 600 < 0.75


@pytest.mark.parametrize(("n", "expected"), [(5, 1.6819970833), (25, 0.5840261396)])
def test_detectable_difference_agrees_with_statsmodels(n: int, expected: float) -> None:
    """TTestPower.solve_power(nobs=n, alpha=0.05, power=0.8) of statsmodels 0.15.0, in standard deviations of the differences."""
    assert detectable(1 / math.sqrt(n), n - 1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("degrees", [1.0, 1.3, 4.0, 24.5, 1e4])
def test_detectable_difference_is_found_with_its_power(degrees: float) -> None:
    """By scipy's noncentral t distribution, also for degrees of freedom that are no whole number."""
    limit = scipy.stats.t.ppf(0.975, degrees)
    assert scipy.stats.nct.sf(limit, degrees, detectable(1.0, degrees)) == pytest.approx(0.8, abs=1e-6)


def test_differences_are_exact_in_decimal() -> None:
    """0.3 - 0.1 is 0.2, for the keys that both have, whatever their order."""
    assert differences_by_key({"a": 0.1, "b": 1.0, "c": 5.0}, {"b": 1.1, "a": 0.3}) == {"a": 0.2, "b": 0.1}
