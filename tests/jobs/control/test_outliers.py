"""Outlier rules: what they drop and keep, what they do not depend on, and that the benchmark still shows it."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control.outliers import FinishedRun, Judgement, RunId, check_rule, judge, rule_in_words, verdict_in_words
from jobs.errors import UsageError
from jobs.experiment.config import OutlierRule

ROOT = Path(__file__).parents[3]
quick = settings(max_examples=60, deadline=None)
GRID = {"1": (60.0, 61.0, 62.0, 63.0, 64.0), "2": (70.5, 71.5, 70.0, 72.0, 71.0), "3": (55.0, 56.0, 57.0, 54.0, 55.5)}


def attempts_of(cells: Mapping[str, Sequence[float]], generation: int = 0) -> list[FinishedRun]:
    return [FinishedRun(fold, slot, generation, slot, ua) for fold, cell in cells.items() for slot, ua in enumerate(cell)]


def judged(attempts: Sequence[FinishedRun], rule: OutlierRule | str = OutlierRule.pooled, sigmas: float = 2.0) -> Judgement:
    """The newest run of every slot, judged among all."""
    newest: dict[tuple[str, int], int] = {}
    for attempt in attempts:
        newest[attempt.fold, attempt.slot] = max(attempt.generation, newest.get((attempt.fold, attempt.slot), 0))
    return judge(rule, attempts, {(*slot, generation) for slot, generation in newest.items()}, sigmas)


def out_of(attempts: Sequence[FinishedRun], rule: OutlierRule | str = OutlierRule.pooled, sigmas: float = 2.0) -> set[RunId]:
    return {(verdict.fold, verdict.slot, verdict.generation) for verdict in judged(attempts, rule, sigmas).out}


@st.composite
def grids(draw: st.DrawFn) -> list[FinishedRun]:
    """Some folds and slots, a few of them run again; UA in quarters, so that shifts and halves are exact, with gross outliers and ties."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    ua = st.one_of(st.integers(240, 260), st.integers(0, 400)).map(lambda quarters: quarters / 4)
    return [
        FinishedRun(str(fold), slot, generation, slot + 1000 * generation, draw(ua))
        for fold, slots in enumerate(shape)
        for slot in range(slots)
        for generation in range(draw(st.integers(1, 3)))
    ]


def test_collapsed_runs_are_found_at_five_seeds() -> None:
    """One run at chance in a cell of five is out, and nothing else, where the literal rule finds nothing."""
    cells = {**GRID, "2": (70.5, 25.0, 70.0, 72.0, 71.0)}
    assert out_of(attempts_of(cells)) == {("2", 1, 0)}
    assert out_of(attempts_of(cells), OutlierRule.cell) == set()


def test_runs_too_good_are_out_as_well() -> None:
    """The rule has two sides: dropping only low runs would raise the mean."""
    assert out_of(attempts_of({**GRID, "3": (55.0, 56.0, 75.0, 54.0, 55.5)})) == {("3", 2, 0)}


def test_a_fold_has_its_own_scale_within_limits() -> None:
    """At least the pooled scale and at most 2.5 times it, computed here by hand; `common` has one scale and drops runs of a wide fold."""
    cells = {"a": (60.0, 60.5, 61.0, 61.5, 62.0), "b": (40.0, 43.0, 46.0, 49.0, 52.0), "c": (30.0, 50.0, 70.0, 10.0, 90.0)}
    pooled = 1.4826 * 4.5  # the median of 0.5 0.5 1 1, 3 3 6 6, 20 20 40 40
    found = judged(attempts_of(cells)).verdicts
    scales = {verdict.fold: verdict.scale for verdict in found}
    assert scales == {"a": pytest.approx(pooled), "b": pytest.approx(pooled), "c": pytest.approx(2.5 * pooled)}
    wide = {"a": (60.0, 61.0, 62.0, 63.0, 64.0), "b": (40.0, 41.0, 42.0, 43.0, 44.0), "c": (66.0, 69.0, 70.0, 72.0, 74.0)}
    assert judged(attempts_of(wide)).verdicts[-1].scale == pytest.approx(1.4826 * 3)
    assert {verdict.scale for verdict in judged(attempts_of(wide), "common").verdicts} == {1.4826 * 2}
    assert out_of(attempts_of({**wide, "c": (63.5, 69.0, 70.0, 72.0, 74.0)}), "common") == {("c", 0, 0)}
    assert out_of(attempts_of({**wide, "c": (63.5, 69.0, 70.0, 72.0, 74.0)})) == set()


@pytest.mark.slow
@quick
@given(grids())
def test_an_own_scale_only_widens_limits(runs: list[FinishedRun]) -> None:
    """What `pooled` drops, `common` drops too: the scale of a fold is never below the common one."""
    assert out_of(runs, "pooled") <= out_of(runs, "common")


def test_scale_leaves_out_the_smallest_distance_of_each_cell() -> None:
    """Median and scale of `common` are those of the definition, computed here by hand."""
    cells = {"a": (60.0, 61.0, 63.0, 66.0, 50.0), "b": (40.0, 41.0, 43.0)}
    found = judged(attempts_of(cells), "common").verdicts
    distances = [1.0, 2.0, 5.0, 11.0, 1.0, 2.0]  # without the zero of either median
    assert {verdict.centre for verdict in found} == {61.0, 41.0}
    assert {verdict.scale for verdict in found} == {1.4826 * statistics.median(distances)}
    assert [verdict.out for verdict in found] == [False, False, False, False, True, False, False, False]
    assert found[4].distance == pytest.approx(11 / (1.4826 * 2))


def test_dropped_runs_still_make_centre_and_scale() -> None:
    """A rerun is judged against every run ever made: dropping a run narrows nothing."""
    first = attempts_of({"1": (60.0, 61.0, 62.0, 64.0, 80.0), "2": (50.0, 51.0, 70.0, 48.0, 49.0)})
    assert out_of(first, "common") == {("1", 4, 0), ("2", 2, 0)}
    rerun = [FinishedRun("1", 4, 1, 1004, 67.0), FinishedRun("2", 2, 1, 1002, 50.5)]
    found = judged([*first, *rerun], "common").verdicts
    assert found[4].centre == 63.0  # of 60, 61, 62, 64, 67, 80
    assert found[4].scale == pytest.approx(1.4826 * statistics.median([1, 2, 3, 4, 17, 0.25, 0.75, 1.25, 2.25, 19.75]))
    assert not found[4].out
    dropped = {(each.fold, each.slot) for each in rerun}
    alone = [each for each in first if (each.fold, each.slot) not in dropped]
    assert ("1", 4, 1) in out_of([*alone, *rerun], "common")


def test_only_runs_that_fill_slots_are_judged() -> None:
    """Every slot has one verdict, of its newest run, in the order of folds and slots."""
    runs = [*attempts_of(GRID), FinishedRun("2", 3, 1, 1003, 71.0)]
    trials = [(verdict.fold, verdict.slot, verdict.generation) for verdict in judged(runs).verdicts]
    assert trials == [(fold, slot, int((fold, slot) == ("2", 3))) for fold in "123" for slot in range(5)]


@quick
@given(grids(), st.integers(-1000, 1000), st.sampled_from(["pooled", "common", "cell"]))
def test_shift_changes_nothing(runs: list[FinishedRun], quarters: int, rule: str) -> None:
    """Points added to every run move the centres alone."""
    moved = [replace(each, ua=each.ua + quarters / 4) for each in runs]
    assert out_of(moved, rule) == out_of(runs, rule)


@quick
@given(grids(), st.dictionaries(st.sampled_from("0123"), st.integers(-100, 100), min_size=4, max_size=4))
def test_difficulty_of_a_fold_changes_nothing(runs: list[FinishedRun], shifts: dict[str, int]) -> None:
    """A fold that is harder for all its runs leaves the pooled rule as it was."""
    assert out_of([replace(each, ua=each.ua + shifts[each.fold]) for each in runs]) == out_of(runs)


@quick
@given(grids(), st.sampled_from([0.25, 0.5, 2.0, 10.0, 1024.0]), st.sampled_from(["pooled", "common", "cell"]))
def test_scale_changes_nothing(runs: list[FinishedRun], factor: float, rule: str) -> None:
    """In other units the same runs are out."""
    assert out_of([replace(each, ua=each.ua * factor) for each in runs], rule) == out_of(runs, rule)


@quick
@given(grids(), st.randoms(use_true_random=False), st.sampled_from(list(OutlierRule)))
def test_order_changes_nothing(runs: list[FinishedRun], order: random.Random, rule: OutlierRule) -> None:
    """Whatever the order of the attempts, the judgement is the same to the last digit."""
    shuffled = list(runs)
    order.shuffle(shuffled)
    assert judged(shuffled, rule) == judged(runs, rule)


@quick
@given(grids(), st.sampled_from(["pooled", "common", "cell"]))
def test_both_sides_are_alike(runs: list[FinishedRun], rule: str) -> None:
    """Mirrored results are judged alike."""
    assert out_of([replace(each, ua=100 - each.ua) for each in runs], rule) == out_of(runs, rule)


@quick
@given(grids(), st.floats(0.5, 5), st.floats(0.1, 5))
def test_wider_limits_drop_fewer(runs: list[FinishedRun], sigmas: float, more: float) -> None:
    """What is out at more sigmas is out at fewer."""
    assert out_of(runs, sigmas=sigmas + more) <= out_of(runs, sigmas=sigmas)


@quick
@given(grids())
def test_never_is_a_whole_method_out(runs: list[FinishedRun]) -> None:
    """Of all runs some are nearest to their centres and would be kept, whatever the results."""
    found = judge("pooled", runs, {each.run_id for each in runs}, 1.0)
    assert len(found.out) < len(found.verdicts)


def test_equal_distances_are_judged_alike_in_decimals() -> None:
    """Binary fractions do not decide: 60.1 and 64.5 are equally far from 62.3."""
    values = (60.1, 64.5, 62.3, 61.3, 63.3)
    first, second, *_ = judged(attempts_of({"1": values, "2": values}), sigmas=2.2 / (1.4826 * 1.6)).verdicts
    assert first.distance == second.distance
    assert not first.out
    assert not second.out


def test_alike_runs_are_never_out() -> None:
    """Where all runs of every cell are the same, nothing is out, with no scale to divide by."""
    found = judged(attempts_of({"1": (70.1,) * 5, "2": (0.3,) * 5}))
    assert not found.out
    assert {(verdict.scale, verdict.distance) for verdict in found.verdicts} == {(0.0, 0.0)}


def test_few_runs_that_differ_among_many_equal() -> None:
    """If most runs are equal, the mean distance replaces a median of zero: one that differs is out, many are a spread."""
    alike = {str(fold): (100.0,) * 5 for fold in range(4)}
    assert out_of(attempts_of({**alike, "4": (100.0, 100.0, 25.0, 100.0, 100.0)})) == {("4", 2, 0)}
    spread = {str(fold): (100.0, 100.0, 97.0, 100.0, 97.0) for fold in range(4)}
    found = judged(attempts_of({**spread, "4": (100.0,) * 5}))
    pooled = 1.2533 * 3 * 8 / 20  # 12 of 20 distances are zero
    assert {verdict.fold: verdict.scale for verdict in found.verdicts} == {**dict.fromkeys("0123", 1.4826 * 1.5), "4": pooled}
    assert not found.out


def test_one_seed_cannot_be_compared() -> None:
    """Cells of one run are their own medians."""
    assert out_of(attempts_of({"1": (60.0,), "2": (25.0,)})) == set()
    assert judge("pooled", [], set(), 2.0).verdicts == ()


@quick
@given(st.lists(st.floats(0, 100), min_size=2, max_size=5))
def test_literal_rule_never_fires_below_six_seeds(values: list[float]) -> None:
    """No value of five lies two sample standard deviations from their mean, whatever the values."""
    assert out_of(attempts_of({"1": values}), OutlierRule.cell) == set()


def test_literal_rule_fires_from_six_seeds_on() -> None:
    """Five alike and one apart are the furthest that six can be: 2.04 standard deviations."""
    values = (70.0,) * 5 + (25.0,)
    assert out_of(attempts_of({"1": values}), OutlierRule.cell) == {("1", 5, 0)}
    verdict = judged(attempts_of({"1": values}), OutlierRule.cell).verdicts[5]
    assert verdict.distance == pytest.approx(5 / 6**0.5)
    assert verdict.centre == 62.5
    assert verdict.scale == pytest.approx(statistics.stdev(values))


def test_literal_rule_takes_the_runs_that_fill_the_slots() -> None:
    """A dropped run no longer counts in mean and standard deviation of `cell`."""
    values = (70.0, 71.0, 69.0, 70.5, 69.5, 25.0)
    runs = [*attempts_of({"1": values}), FinishedRun("1", 5, 1, 1005, 72.4)]
    found = judged(runs, OutlierRule.cell)
    assert found.verdicts[5].centre == pytest.approx(statistics.mean([*values[:5], 72.4]))


def test_no_rule_drops_nothing() -> None:
    """`none` judges every run and drops none."""
    found = judged(attempts_of({**GRID, "1": (0.0, 61.0, 62.0, 63.0, 64.0)}), OutlierRule.none)
    assert len(found.verdicts) == 15
    assert not found.out


@pytest.mark.parametrize(("sigmas", "fewest"), [(1.0, 3), (1.5, 5), (2.0, 6), (2.5, 9), (3.0, 11)])
def test_rule_that_cannot_fire_is_refused(sigmas: float, fewest: int) -> None:
    """`cell` is refused below the seeds at which (n-1)/sqrt(n) exceeds its limit, and the reason names the first that will do."""
    with pytest.raises(UsageError, match=f"can never drop a run of {fewest - 1} seeds.*at least {fewest} seeds"):
        check_rule(OutlierRule.cell, fewest - 1, sigmas)
    check_rule(OutlierRule.cell, fewest, sigmas)
    for rule in (OutlierRule.pooled, OutlierRule.common, OutlierRule.none):
        check_rule(rule, 1, sigmas)


def test_refusal_at_five_seeds_gives_the_reason() -> None:
    """The bound is there in figures."""
    with pytest.raises(UsageError, match=r"\(n-1\)/sqrt\(n\) = 1\.79 standard deviations .* drops beyond 2; use at least 6 seeds") as error:
        check_rule("cell", 5, 2.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sigmas", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_that_are_no_limit_are_refused(sigmas: float) -> None:
    """A limit is a positive number."""
    with pytest.raises(UsageError, match="above 0"):
        check_rule("pooled", 5, sigmas)


def test_unknown_rules_are_refused_by_name() -> None:
    """A rule that is not known is one line that lists the known ones."""
    with pytest.raises(UsageError, match="'iqr': known are pooled, common, cell, none"):
        judge("iqr", [], set(), 2.0)


def test_invalid_arguments_raise_errors() -> None:
    """A run that is there twice, one to judge that is not there, or a UA that is not finite."""
    runs = attempts_of(GRID)
    for wrong, current in (
        (([*runs, runs[0]]), {("1", 0, 0)}),
        (runs, {("1", 0, 1)}),
        ([replace(runs[0], ua=float("nan"))], {("1", 0, 0)}),
    ):
        with pytest.raises(ValueError, match=r"twice|not among"):
            judge("pooled", wrong, current, 2.0)


def test_texts_give_rule_and_parameters() -> None:
    """A table can print the rule, and `explain` a verdict, from these alone."""
    assert rule_in_words(OutlierRule.none, 2.0, 3) == "none"
    pooled = rule_in_words(OutlierRule.pooled, 2.5, 1)
    assert all(
        part in pooled for part in ("pooled", "2.5 sigmas", "median", "1.4826", "2.5 times it", "every run ever made", "at most 1 round")
    )
    assert "rule pooled of earlier versions, with one sigma for all folds" in rule_in_words("common", 2.0, 3)
    assert all(part in rule_in_words("cell", 2.0, 3) for part in ("2 sample standard deviations", "mean of its cell", "3 rounds"))
    verdict = judged(attempts_of({**GRID, "2": (70.5, 25.0, 70.0, 72.0, 71.0)})).out[0]
    assert verdict_in_words("pooled", verdict) == "UA 25.0 lies 24.55 sigmas below the median 70.5 of its cell (sigma 1.9 of its fold)"
    assert verdict_in_words("common", verdict).endswith("(sigma 1.9, pooled over folds)")
    verdict = judged(attempts_of({"1": (25.0,) * 5 + (70.0,)}), "cell").out[0]
    assert verdict_in_words("cell", verdict).startswith("UA 70.0 lies 2.04 standard deviations above the mean 32.5 of its cell")


def test_judging_imports_nothing_heavy() -> None:
    """Every pass judges: it must not import numpy or the configuration."""
    heavy = ("numpy", "scipy", "pandas", "omegaconf", "jobs.experiment.config")
    code = f"import sys, jobs.control.outliers; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_benchmark_shows_what_the_rule_is_for() -> None:
    """A few grids are enough to see that the default rule finds collapsed runs at five seeds, hardly touches the others, and that the
    literal one does neither."""
    command = [sys.executable, "benchmarks/outliers.py", "--repeats", "30", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rules, spreads = map(_cells, done.stdout.strip().split("\n\n"))
    assert (len(rules), len(spreads)) == (2 + 4 * 7, 2 + 6 * 4 * 2)

    def figure(rows: list[list[str]], column: str, *wanted: str) -> float:
        [row] = [row for row in rows[2:] if row[:2] == list(wanted[:2]) and all(map(str.__contains__, row[2:], wanted[2:]))]
        return float(row[rows[0].index(column)].split(" ")[0])

    for rounds, bias in (("5", 0.3), ("3", 0.5)):
        assert figure(rules, "power", "5", "0.12", "pooled`", rounds) > 0.85
        assert figure(rules, "caught", "5", "0.12", "pooled`", rounds) > 0.93
        assert abs(figure(rules, "bias", "5", "0.12", "pooled`", rounds)) < bias
        assert figure(rules, "power", "20", "0.12", "pooled`", rounds) > 0.99
        assert figure(rules, "rerun", "5", "0", "pooled`", rounds) < 0.06
    assert figure(rules, "power", "5", "0.12", "sample sd", "5") == 0
    assert figure(rules, "bias", "5", "0.12", "sample sd", "5") < -4.5
    for spread in ("equal, 1.5", "paper, 0.9", "unequal, 1 to 7"):
        for n in ("5", "20"):
            assert figure(spreads, "false flags", n, "0", spread, "pooled") < 0.055
    assert figure(spreads, "false flags", "20", "0", "unequal, 1 to 7", "common") > 0.1


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
