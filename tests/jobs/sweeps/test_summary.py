"""Summary of a sweep: means, sd, differences, the best, a smaller one not distinguishable from it, nested choice, cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.experiment.sweep_section import Search
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.scores import TrialRecord
from jobs.sweeps.report.summary import SweepSummary, summarise
from tests.jobs.sweeps import report_cases as cases


def _summary(*trials: TrialRecord, **asked: object) -> SweepSummary:
    return summarise(cases.sweep(**asked), trials, cases.results(trials))  # type: ignore[arg-type]


def _labels(found: SweepSummary) -> list[str]:
    return [point.point.label for point in found.points]


def test_the_numbers_of_one_point() -> None:
    """Mean of the fold means; sd and interval over slots of the mean over folds; sd over all runs beside them."""
    (point,) = _summary(cases.trial([16], {"1": (50.0, 54.0), "2": (60.0, 62.0), "3": (70.0, 70.0)})).points
    assert point.ua.mean == 61.0  # of 52, 61 and 70
    assert point.ua.sd == pytest.approx(2**0.5)  # of the slots' 60 and 62
    assert point.ua.interval is not None
    assert point.ua.interval.high - 61 == pytest.approx(12.7062, abs=1e-4)  # t with one degree of freedom, times sqrt 2 / sqrt 2
    assert point.ua.sd_all_runs == pytest.approx((334 / 5) ** 0.5)
    assert (point.wa.mean, point.macro_f1.mean) == (62.0, 60.0)
    assert (point.runs, point.state, point.to_best) == (6, TrialState.complete, None)


def test_one_seed_has_no_spread() -> None:
    """Neither a ± nor an interval comes of one slot, however many folds there are."""
    (point,) = _summary(cases.trial([16], {"1": (50.0,), "2": (60.0,), "3": (70.0,)})).points
    assert (point.ua.mean, point.ua.sd, point.ua.interval) == (60.0, None, None)


def test_folds_have_equal_weight() -> None:
    """A slot that one fold lacks is in the fold means, and in no spread."""
    (point,) = _summary(cases.trial([16], {"1": (50.0, 60.0), "2": (70.0,), "3": (70.0, 80.0)})).points
    assert point.ua.mean == pytest.approx((55 + 70 + 75) / 3)
    assert point.ua.sd is None


def test_points_are_sorted_by_state_and_score() -> None:
    """Complete points by mean, the smaller of equal ones first; the others by their number of folds."""
    same = dict.fromkeys(cases.FOLDS, (60.0, 60.0))
    found = _summary(
        cases.trial([512], {}, TrialState.running),
        cases.trial([16], {"1": (90.0, 90.0)}, TrialState.stopped),
        cases.trial([32], {"1": (10.0, 10.0), "2": (10.0, 10.0)}, TrialState.stopped),
        cases.trial([128], {}, TrialState.failed, "no"),
        cases.trial([64, 256], same),
        cases.trial([256], same),
        cases.trial([64], dict.fromkeys(cases.FOLDS, (59.0, 62.0))),
        cases.trial([8], {}, TrialState.interrupted),
    )
    assert _labels(found) == ["64", "256", "64+256", "32", "16", "128", "512", "8"]
    assert found.best is found.points[0]
    assert found.trials == {
        TrialState.complete: 3,
        TrialState.stopped: 2,
        TrialState.failed: 1,
        TrialState.running: 1,
        TrialState.interrupted: 1,
    }


def test_differences_are_over_the_pairs_that_both_have() -> None:
    """A stopped point is compared on the folds it has, placed by that, and not tested."""
    best = cases.trial([64], {"1": (50.0, 52.0), "2": (60.0, 62.0), "3": (70.0, 72.0)})
    stopped = cases.trial([16], {"1": (48.0, 51.0)}, TrialState.stopped)
    found = _summary(best, stopped)
    point = found.points[1]
    assert point.to_best is not None
    assert (point.to_best.test.pairs, point.to_best.test.mean) == (2, -1.5)
    assert (point.to_best.holm_p, point.to_best.alike) == (None, None)
    assert point.ua.mean == 49.5
    assert point.placed_ua == 61 - 1.5
    assert found.tested == 0


def test_points_are_compared_with_the_best_by_a_corrected_test() -> None:
    """p-values are those of the paired t-test, times three for the smallest of three; equal runs are alike without a test."""
    base = {"1": (50.0, 52.0), "2": (60.0, 62.0), "3": (70.0, 72.0)}

    def off(*by: float) -> dict[str, tuple[float, ...]]:
        return {
            fold: tuple(value - less for value, less in zip(values, by[2 * place :], strict=False))
            for place, (fold, values) in enumerate(base.items())
        }

    found = _summary(
        cases.trial([64, 128], base),
        cases.trial([16], off(4, 5, 4, 5, 4, 5)),
        cases.trial([32], off(-1, 2, 1, -1, 0, 1)),
        cases.trial([128], off(0, 0, 0, 0, 0, 0.5)),
        cases.trial([2, 4, 8], base),
        cases.trial([4, 8, 16], off(3, 3, 3, 3, 3, 3)),
    )
    told = {point.point.label: point.to_best for point in found.points}
    assert found.best is not None
    assert found.best.point.label == "64+128"
    assert found.tested == 3
    first = told["16"]
    assert first is not None
    assert first.test.t_p is not None
    assert first.holm_p == pytest.approx(3 * first.test.t_p)
    assert first.alike is False
    for label in ("32", "128", "2+4+8"):
        assert told[label] is not None
        assert told[label].alike is True  # type: ignore[union-attr]
    constant = told["4+8+16"]
    assert constant is not None
    assert (constant.alike, constant.test.mean) == (None, -3)  # no spread, no test: nothing is claimed


def test_the_smallest_point_not_distinguishable_from_the_best() -> None:
    """Fewest counts first, then what they add up to; only ones smaller than the best, and not distinguishable from it."""
    found = _summary(*cases.some())
    assert found.best is not None
    assert found.smaller is not None
    assert (found.best.point.label, found.smaller.point.label) == ("16+64", "64")
    assert _summary(*cases.some()[:2]).smaller is None  # 64 is the best of these, and 16 is lower
    done = dict.fromkeys(cases.FOLDS, (60.0, 61.0))
    assert _summary(*(cases.trial([16], done, ptapt__steps=steps) for steps in (5, 6))).smaller is None  # alike, and of the same size


def test_no_best_without_a_complete_point() -> None:
    """Points are placed by their own means."""
    found = _summary(cases.trial([16], {"1": (48.0, 52.0)}, TrialState.running), cases.trial([64], {}, TrialState.running))
    assert (found.best, found.smaller, found.under_way) == (None, None, True)
    assert [point.placed_ua for point in found.points] == [50.0, None]
    assert [(choice.fold, choice.point.point.label) for choice in found.by_fold] == [("1", "16")]
    empty = _summary()
    assert (empty.points, empty.best, empty.by_fold, empty.by_size, empty.under_way) == ((), None, (), (), True)


def test_best_point_of_each_fold() -> None:
    """The best of a fold may be one that was stopped later; of equal ones the smaller."""
    found = _summary(
        cases.trial([64], {"1": (50.0, 52.0), "2": (60.0, 62.0), "3": (70.0, 72.0)}),
        cases.trial([16], {"1": (49.0, 51.0), "2": (60.0, 62.0), "3": (60.0, 62.0)}),
        cases.trial([256], {"1": (55.0, 55.0)}, TrialState.stopped),
    )
    assert [(choice.fold, choice.point.point.label, choice.mean_ua) for choice in found.by_fold] == [
        ("1", "256", 55.0),
        ("2", "16", 61.0),
        ("3", "64", 71.0),
    ]


def test_groups_by_count_and_size() -> None:
    """By count: all sets that contain it; by size: all sets that hold so many."""
    done = cases.FOLDS
    found = _summary(
        cases.trial([16], dict.fromkeys(done, (50.0,))),
        cases.trial([64], dict.fromkeys(done, (60.0,))),
        cases.trial([16, 64], dict.fromkeys(done, (70.0,))),
    )
    assert [(group.value, group.points, group.mean_ua) for group in found.by_count] == [(16, 2, 60.0), (64, 2, 65.0)]
    assert [(group.value, group.points, group.mean_ua) for group in found.by_size] == [(1, 2, 55.0), (2, 1, 70.0)]
    assert found.by_size[1].interval is None


def test_proxies_are_means_over_folds_and_counts() -> None:
    """Each k by itself too; the correlation is over complete points alone, from four on."""
    found = _summary(*cases.some())
    pair = found.points[0].proxies
    assert pair.of_set["purity"] == pytest.approx(1 - (1 / 16 + 1 / 64) / 2)
    assert pair.of_set["ptapt_loss_share"] == pytest.approx(0.7)
    assert pair.of_k[16]["inertia"] == pytest.approx(62.5)
    told = found.correlations["purity"]
    assert told is not None
    assert told.n == 4
    assert told.rho == pytest.approx(0.2)  # by UA: 16, 256, 64, 16+64; by purity: 16, 16+64, 64, 256
    assert found.correlations["entropy_share"] is None  # the same for all
    assert _summary(*cases.some()[:3]).correlations["purity"] is None


def test_unknown_proxies_are_left_out() -> None:
    """Neither missing values nor values that are not numbers are used."""
    whole = cases.trial([16, 64], {"1": (50.0,), "2": (50.0,)})
    folds = (
        replace(whole.folds[0], proxies={"k": {"16": {"purity": 0.5, "nmi": float("nan")}, "64": {}}}),
        replace(whole.folds[1], proxies={"k": {"16": {"purity": 0.7}}, "ptapt_loss_share": 0.4}),
    )
    found = _summary(replace(whole, folds=folds, state=TrialState.stopped)).points[0].proxies
    assert found.of_set == {"purity": pytest.approx(0.6), "ptapt_loss_share": 0.4}
    assert found.of_k == {16: {"purity": pytest.approx(0.6)}, 64: {}}


def test_diverged_runs_are_counted_and_excluded() -> None:
    """They are in the stages of a fold, but in no mean."""
    record = cases.trial([16], {"1": (50.0, 52.0)})
    (fold,) = record.folds
    record = replace(record, folds=(replace(fold, stages={**fold.stages, "f-1-k16-x": "finetune"}),), state=TrialState.running)
    results = cases.results([record]) | {"f-1-k16-x": cases.result("f-1-k16-x", "finetune", 60.0, diverged="loss is NaN")}
    found = summarise(cases.sweep(), [record], results)
    assert (found.diverged, found.points[0].runs, found.points[0].ua.mean) == (1, 2, 51.0)


def test_tests_apart() -> None:
    """True if they are the same in all folds, or the grid has one fold; false for one of several folds."""
    assert not _summary().tests_apart
    assert _summary(validation=cases.FIXED).tests_apart
    one = cases.sweep(folds=("1",))
    assert summarise(one, (), {}).tests_apart
    assert not summarise(replace(one, corpus=replace(one.corpus, folds=cases.FOLDS)), (), {}).tests_apart


def test_folds_apart() -> None:
    """False if a point was stopped early, and with Optuna."""
    done = cases.trial([16], dict.fromkeys(cases.FOLDS, (60.0,)))
    stopped = cases.trial([64], {"1": (50.0,)}, TrialState.stopped)
    assert _summary(done, search=Search.grid).folds_apart
    assert not _summary(done, stopped, search=Search.grid).folds_apart
    assert not _summary(done, search=Search.optuna).folds_apart


def test_a_sweep_is_under_way_until_every_point_has_a_trial() -> None:
    """Optuna's too, which tries no point twice."""
    done = cases.trial([16], dict.fromkeys(cases.FOLDS, (60.0,)))
    assert _summary(done).planned == 1
    assert not _summary(done).under_way
    assert _summary(done, search=Search.optuna, trials=2).under_way
    assert _summary(done, search=Search.optuna, trials=9).planned == 7
    assert _summary(done, search=Search.grid).under_way
    assert _summary(done, search=Search.grid).planned == 7
    assert _summary(done, search=Search.random, trials=3).planned == 3
    assert not _summary(done, search=Search.grid, sets=[[16]]).under_way


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_summary_does_not_depend_on_the_order_of_trials(data: st.DataObject) -> None:
    """Means lie within their runs, p-values in [0, 1], the best is the highest, and any order of records gives the same summary."""
    percent = st.integers(0, 1000).map(lambda tenths: tenths / 10)
    states = st.sampled_from([TrialState.stopped, TrialState.running])
    trials = []
    for counts in ([16], [64], [256], [16, 64], [64, 256]):
        done = data.draw(st.integers(0, 3))
        uas = {fold: data.draw(st.lists(percent, min_size=1, max_size=3)) for fold in cases.FOLDS[:done]}
        trials.append(cases.trial(counts, uas, data.draw(states)))
    found = _summary(*trials)
    shuffled = random.Random(data.draw(st.integers())).sample(trials, len(trials))
    assert _summary(*shuffled) == found
    for point in found.points:
        values = [run.ua for fold in point.folds for run in fold.runs]
        if point.ua.mean is not None:
            assert min(values) - 1e-9 <= point.ua.mean <= max(values) + 1e-9
        if point.to_best is not None and point.to_best.holm_p is not None:
            assert (point.to_best.test.t_p or 0) <= point.to_best.holm_p <= 1
    if found.best is not None:
        assert found.best.ua.mean == max(point.ua.mean for point in found.points if point.complete and point.ua.mean is not None)
