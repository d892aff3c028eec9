"""Scores, proxies and costs of trials, read from the results of stages that the local executor has computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.experiment.config import Policy
from jobs.experiment.graph import MAX_SLOTS, build_graph, seeds_of_slots
from jobs.experiment.sweep_section import Stopping, SweepSettings
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.scores import FoldRecord
from jobs.sweeps.space import Point
from jobs.sweeps.stages import point_graph
from tests.jobs.sweeps.fake_registry import REGISTRY, Recipe, SweepRun, compute, counted, make_sweep, ua_of


def settings(*sets: Sequence[int], seeds: int = 1, folds: Sequence[str] = ("1",)) -> SweepSettings:
    return SweepSettings(sets=[list(each) for each in sets], seeds=seeds, folds=list(folds), stopping=Stopping.none)


def fold_of(run: SweepRun, trial: str, number: int = 0) -> FoldRecord:
    return run.records[trial].folds[number]


@pytest.mark.slow
def test_stages_are_shared_by_the_points_that_need_them(tmp_path: Path) -> None:
    """States once, k-means once per count, P-TAPT once per set, and the fine-tunings of the sweep's seeds, from the first one on."""
    run = compute(make_sweep(tmp_path, settings([16, 64], [64], seeds=2), first_seed=7))
    assert run.report.complete
    found = fold_of(run, "k16-64")
    assert [(each.slot, each.seed) for each in found.runs] == [(0, 7), (1, 8)]
    assert sorted(found.stages.values()) == ["cluster", "cluster", "finetune", "finetune", "ptapt", "states"]
    assert found.ua == pytest.approx((ua_of([16, 64], "1", 7) + ua_of([16, 64], "1", 8)) / 2)
    assert found.runs[0].ua == found.runs[0].wa == pytest.approx(ua_of([16, 64], "1", 7))
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    assert len(starts) == 6 + 3
    assert run.records == run.records
    assert counted(tmp_path / "corpus", "proxies") == {"16-1": 1, "64-1": 1}  # computed once, then from the cache


def test_stages_of_a_trial_exclude_validation_speakers(tmp_path: Path) -> None:
    """The keys are those that the registry's own calls give for these speakers, and none of them is a key of the grid."""
    sweep = make_sweep(tmp_path)
    graph = point_graph(sweep.experiment, sweep.corpus, Point((16,)), ["1"], sweep.validation, REGISTRY)
    assert all(node.settings["validation"] == ["speaker of 2"] for node in graph.nodes.values())
    slots = seeds_of_slots(["ptapt"], ["1"], seeds=2, first_seed=0)
    recipe = Recipe()
    recipe.cluster.counts = [16]
    grid = build_graph(REGISTRY, recipe, corpus="fake", corpus_digest="d1", methods=["ptapt"], folds=["1"], seeds=slots)
    assert len(grid.nodes) == len(graph.nodes) == 5
    assert not grid.nodes.keys() & graph.nodes.keys()


@pytest.mark.slow
def test_proxies_of_clusters_and_loss(tmp_path: Path) -> None:
    """Inertia is of a frame, entropy also a share of its greatest, the loss a share of the loss of a uniform guess."""
    proxies = fold_of(compute(make_sweep(tmp_path, settings([16, 64]))), "k16-64").proxies
    assert set(proxies["k"]) == {"16", "64"}
    assert proxies["k"]["16"] == {
        "inertia": pytest.approx(1 / 16),
        "entropy": pytest.approx(math.log(16) / 2),
        "entropy_share": pytest.approx(0.5),
        "empty_clusters": 1,
        "purity": 1 - 1 / 16,
        "nmi": 1 / 16,
    }
    assert proxies["ptapt_loss"] == pytest.approx(0.5 * (math.log(16) + math.log(64)))
    assert proxies["ptapt_loss_share"] == pytest.approx(0.5)


@pytest.mark.slow
def test_missing_proxies_do_not_fail_a_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Missing or unreadable artifacts leave out their proxies; unreadable ones are logged."""
    run = compute(make_sweep(tmp_path, settings([16])))
    (key,) = (key for key, node in run.report.graph.nodes.items() if node.stage == "cluster")
    artifact = run.session.sweep.layout.stage("cluster", key).attempt(1).output / "artifact.json"
    kept = artifact.read_text()
    artifact.write_text(kept.replace('"k": 16', '"k": 17'))
    with caplog.at_level(logging.WARNING):
        assert "purity" not in fold_of(run, "k16").proxies["k"]["16"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["cluster k 16, fold 1"]
    artifact.unlink()
    caplog.clear()
    assert fold_of(run, "k16").proxies["k"]["16"]["empty_clusters"] == 1
    assert not caplog.records


@pytest.mark.slow
def test_a_diverged_run_is_replaced_by_a_reserve_seed(tmp_path: Path) -> None:
    """The mean is over the replacements; without a seed left the trial has failed."""
    lines: list[str] = []
    recipe = Recipe(failing={"finetune 64 1": "diverge-once"})
    run = compute(make_sweep(tmp_path / "a", settings([64], seeds=2), recipe), tell=lines.append)
    found = fold_of(run, "k64")
    assert [each.seed for each in found.runs] == [MAX_SLOTS, MAX_SLOTS + 1]
    assert found.ua == pytest.approx((ua_of([64], "1", MAX_SLOTS) + ua_of([64], "1", MAX_SLOTS + 1)) / 2)
    assert sum(stage == "finetune" for stage in found.stages.values()) == 4  # the diverged ones are part of the cost
    assert sum("dropped: training loss" in line for line in lines) == 2
    last = compute(make_sweep(tmp_path / "b", settings([64]), recipe, policy=Policy(max_seeds=1)))
    assert last.trials["k64"].state is TrialState.failed
    assert "still at the class prior" in last.trials["k64"].error


@pytest.mark.slow
def test_a_stage_that_is_given_up_fails_its_trial_in_one_line(tmp_path: Path) -> None:
    """With the stage and its error; other points are not affected, and the next launch tries it again."""
    sweep = make_sweep(tmp_path, settings([16, 64], [64], folds=("1", "2")), Recipe(failing={"ptapt 16+64 2": "fail:1"}))
    run = compute(sweep)
    failed, other = run.trials["k16-64"], run.trials["k64"]
    assert (failed.state, other.state, run.report.complete) == (TrialState.failed, TrialState.complete, False)
    assert failed.error.startswith("ptapt ptapt fold 2 seed 0 [")
    assert "made to fail, start 1" in failed.error
    assert [fold.fold for fold in run.records["k16-64"].folds] == ["1"]
