"""Corrections for many comparisons, and rank correlations."""

from __future__ import annotations

import itertools

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.statistics import EXACT_POINTS, holm, rank_correlation

P_VALUES = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8)


def test_holm_by_hand() -> None:
    """The smallest p-value times four, the next times three, and so on; monotonic and at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.5, None, 0.6]) == (1.0, None, 1.0)
    assert holm([]) == ()


@settings(max_examples=40, deadline=None)
@given(P_VALUES)
def test_holm_keeps_the_order_and_lies_between_one_test_and_bonferroni(values: list[float | None]) -> None:
    """A corrected p-value is not below the original and not above Bonferroni's; untested comparisons are not counted."""
    found = holm(values)
    tested = [(before, after) for before, after in zip(values, found, strict=True) if before is not None]
    assert [value is None for value in found] == [value is None for value in values]
    for before, after in tested:
        assert after is not None
        assert before <= after <= min(1.0, before * len(tested)) + 1e-12
    ordered = [after for _, after in sorted((before, after) for before, after in tested if after is not None)]
    assert ordered == sorted(ordered)


def test_rank_correlation_by_hand() -> None:
    """Of four points in opposite order rho is -1, and two of the 24 arrangements are as far from zero."""
    found = rank_correlation([1, 2, 3, 4], [9, 7, 5, 1])
    assert found is not None
    assert found.n == 4
    assert (found.rho, found.p) == pytest.approx((-1, 2 / 24))


@pytest.mark.parametrize(("first", "second"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [5, 5, 5, 5])])
def test_no_rank_correlation_of_few_or_constant_points(first: list[float], second: list[float]) -> None:
    """The result is None."""
    assert rank_correlation(first, second) is None


def test_rank_correlation_of_different_lengths_is_refused() -> None:
    """Different lengths are a ValueError."""
    with pytest.raises(ValueError, match="4 and 5"):
        rank_correlation([1, 2, 3, 4], [1, 2, 3, 4, 5])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=5))
def test_exact_p_counts_every_arrangement(pairs: list[tuple[int, int]]) -> None:
    """With ties too, p is the share of all arrangements whose rho is as far from zero."""
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if found is None:
        assert len(set(first)) == 1 or len(set(second)) == 1
        return
    rhos = [float(scipy.stats.spearmanr(first, arranged).statistic) for arranged in itertools.permutations(second)]
    assert found.p == pytest.approx(sum(abs(rho) >= abs(found.rho) - 1e-9 for rho in rhos) / len(rhos))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=4, max_size=12))
def test_rho_agrees_with_scipy(pairs: list[tuple[float, float]]) -> None:
    """And so does p, above the number of points with an exact p."""
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if found is not None:
        told = scipy.stats.spearmanr(first, second)
        assert found.rho == pytest.approx(float(told.statistic))
        assert 0 < found.p <= 1 or abs(found.rho) == pytest.approx(1)
        if len(first) > EXACT_POINTS:
            assert found.p == pytest.approx(float(told.pvalue), abs=1e-9)
