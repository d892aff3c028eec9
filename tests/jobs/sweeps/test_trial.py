"""A trial without Ray: its stages, shared results, scores and proxies, failures and stops."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from jobs.sweeps.trial import TrialFailedError, TrialStoppedError, evaluate_fold, fold_graph

from jobs.experiment.config import resources_of
from jobs.experiment.graph import MAX_SLOTS, build_graph, seeds_of_slots
from jobs.experiment.sweep_section import SweepSettings
from jobs.local.executor import LocalExecutor
from jobs.sweeps.records import FoldRecord, Sweep
from jobs.sweeps.space import Point
from jobs.worker.machine import Capacity
from jobs.worker.task import load_registry
from tests.jobs.sweeps.fake_registry import REGISTRY, Recipe, counted, make_sweep, ua_of


def _executor(sweep: Sweep) -> LocalExecutor:
    return LocalExecutor(sweep.own_place, sweep.own_layout, lambda stage: resources_of(sweep.experiment, stage), Capacity(2, (), 8.0))


def _evaluate(sweep: Sweep, counts: Sequence[int], fold: str = "1", lines: list[str] | None = None) -> FoldRecord:
    with _executor(sweep) as executor:
        return evaluate_fold(sweep, Point(tuple(counts)), fold, executor, tell=(lines if lines is not None else []).append)


def test_a_fold_is_computed_once_and_shares_what_other_points_have_computed(tmp_path: Path) -> None:
    """States once, k-means once per count, P-TAPT once per set, and the fine-tunings of the sweep's seeds, from the first one on."""
    sweep = make_sweep(tmp_path, SweepSettings(seeds=2), first_seed=7)
    found = _evaluate(sweep, [16, 64])
    assert [(run.slot, run.seed) for run in found.runs] == [(0, 7), (1, 8)]
    assert sorted(found.stages.values()) == ["cluster", "cluster", "finetune", "finetune", "ptapt", "states"]
    assert found.ua == pytest.approx((ua_of([16, 64], "1", 7) + ua_of([16, 64], "1", 8)) / 2)
    assert found.runs[0].ua == found.runs[0].wa == pytest.approx(ua_of([16, 64], "1", 7))
    starts = counted(tmp_path / "corpus")
    assert len(starts) == 6
    assert _evaluate(sweep, [64, 16]) == found
    _evaluate(sweep, [64])
    now = counted(tmp_path / "corpus")
    assert set(now.values()) == {1}
    assert sorted(name.split("-")[0] for name in now.keys() - starts.keys()) == ["finetune", "finetune", "ptapt"]
    assert counted(tmp_path / "corpus", "proxies") == {"16-1": 1, "64-1": 1}


def test_stages_of_a_trial_exclude_validation_speakers(tmp_path: Path) -> None:
    """The keys are those that the registry's own calls give for these speakers, and none of them is a key of the grid."""
    sweep = make_sweep(tmp_path)
    graph = fold_graph(sweep.experiment, sweep.corpus, Point((16,)), "1", sweep.validation["1"], REGISTRY)
    assert all(node.settings["validation"] == ["speaker of 2"] for node in graph.nodes.values())
    slots = seeds_of_slots(["ptapt"], ["1"], seeds=2, first_seed=0)
    recipe = Recipe()
    recipe.cluster.counts = [16]
    grid = build_graph(load_registry(sweep.place), recipe, corpus="fake", corpus_digest="d1", methods=["ptapt"], folds=["1"], seeds=slots)
    assert len(grid.nodes) == len(graph.nodes) == 5
    assert not grid.nodes.keys() & graph.nodes.keys()


def test_proxies_of_clusters_and_loss(tmp_path: Path) -> None:
    """Inertia is of a frame, entropy also a share of its greatest, the loss a share of the loss of a uniform guess."""
    proxies = _evaluate(make_sweep(tmp_path), [16, 64]).proxies
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


def test_missing_proxies_do_not_fail_a_trial(tmp_path: Path) -> None:
    """Missing or unreadable artifacts leave out their proxies; unreadable ones are logged."""
    sweep, lines = make_sweep(tmp_path), list[str]()
    found = _evaluate(sweep, [16])
    (key,) = (key for key, stage in found.stages.items() if stage == "cluster")
    (sweep.folder.proxies / f"{key}.json").unlink()
    artifact = sweep.layout.stage("cluster", key).attempt(1).output / "artifact.json"
    artifact.write_text("torn")
    assert "purity" not in _evaluate(sweep, [16], lines=lines).proxies["k"]["16"]
    assert lines == [line for line in lines if line.startswith("cluster k 16, fold 1: ")]
    assert len(lines) == 1
    artifact.unlink()
    lines.clear()
    assert _evaluate(sweep, [16], lines=lines).proxies["k"]["16"]["empty_clusters"] == 1
    assert lines == []


def test_a_diverged_run_is_replaced_by_a_reserve_seed(tmp_path: Path) -> None:
    """The mean is over the replacements."""
    lines: list[str] = []
    sweep = make_sweep(tmp_path, recipe=Recipe(failing={"finetune 64 1": "diverge-once"}))
    found = _evaluate(sweep, [64], lines=lines)
    assert [run.seed for run in found.runs] == [MAX_SLOTS, MAX_SLOTS + 1]
    assert not any(run.diverged for run in found.runs)
    assert found.ua == pytest.approx((ua_of([64], "1", MAX_SLOTS) + ua_of([64], "1", MAX_SLOTS + 1)) / 2)
    assert sum("dropped: training loss" in line for line in lines) == 2


def test_a_stage_that_is_given_up_fails_the_fold_in_one_line(tmp_path: Path) -> None:
    """With the stage and its error; other points are not affected."""
    lines: list[str] = []
    sweep = make_sweep(tmp_path, recipe=Recipe(failing={"ptapt 16+64 *": "fail:9"}))
    with pytest.raises(TrialFailedError, match=r"^ptapt ptapt fold 1 seed 0 \[\w{8}\]: .*made to fail, start 1$"):
        _evaluate(sweep, [16, 64], lines=lines)
    assert sum("failed" in line for line in lines) == 1
    assert _evaluate(sweep, [64]).ua > 0


@pytest.mark.parametrize("grace", [60.0, 0.1])
def test_a_stopped_trial_writes_checkpoints_and_is_resumed(tmp_path: Path, grace: float) -> None:
    """No signal is needed; with the second request, or when the grace is over, what runs is ended, and at most one step is lost."""
    sweep = make_sweep(tmp_path, recipe=Recipe(failing={"ptapt * *": "steps:6:0.3"}))
    asked: list[int] = []
    steps = tmp_path / "corpus" / "steps"

    def watch() -> None:
        end = time.monotonic() + 20
        while not steps.is_dir() and time.monotonic() < end:
            time.sleep(0.02)
        asked.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with _executor(sweep) as executor, pytest.raises(TrialStoppedError):
        evaluate_fold(sweep, Point((64,)), "1", executor, stopped=lambda: len(asked), grace_seconds=grace)
    watcher.join()
    (before,) = counted(tmp_path / "corpus", "steps").values()
    assert 1 <= before < 6
    assert _evaluate(sweep, [64]).ua == pytest.approx((ua_of([64], "1", 0) + ua_of([64], "1", 1)) / 2)
    (after,) = counted(tmp_path / "corpus", "steps").values()
    assert 6 <= after <= 7
