"""From runs to numbers: which runs count, over what a mean is taken, and the JSON that programs read."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import replace

import pytest

from jobs.control.facts import StageFacts
from jobs.control.rounds import replay
from jobs.errors import UsageError
from jobs.experiment.config import Policy
from jobs.tables.as_json import to_json
from jobs.tables.entries import entries_of
from jobs.tables.summary import CodeFacts, Dropped, Entry, Scores, Status, Unreplaced, code_facts, summarise
from tests.jobs.table_cases import entry, graph, paper_like, result, summary

DESIGN_METHOD_KEYS = ["method", "corpus", "mean_ua", "sd_ua", "mean_ua_all_runs", "n", "dropped", "rerun", "unresolved", "cells"]
RUN_KEYS = ["slot", "seed", "ua", "wa", "macro_f1", "status", "out", "centre", "scale", "distance"]


def test_method_mean_weighs_folds_alike() -> None:
    """The mean of a method is the mean of its cell means, however many runs each cell has."""
    runs = (entry("vft", "1", 0, 60.0), entry("vft", "1", 1, 62.0), entry("vft", "2", 0, 80.0))
    [method] = summary(runs).methods
    assert method.mean_ua == 70.5
    assert [cell.mean_ua for cell in method.cells] == [61.0, 80.0]


def test_method_sd_is_over_slots_of_the_mean_over_folds() -> None:
    """The sd of the mean column is that of one table per slot, not that of all runs together."""
    runs = tuple(
        entry("vft", fold, slot, ua)
        for fold, values in (("1", (60.0, 62.0, 67.0)), ("2", (80.0, 79.0, 81.0)))
        for slot, ua in enumerate(values)
    )
    [method] = summary(runs).methods
    assert method.sd_ua == pytest.approx(statistics.stdev([70.0, 70.5, 74.0]))
    assert [cell.sd_ua for cell in method.cells] == pytest.approx([statistics.stdev([60, 62, 67]), 1.0])
    assert method.interval is not None
    assert (method.interval.low + method.interval.high) / 2 == pytest.approx(method.mean_ua)


def test_missing_runs_make_a_summary_incomplete() -> None:
    """A run without a result leaves its cell, method and experiment incomplete, and is named."""
    runs = tuple(
        entry(method, fold, slot, None if (method, fold, slot) == ("tapt", "2", 1) else 70.0 + slot)
        for method in ("vft", "tapt")
        for fold in "12"
        for slot in range(3)
    )
    found = summary(runs)
    vft, tapt = found.methods
    assert vft.complete
    assert not tapt.complete
    assert not found.complete
    assert [missing.name for missing in found.missing] == ["tapt/2/1"]
    assert [(cell.n, cell.slots) for cell in tapt.cells] == [(3, 3), (2, 3)]
    assert tapt.interval is None
    assert tapt.sd_ua == pytest.approx(statistics.stdev([70.0, 72.0]))


def test_a_cell_without_any_run_is_incomplete() -> None:
    """A fold that another method has belongs to every method: it lacks as many runs as other cells have."""
    found = summary((entry("vft", "1", 0, 70.0), entry("vft", "2", 0, 70.0), entry("tapt", "1", 0, 71.0)))
    assert [method.complete for method in found.methods] == [True, False]
    assert found.methods[1].cells[1].mean_ua is None
    assert found.methods[1].cells[1].slots == 1
    assert [missing.name for missing in found.missing] == ["tapt/2/0"]


def test_a_cell_that_was_not_planned_is_not_missing() -> None:
    """Where the entries are all runs that there can be: the method is complete, with mean, sd and intervals over the folds that it has."""
    runs = [entry(method, fold, slot, 70.0 + slot + int(fold)) for method in ("vft", "tapt") for fold in "123" for slot in range(2)]
    some = [run for run in runs if (run.method, run.fold) != ("tapt", "3")]
    found, fewer = (summarise(each, experiment="e", planned=True) for each in (some, [run for run in some if run.fold != "3"]))
    assert found.complete
    assert found.missing == ()
    assert [cell.slots for cell in found.methods[1].cells] == [2, 2, 0]
    alone = fewer.methods[1]
    assert replace(found.methods[1], cells=alone.cells) == alone
    assert alone.crossed is not None
    assert not summarise(some, experiment="e").complete, "of a file the rows may be missing"


def test_an_experiment_without_runs_is_incomplete() -> None:
    """Nothing is not everything."""
    assert not summary(()).complete


def test_dropped_runs_stay_on_record() -> None:
    """A dropped run counts in no mean but in `mean_ua_all_runs`; its replacement completes the slot."""
    runs = (
        entry("vft", "1", 0, 70.0),
        entry("vft", "1", 1, 30.0, Status.outlier),
        entry("vft", "1", 1, 72.0, seed=100),
        entry("vft", "1", 2, 25.0, Status.diverged),
    )
    [method] = summary(runs).methods
    assert (method.mean_ua, method.mean_ua_all_runs) == (71.0, 49.25)
    assert (method.n, method.dropped, method.rerun) == (2, 2, 1)
    assert [missing.slot for missing in summary(runs).missing] == [2]


def test_dropped_runs_are_counted_by_reason() -> None:
    """Outliers and diverged runs are told apart, and of each those whose slot was run again, whether that is finished or not."""
    runs = (
        entry("vft", "1", 0, 30.0, Status.outlier),
        entry("vft", "1", 0, None, Status.diverged, seed=1000),
        entry("vft", "1", 0, 70.0, seed=2000),
        entry("vft", "1", 1, 31.0, Status.outlier),
        entry("vft", "1", 1, None, seed=1001),
        entry("vft", "1", 2, 25.0, Status.diverged),
    )
    [method] = summary(runs).methods
    assert (method.outliers, method.diverged) == (Dropped(2, 2), Dropped(2, 1))
    assert (method.dropped, method.rerun, method.cells[0].slots, method.n) == (4, 3, 3, 1)
    assert [(each.slot, each.status) for each in summary(runs).missing] == [(1, Status.pending), (2, Status.diverged)]
    found = to_json(summary(runs))["methods"][0]
    assert (found["outliers"], found["diverged"]) == ({"dropped": 2, "rerun": 2}, {"dropped": 2, "rerun": 1})


def test_sd_over_all_runs_includes_dropped_runs() -> None:
    """Dropped runs widen the spread over all runs, of a cell and, by the mean of a slot's runs, of a method; they leave the other alone."""
    kept = tuple(entry("vft", fold, slot, base + slot) for fold, base in (("1", 60.0), ("2", 80.0)) for slot in range(3))
    [method] = summary((*kept, entry("vft", "1", 0, 25.0, Status.outlier, seed=9))).methods
    assert (method.sd_ua, method.cells[0].sd_ua) == (1.0, 1.0)
    assert method.cells[0].sd_ua_all_runs == pytest.approx(statistics.stdev([60.0, 25.0, 61.0, 62.0]))
    assert method.cells[1].sd_ua_all_runs == 1.0
    assert method.sd_ua_all_runs == pytest.approx(statistics.stdev([(42.5 + 80) / 2, 71.0, 72.0]))
    assert method.mean_ua_all_runs == (52.0 + 81.0) / 2
    [alone] = summary(kept).methods
    assert (alone.sd_ua_all_runs, alone.mean_ua_all_runs) == (alone.sd_ua, alone.mean_ua)


def test_methods_are_paired_over_runs_that_count() -> None:
    """A dropped run is in no pair: its slot is paired by the run that replaced it."""
    runs = (
        entry("vft", "1", 0, 25.0, Status.outlier, seed=0),
        entry("vft", "1", 0, 70.0, seed=1000),
        entry("vft", "1", 1, 71.0),
        entry("tapt", "1", 0, 72.0),
        entry("tapt", "1", 1, 73.0),
    )
    [found] = summary(runs).comparisons
    assert (found.over_pairs.pairs, found.over_pairs.mean) == (2, 2.0)


def test_slot_with_two_accepted_runs_is_refused() -> None:
    """Two answers for one slot are an error that names the run, not a choice."""
    with pytest.raises(UsageError, match="vft/1/0 of corpus iemocap is accepted twice"):
        summary((entry("vft", "1", 0, 70.0), entry("vft", "1", 0, 71.0)))


def test_slots_wanted_may_be_stated() -> None:
    """Fewer rows than the stated slots are incomplete although no row is missing a number."""
    runs = tuple(entry("vft", "1", slot, 70.0) for slot in range(3))
    assert summarise(runs, experiment="e", slots=3).complete
    assert not summarise(runs, experiment="e", slots=5).complete


def test_methods_are_compared_over_pairs_and_folds() -> None:
    """Every pair of methods is compared on what both have; positive means that the later one is better."""
    runs = tuple(
        entry(method, fold, slot, base + slot * step + shift)
        for method, shift, step in (("vft", 0.0, 1.0), ("tapt", 2.0, 1.5))
        for fold, base in (("1", 60.0), ("2", 70.0))
        for slot in range(3)
    )
    [found] = summary((*runs[:-1], entry("tapt", "2", 2, None))).comparisons
    assert (found.first, found.second) == ("vft", "tapt")
    assert found.over_pairs.pairs == 5
    assert found.over_pairs.mean == pytest.approx((2 + 2.5 + 3 + 2 + 2.5) / 5)
    assert found.over_folds.pairs == 2


def test_corpora_are_kept_apart() -> None:
    """Runs of two corpora make two tables' worth of methods, and no comparison across."""
    runs = tuple(
        Entry(corpus, method, "1", 0, 0, Scores(70.0, 70.0, 70.0), Status.accepted) for corpus in ("a", "b") for method in ("vft", "tapt")
    )
    found = summary(runs)
    assert [(method.corpus, method.method) for method in found.methods] == [("a", "vft"), ("a", "tapt"), ("b", "vft"), ("b", "tapt")]
    assert [comparison.corpus for comparison in found.comparisons] == ["a", "b"]


def test_json_has_the_stable_keys_first() -> None:
    """The JSON holds the keys of schema 1 with UA in percent, and survives a strict JSON writer."""
    found = to_json(summary(paper_like("iemocap_table1")))
    assert list(found)[:4] == ["schema", "experiment", "complete", "methods"]
    assert (found["schema"], found["experiment"], found["complete"]) == (1, "iemocap", True)
    for method in found["methods"]:
        assert list(method)[: len(DESIGN_METHOD_KEYS)] == DESIGN_METHOD_KEYS
        assert 50 < method["mean_ua"] < 100
        for cell in method["cells"]:
            assert list(cell)[:4] == ["fold", "mean_ua", "sd_ua", "runs"]
            assert all(list(run) == RUN_KEYS for run in cell["runs"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_json_of_an_empty_cell_is_null() -> None:
    """What is not known is null, never NaN."""
    found = to_json(summary((entry("vft", "1", 0, None, Status.running),)))
    [method] = found["methods"]
    assert (method["mean_ua"], method["sd_ua"], method["mean_ua_all_runs"], method["n"]) == (None, None, None, 0)
    [run] = method["cells"][0]["runs"]
    assert (run["slot"], run["seed"], run["status"]) == (0, 0, "running")
    assert {run[key] for key in RUN_KEYS if key not in ("slot", "seed", "status")} == {None}


def test_entries_have_the_verdicts_of_the_rule() -> None:
    """What the rule said of each run; an outlier without a seed left is marked, and is dropped from the means only if asked."""
    made = graph(methods=("vft",), folds=("1", "2"), slots=5)
    hits = {run.key: 20 if run.name == "vft/2/3" else 70 + run.slot for run in made.runs}
    results = {run.key: result(run, ((hits[run.key], 100 - hits[run.key]), (0, 100)), ("a", "b")) for run in made.runs}
    facts = {key: StageFacts(done=True, ua=(100 + count) / 2) for key, count in hits.items()}
    found = entries_of(made, results, {}, replay(made, facts, Policy(max_seeds=1)))
    assert [(each.name, each.verdict.centre) for each in found if each.verdict is not None and each.verdict.out] == [("vft/2/3", 85.5)]
    assert [each.name for each in found if each.unreplaced] == ["vft/2/3"]
    kept, dropped = (summarise(found, experiment="e", unreplaced=each) for each in Unreplaced)
    assert [(each.methods[0].n, each.methods[0].unresolved, each.complete, each.missing) for each in (kept, dropped)] == [
        (10, 1, True, ()),
        (9, 1, True, ()),
    ]
    assert kept.methods[0].mean_ua_all_runs == dropped.methods[0].mean_ua_all_runs == kept.methods[0].mean_ua
    assert dropped.methods[0].cells[1].mean_ua == (85.0 + 85.5 + 86.0 + 87.0) / 4


def test_entries_come_from_results_and_states() -> None:
    """A result is accepted with the scores of its matrix in percent; without one the state counts, and no state is pending."""
    made = graph(methods=("vft",), folds=("1",), slots=3)
    done, running, unknown = made.runs
    results = {done.key: result(done, ((3, 1), (0, 4)), ("a", "b"))}
    found = entries_of(made, results, {running.key: "running", done.key: "failed"})
    assert [item.status for item in found] == [Status.accepted, Status.running, Status.pending]
    assert found[0].scores is not None
    assert found[0].scores.ua == 87.5
    assert (found[0].corpus, found[2].seed) == ("demo", unknown.seed)


def test_superseded_runs_come_before_the_one_that_fills_their_slot() -> None:
    """A dropped run is an outlier where its result counted, and diverged where that says so or is not there."""
    made = graph(methods=("vft",), folds=("1",), slots=2)
    first, second = made.runs
    before = [replace(first, seed=seed, key=f"{seed:020}", generation=place) for place, seed in enumerate((0, 1000, 2000))]
    made = replace(made, runs=(replace(first, seed=3000, generation=3), second), superseded=tuple(reversed(before)))
    matrix = ((3, 1), (0, 4)), ("a", "b")
    results = {
        before[0].key: result(before[0], *matrix),
        before[1].key: result(before[1], *matrix, diverged="final loss of the prior"),
        first.key: result(first, *matrix),
        second.key: result(second, (), (), diverged="NaN"),
    }
    found = [(item.slot, item.seed, item.status, item.scores is None) for item in entries_of(made, results, {})]
    assert found == [
        (0, 0, Status.outlier, False),
        (0, 1000, Status.diverged, False),
        (0, 2000, Status.diverged, True),
        (0, 3000, Status.accepted, False),
        (1, second.seed, Status.diverged, True),
    ]


def test_metrics_stand_in_for_a_missing_matrix() -> None:
    """A stage without a confusion matrix may report fractions."""
    made = graph(methods=("vft",), folds=("1",), slots=1)
    [run] = made.runs
    [found] = entries_of(made, {run.key: result(run, (), (), metrics={"ua": 0.57, "wa": 0.6, "macro_f1": 1})}, {})
    assert found.scores == Scores(57.0, 60.0, 100.0)


def test_only_the_score_must_be_there() -> None:
    """A registry whose results have no confusion matrix need not state the metrics of one; a value out of range is left out."""
    made = graph(methods=("vft",), folds=("1",), slots=1)
    [run] = made.runs
    [found] = entries_of(made, {run.key: result(run, (), (), metrics={"ua": 0.5, "wa": 57.0})}, {})
    assert found.scores == Scores(50.0)


@pytest.mark.parametrize("metrics", [{}, {"wa": 0.5}, {"ua": math.nan, "wa": 0.5, "macro_f1": 0.5}, {"ua": 57.0, "wa": 0.5}])
def test_results_without_scores_are_named(metrics: dict[str, float]) -> None:
    """A result that states no usable score is an error that names the run, not a run less."""
    made = graph(methods=("vft",), folds=("1",), slots=1)
    [run] = made.runs
    with pytest.raises(UsageError, match="vft/1/0"):
        entries_of(made, {run.key: result(run, (), (), metrics=metrics)}, {})


def test_code_facts_gather_every_version() -> None:
    """All commits and versions among the runs are stated, so that a mixed table shows that it is mixed."""
    [run] = graph(methods=("vft",), folds=("1",), slots=1).runs
    results = [
        result(run, (), (), provenance={"commit": "b", "dirty": True, "packages": {"torch": "2.13.0"}, "runtime": {"weights": "large"}}),
        result(run, (), (), provenance={"commit": "a", "dirty": "", "python": "3.11.2", "packages": {"torch": "2.12.0", "numpy": None}}),
        result(run, (), (), provenance={"commit": None, "packages": "unknown", "runtime": {"weights": "base", "threads": 2}}),
    ]
    results.append(result(run, (), (), provenance={"commit": None, "version": "0.4.0"}))
    assert code_facts(results) == CodeFacts(
        ("a", "b"), True, {"ser-grid": ("0.4.0",), "python": ("3.11.2",), "torch": ("2.12.0", "2.13.0")}, ("base", "large")
    )


def test_an_interval_over_folds_and_seeds_is_beside_that_over_seeds() -> None:
    """It is wider where folds differ, is missing while the method is incomplete, and a comparison has both too, with Holm's correction."""
    found = summary(paper_like("iemocap_table1"))
    for method in found.methods:
        assert method.interval is not None
        assert method.crossed is not None
        assert method.crossed.mean == pytest.approx(method.mean_ua)
        assert method.crossed.interval.low < method.interval.low < method.interval.high < method.crossed.interval.high
    for tests in zip(*(dataclasses.astuple(each.corrected) for each in found.comparisons), strict=True):
        assert None not in tests
    raw = [each.crossed.p for each in found.comparisons if each.crossed is not None and each.crossed.p is not None]
    corrected = [each.corrected.crossed for each in found.comparisons]
    assert min(p for p in corrected if p is not None) == pytest.approx(3 * min(raw))
    assert to_json(found)["comparisons"][0]["over_folds_and_seeds"]["p_holm"] == corrected[0]
    assert summary((*paper_like("iemocap_table1"), entry("vft", "1", 9, None))).methods[0].crossed is None
