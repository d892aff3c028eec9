"""Records of a sweep are read back as written, or count as damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jobs.sweeps.trial import sweep_digest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, StageResources
from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.store.layout import Layout
from jobs.sweeps.records import (
    FoldRecord,
    RunRecord,
    StopLevel,
    Sweep,
    TrialRecord,
    TrialState,
    ask_to_stop,
    interrupt_trials,
    latest_file,
    latest_sweep,
    load_sweep,
    read_trial,
    read_trials,
    set_stop_level,
    stop_level,
    store_sweep,
    write_trial,
)
from jobs.sweeps.space import Point
from tests.jobs.sweeps.fake_registry import REGISTRY, Recipe, make_sweep

RUN = RunRecord("1", 0, 0, "k" * 20, 61.5, 60.0, 59.0)
FOLD = FoldRecord("1", (RUN,), {"k" * 20: "finetune"}, {"k": {"16": {"purity": 0.5}}, "ptapt_loss": 2.5}, 61.5)


def test_a_sweep_is_read_back_as_it_was_launched(tmp_path: Path) -> None:
    """Also after the results were moved: the path of its folder counts."""
    settings = SweepSettings(counts=[16, 64], settings={"ptapt.learning_rate": [1e-3, 1e-4]}, search=Search.random, folds=["2"])
    sweep = make_sweep(tmp_path / "a", settings)
    assert load_sweep(sweep.folder.path) == sweep
    assert latest_sweep(sweep.layout) == sweep
    assert sweep.folds == ("2",)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_sweep(tmp_path / "b" / "results" / "exp" / "sweep" / sweep.digest)
    assert moved.layout == Layout(tmp_path / "b" / "results", "exp")
    assert moved.place.results == str(tmp_path / "b" / "results")
    assert moved.own_layout.stage("states", "K").path == tmp_path / "b" / "results" / "store" / "states" / "K"
    assert moved.own_layout.logs == moved.folder.path / "logs"


@pytest.mark.parametrize("text", ["", "torn", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_a_damaged_sweep_is_an_error_in_one_line(tmp_path: Path, text: str) -> None:
    sweep = make_sweep(tmp_path)
    sweep.folder.sweep.write_text(text)
    with pytest.raises(UsageError, match=r"sweep\.json: damaged.*launch `sweep` again to renew it$"):
        load_sweep(sweep.folder.path)
    with pytest.raises(UsageError, match="no such sweep"):
        load_sweep(sweep.folder.path.parent / "0123456789ab")


def test_the_last_sweep_is_the_one_launched_last(tmp_path: Path) -> None:
    """None without one; an error if the file with its name is damaged."""
    first = make_sweep(tmp_path, SweepSettings(seed=1))
    second = make_sweep(tmp_path, SweepSettings(seed=2))
    assert first.digest != second.digest
    assert latest_sweep(first.layout) == second
    assert latest_sweep(Layout(tmp_path / "results", "other")) is None
    latest_file(first.layout).write_text("../..\n")
    with pytest.raises(UsageError, match="latest: damaged"):
        latest_sweep(first.layout)


def _digest(sweep: Sweep, experiment: Experiment) -> str:
    return sweep_digest(experiment, sweep.corpus, sweep.validation, REGISTRY)


def test_the_digest_depends_on_what_determines_a_sweep_only(tmp_path: Path) -> None:
    """Machines and the number of concurrent trials do not change it."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64]))
    given, settings = sweep.experiment, sweep.experiment.sweep
    same = [
        replace(given, resources={"ptapt": StageResources(cpus=2)}),
        replace(given, sweep=replace(settings, at_once=3, restarts=1)),
        replace(given, recipe=Recipe(failing={"ptapt * *": "kill:1"})),
        replace(given, methods=["vft"], seeds=9),
    ]
    assert {_digest(sweep, each) for each in same} == {sweep.digest}
    slower = Recipe()
    slower.ptapt.steps = 20
    others = [
        replace(given, sweep=replace(settings, counts=[16, 32])),
        replace(given, sweep=replace(settings, sizes=[1])),
        replace(given, sweep=replace(settings, settings={"ptapt.learning_rate": [1e-4]})),
        replace(given, sweep=replace(settings, search=Search.optuna)),
        replace(given, sweep=replace(settings, seed=1)),
        replace(given, sweep=replace(settings, seeds=3)),
        replace(given, sweep=replace(settings, folds=["1"])),
        replace(given, sweep=replace(settings, stopping=Stopping.none)),
        replace(given, first_seed=5),
        replace(given, recipe=slower),
    ]
    digests = {_digest(sweep, each) for each in others} | {sweep_digest(given, sweep.corpus, {**sweep.validation, "1": ("x",)}, REGISTRY)}
    assert len(digests | {sweep.digest}) == len(others) + 2


def test_trials_are_read_in_order_of_start_without_damaged_ones(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path).folder
    assert read_trials(folder) == ()
    late = TrialRecord("k16", Point((16,)), TrialState.complete, (FOLD,), began=2.0, ended=3.0)
    early = TrialRecord("k16-64-ab", Point((16, 64), (("ptapt.learning_rate", 1e-4),)), TrialState.failed, (), "why", 1.0, 1.5)
    for record in (late, early):
        write_trial(folder, record)
    (folder.trials / "k64.json").write_text('{"schema": 1, "trial": "k64"}')
    (folder.trials / "k256.json").write_text("torn")
    assert read_trials(folder) == (early, late)
    assert read_trial(folder, "k64") is None
    assert late.ua == 61.5
    assert early.ua is None


def test_the_objective_is_the_mean_of_the_folds_done() -> None:
    record = TrialRecord("k16", Point((16,)), TrialState.running, (FOLD, replace(FOLD, fold="2", ua=50.5)))
    assert record.ua == 56.0


def test_running_trials_become_interrupted(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path).folder
    for name, state in (("k16", TrialState.running), ("k64", TrialState.complete)):
        write_trial(folder, TrialRecord(name, Point((16,)), state, (FOLD,)))
    interrupt_trials(folder)
    assert {record.trial: record.state for record in read_trials(folder)} == {"k16": TrialState.interrupted, "k64": TrialState.complete}


def test_a_request_to_stop_holds_until_the_sweep_is_launched_again(tmp_path: Path) -> None:
    """Whatever the content of the stop file. The level set by the driver counts only while the file exists."""
    sweep = make_sweep(tmp_path)
    folder = sweep.folder
    assert stop_level(folder) is StopLevel.none
    set_stop_level(folder, StopLevel.leave)
    assert stop_level(folder) is StopLevel.none
    store_sweep(sweep)
    folder.stop.write_text("cancelled\n")
    ask_to_stop(folder)
    assert folder.stop.read_text() == "cancelled\n"
    assert stop_level(folder) is StopLevel.stop
    set_stop_level(folder, StopLevel.hurry)
    assert stop_level(folder) is StopLevel.hurry
    store_sweep(sweep)
    assert stop_level(folder) is StopLevel.none


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    """Other programs may read it."""
    folder = make_sweep(tmp_path).folder
    write_trial(folder, TrialRecord("k16", Point((16,)), TrialState.stopped, (FOLD,)))
    value = json.loads((folder.trials / "k16.json").read_text())
    assert value["state"] == "stopped"
    assert value["point"] == {"counts": [16], "settings": {}}
    assert value["folds"][0]["runs"][0]["ua"] == 61.5
