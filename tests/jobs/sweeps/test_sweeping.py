"""Whole sweeps on this machine, as the command launches them: shared stages, early stopping, and resuming after every interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.commands.sweep import cancel, session_of, status
from jobs.errors import UsageError
from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.sweeps.decisions import Trial, TrialState
from jobs.sweeps.driver_lock import driver_of
from jobs.sweeps.records import Sweep
from jobs.sweeps.space import listed_points
from tests.jobs.sweeps.fake_registry import REPOSITORY, Recipe, counted, launch_here, make_sweep, place_of, ua_of
from tests.waiting import until

SETS = [[64], [16, 64], [64, 256], [16, 64, 256], [16], [1024]]


def by_name(trials: tuple[Trial, ...]) -> Mapping[str, Trial]:
    return {trial.point.name: trial for trial in trials}


def start(sweep: Sweep) -> subprocess.Popen[str]:
    """Launch a sweep in a process of its own."""
    command = [sys.executable, "-m", "tests.jobs.sweeps.drive", str(sweep.layout.root), sweep.digest]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def steps(sweep: Sweep) -> int:
    return sum(counted(Path(sweep.corpus.folder), "steps").values())


@pytest.mark.slow
def test_a_grid_of_sets_computes_every_stage_once_and_stops_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six sets on two folds; those that are stopped are below the rest, and none of their stages of the second fold is computed."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=SETS, seeds=1), folds=("1", "2"))
    complete, session = launch_here(sweep)
    assert complete
    trials = by_name(session.decisions.trials)
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    done = {name for name, trial in trials.items() if trial.state is TrialState.complete}
    stopped = {name for name, trial in trials.items() if trial.state is TrialState.stopped}
    assert done == {"k64", "k16-64", "k64-256", "k16-64-256"}  # two of them are equal after the first fold, so that both continue
    assert done | stopped == trials.keys()
    assert trials["k64"].means[-1] == pytest.approx((ua_of([64], "1", 0) + ua_of([64], "2", 0)) / 2)
    assert min(trials[name].scores["1"] for name in done) >= max(trials[name].scores["1"] for name in stopped)
    kinds = [name.split("-")[0] for name in starts]
    counts = {k for name in done for k in trials[name].point.counts}
    assert {kind: kinds.count(kind) for kind in kinds} == {"states": 2, "cluster": 4 + len(counts), "ptapt": 6 + 4, "finetune": 6 + 4}
    lines = capsys.readouterr().out.splitlines()
    assert sum("fold 1 validation UA" in line for line in lines) == 6
    assert "1024: stopped early after 1 of 2 folds" in lines
    again, _ = launch_here(sweep)
    assert again
    assert counted(tmp_path / "corpus") == starts
    assert f"exp: sweep {sweep.digest}: every trial has ended, nothing is left to compute" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failing_set_does_not_affect_other_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launch is incomplete, its error is one line, and the next launch repeats only what failed and what needs it."""
    settings = SweepSettings(counts=[16, 64, 256], search=Search.random, trials=2, seed=4, seeds=1, stopping=Stopping.none)
    points = listed_points(make_sweep(tmp_path, settings, folds=("1", "2")).experiment)
    assert points is not None
    bad = "+".join(map(str, points[1].counts))
    sweep = make_sweep(tmp_path, settings, Recipe(failing={f"ptapt {bad} 2": "fail:1"}), folds=("1", "2"))
    complete, session = launch_here(sweep)
    assert not complete
    trials = by_name(session.decisions.trials)
    assert trials[points[0].name].state is TrialState.complete
    assert trials[points[1].name].state is TrialState.failed
    told = capsys.readouterr()
    assert sum(line.startswith(f"{bad}: failed: ptapt ptapt fold 2") for line in told.out.splitlines()) == 1
    assert "1 trial failed: `python launch.py sweep exp` tries again" in told.err
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    assert launch_here(sweep)[0]
    now = counted(tmp_path / "corpus")
    assert {name.split("-")[0]: now[name] - starts.get(name, 0) for name in now if now[name] != starts.get(name, 0)} == {
        "ptapt": 1,
        "finetune": 1,
    }


@pytest.mark.slow
def test_optuna_needs_no_record_of_its_proposals(tmp_path: Path) -> None:
    """A small space gives fewer points than asked for. Without the record the same points are proposed; nothing is computed again."""
    settings = SweepSettings(counts=[16, 64], folds=["1"], search=Search.optuna, trials=4, at_once=2, seeds=1, seed=3)
    sweep = make_sweep(tmp_path, settings, folds=("1", "2"))
    complete, session = launch_here(sweep)
    assert complete
    assert by_name(session.decisions.trials).keys() == {"k16", "k16-64", "k64"}
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    for damage in ("torn", None):
        (sweep.folder / "proposals.json").write_text(damage) if damage else (sweep.folder / "proposals.json").unlink()
        again, resumed = launch_here(sweep)
        assert again
        assert resumed.decisions.trials == session.decisions.trials
        assert counted(tmp_path / "corpus") == starts


@pytest.mark.slow
def test_a_driver_that_is_killed_again_and_again_gives_the_same_sweep(tmp_path: Path) -> None:
    """SIGKILL in every phase: no trial is lost or doubled, no stage ends twice; decisions and numbers are those of an undisturbed one."""
    settings = SweepSettings(sets=SETS[:4], seeds=1)
    recipe = Recipe(seconds=0.2)
    undisturbed = launch_here(make_sweep(tmp_path / "a", settings, recipe, folds=("1", "2")))[1]
    sweep, corpus = make_sweep(tmp_path / "b", settings, recipe, folds=("1", "2")), tmp_path / "b" / "corpus"
    total = len(counted(tmp_path / "a" / "corpus"))
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        driver = start(sweep)
        until(lambda share=share: len(counted(corpus, "ends")) >= share * total)  # type: ignore[misc]
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
        assert driver_of(sweep.folder) is None
    complete, session = launch_here(sweep)
    assert complete
    assert session.decisions.trials == undisturbed.decisions.trials
    assert set(counted(corpus, "ends").values()) == {1}
    assert counted(corpus, "ends").keys() == counted(tmp_path / "a" / "corpus", "ends").keys()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "cancel"])
def test_a_stopped_sweep_writes_checkpoints_and_is_resumed(how: str, tmp_path: Path) -> None:
    """By a signal to the process group, or by `--cancel` from elsewhere: exit code 3, and the next launch loses no step."""
    recipe = Recipe(failing={"ptapt * 1": "steps:12:0.25"})
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[64], [16]], seeds=1, stopping=Stopping.none), recipe, folds=("1", "2"))
    driver, corpus = start(sweep), tmp_path / "corpus"
    until(lambda: steps(sweep) > 2)
    with pytest.raises(UsageError, match=rf"under way in process {driver.pid} on .*`sweep --show`"):
        launch_here(sweep)
    watching = session_of(sweep, place_of(sweep), REPOSITORY, read_only=True)
    assert status(watching).state == "running"
    if how == "signal":
        os.killpg(driver.pid, signal.SIGINT)
    else:
        cancel(watching)
    output, _ = driver.communicate()
    assert driver.returncode == 3, output
    assert "stopped; nothing is lost: `python launch.py sweep exp` resumes" in output
    assert status(watching).state == "interrupted"
    assert max(counted(corpus, "steps").values()) < 12
    complete, session = launch_here(sweep)
    assert complete
    assert {trial.state for trial in session.decisions.trials} == {TrialState.complete}
    assert set(counted(corpus, "steps").values()) == {12}
    assert set(counted(corpus, "ends").values()) == {1}
