"""Search and early stopping without Ray: what is reported to Optuna, and the rungs of ASHA after a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs.sweeps.trainable import FOLDER, FOLDS, OBJECTIVE, POINT, point_of, point_text
from optuna.trial import TrialState as OptunaState
from ray.tune.search import Searcher

from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.sweeps.records import FoldRecord, Sweep, TrialRecord, TrialState, write_trial
from jobs.sweeps.search import DistinctOptuna, scheduler_of
from jobs.sweeps.space import Point, listed_points, number_of_points
from tests.jobs.sweeps.fake_registry import make_sweep


@dataclass(frozen=True)
class FakeTrial:
    """The attributes of Tune's trial that a scheduler uses."""

    trial_id: str
    config: dict[str, Any]


class FakeController:
    search_alg: Any = None


def _trial(sweep: Sweep, *counts: int) -> FakeTrial:
    point = Point(counts)
    return FakeTrial(point.name, {FOLDER: str(sweep.folder.path), POINT: point_text(point)})


def _on_record(sweep: Sweep, counts: tuple[int, ...], *uas: float) -> None:
    folds = tuple(FoldRecord(str(number), (), {}, {}, ua) for number, ua in enumerate(uas, 1))
    write_trial(sweep.folder, TrialRecord(Point(counts).name, Point(counts), TrialState.interrupted, folds))


def _scheduler(sweep: Sweep, folds: int = 4) -> Any:
    scheduler = scheduler_of(sweep.experiment.sweep, folds, 2)
    scheduler.set_search_properties(OBJECTIVE, "max")
    return scheduler


def test_rungs_are_filled_from_records_after_a_restart(tmp_path: Path) -> None:
    """A trial worse than results from before the restart is stopped; plain ASHA would continue it."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[16], [64], [256]], grace_folds=1))
    _on_record(sweep, (16,), 60.0, 62.0)
    _on_record(sweep, (64,), 64.0)
    scheduler, controller = _scheduler(sweep), FakeController()
    trials = {counts: _trial(sweep, counts) for counts in (16, 64, 256)}
    for trial in trials.values():
        scheduler.on_trial_add(controller, trial)
    assert scheduler.on_trial_result(controller, trials[256], {FOLDS: 1, OBJECTIVE: 50.0}) == "STOP"
    assert scheduler.on_trial_result(controller, trials[64], {FOLDS: 2, OBJECTIVE: 60.5}) == "STOP"  # the mean of 16 over two folds is 61
    forgetful = _scheduler(make_sweep(tmp_path / "other", sweep.experiment.sweep))
    other = _trial(make_sweep(tmp_path / "other", sweep.experiment.sweep), 256)
    forgetful.on_trial_add(controller, other)
    assert forgetful.on_trial_result(controller, other, {FOLDS: 1, OBJECTIVE: 50.0}) == "CONTINUE"


def test_asha_decides_again_on_a_fold_that_is_already_recorded(tmp_path: Path) -> None:
    """The driver was killed in between: it decides now, without counting the trial twice."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[16], [64]]))
    _on_record(sweep, (16,), 50.0)
    _on_record(sweep, (64,), 60.0)
    scheduler, controller = _scheduler(sweep), FakeController()
    for counts in (16, 64):
        scheduler.on_trial_add(controller, _trial(sweep, counts))
    assert scheduler.on_trial_result(controller, _trial(sweep, 64), {FOLDS: 1, OBJECTIVE: 60.0}) == "CONTINUE"
    assert scheduler.on_trial_result(controller, _trial(sweep, 16), {FOLDS: 1, OBJECTIVE: 50.0}) == "STOP"


def test_asha_respects_grace_folds_and_ignores_reports_without_a_fold(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[16], [64]], grace_folds=2))
    scheduler, controller = _scheduler(sweep), FakeController()
    good, bad = _trial(sweep, 64), _trial(sweep, 16)
    for trial in (good, bad):
        scheduler.on_trial_add(controller, trial)
    assert scheduler.on_trial_result(controller, bad, {"failed": "why"}) == "CONTINUE"
    for folds, decision in ((1, "CONTINUE"), (2, "STOP")):
        assert scheduler.on_trial_result(controller, good, {FOLDS: folds, OBJECTIVE: 60.0}) == "CONTINUE"
        assert scheduler.on_trial_result(controller, bad, {FOLDS: folds, OBJECTIVE: 50.0}) == decision


@pytest.mark.parametrize("stopping", [Stopping.asha, Stopping.none])
def test_concurrency_follows_the_current_machines(tmp_path: Path, stopping: Stopping) -> None:
    """Tune's file has the number of the first launch."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[16]], stopping=stopping))
    scheduler, controller = _scheduler(sweep), FakeController()
    controller.search_alg = type("Generator", (), {"max_concurrent": 9})()
    scheduler.on_trial_add(controller, _trial(sweep, 16))
    assert controller.search_alg.max_concurrent == 2


def _optuna(sweep: Sweep) -> DistinctOptuna:
    return DistinctOptuna(sweep.space, sweep.folder.path, sweep.experiment.sweep, folds=2)


def test_optuna_repeats_no_point_and_ends_when_none_is_left(tmp_path: Path) -> None:
    """Seven sets of three counts, each once, whether or not the trials before have ended."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64, 256], search=Search.optuna, trials=100))
    assert number_of_points(sweep.experiment) == 7
    assert listed_points(sweep.experiment) is None
    search = _optuna(sweep)
    names: list[str] = []
    for number in range(7):
        config = search.suggest(f"t{number}")
        assert isinstance(config, dict)
        assert config[FOLDER] == str(sweep.folder.path)
        names.append(point_of(config).name)
        if number % 2:
            search.on_trial_complete(f"t{number}", {OBJECTIVE: 50.0 + number, FOLDS: 2, "training_iteration": 2})
    assert len(set(names)) == 7
    assert search.suggest("t7") == Searcher.FINISHED


def test_optuna_is_given_stopped_and_failed_trials(tmp_path: Path) -> None:
    """A mean over fewer folds is not a value like the others: that trial counts as pruned."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64, 256, 1024], search=Search.optuna, trials=8))
    search = _optuna(sweep)
    for name in ("complete", "stopped", "failed", "dead"):
        search.suggest(name)
    asked = {name: search._ot_trials[name].number for name in ("complete", "stopped", "failed", "dead")}
    search.on_trial_result("complete", {OBJECTIVE: 55.0, FOLDS: 1, "training_iteration": 1})
    search.on_trial_complete("complete", {OBJECTIVE: 60.0, FOLDS: 2, "training_iteration": 2})
    search.on_trial_complete("stopped", {OBJECTIVE: 70.0, FOLDS: 1, "training_iteration": 1})
    search.on_trial_result("failed", {"failed": "why"})
    search.on_trial_complete("failed", {"failed": "why"})
    search.on_trial_complete("dead", error=True)
    trials = search._ot_study.trials
    assert {name: trials[number].state for name, number in asked.items()} == {
        "complete": OptunaState.COMPLETE,
        "stopped": OptunaState.PRUNED,
        "failed": OptunaState.FAIL,
        "dead": OptunaState.FAIL,
    }
    assert trials[asked["complete"]].value == 60.0
    assert trials[asked["stopped"]].intermediate_values == {1: 70.0}


def test_optuna_resumes_with_its_results(tmp_path: Path) -> None:
    """Saved and restored as by Tune, it suggests the same points."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64, 256, 1024, 4096], search=Search.optuna, trials=12, seed=5))

    def ask(search: DistinctOptuna, numbers: range) -> list[str]:
        names: list[str] = []
        for number in numbers:
            config = search.suggest(f"t{number}")
            assert isinstance(config, dict)
            names.append(point_of(config).name)
            search.on_trial_complete(f"t{number}", {OBJECTIVE: 40.0 + len(names[-1]), FOLDS: 2, "training_iteration": 2})
        return names

    whole = ask(_optuna(sweep), range(12))
    first = _optuna(sweep)
    assert ask(first, range(6)) == whole[:6]
    first.save(str(tmp_path / "state"))
    second = _optuna(sweep)
    second.restore(str(tmp_path / "state"))
    assert ask(second, range(6, 12)) == whole[6:]
    assert len(set(whole)) == 12
