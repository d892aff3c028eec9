"""A sweep in a real Ray: its points, shared stages, early stopping, and resuming after every kind of interruption."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from jobs.sweeps.driver import restored, run_sweep, trials_at_once

from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.sweeps.records import Sweep, TrialRecord, TrialState, ask_to_stop, load_sweep, read_trials
from jobs.sweeps.space import listed_points
from tests.jobs.sweeps.fake_registry import REPOSITORY, Recipe, counted, make_sweep, relaunched, ua_of

pytestmark = pytest.mark.usefixtures("ray_here")
SETS = [[64], [16, 64], [64, 256], [16, 64, 256], [16], [1024]]


def _run(sweep: Sweep) -> tuple[bool, list[str]]:
    lines: list[str] = []
    return run_sweep(sweep, tell=lines.append), lines


def _by_name(sweep: Sweep) -> dict[str, TrialRecord]:
    return {record.trial: record for record in read_trials(sweep.folder)}


def _when(true: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        end = time.monotonic() + 60
        while not true():
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _more_steps(corpus: Path, than: int) -> bool:
    return sum(counted(corpus, "steps").values()) > than


def test_a_grid_of_sets_computes_every_stage_once_and_stops_the_worst(tmp_path: Path) -> None:
    """Six sets on two folds: states once a fold, each k-means once a fold, P-TAPT once a set; who is stopped early is below the rest."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=SETS, seeds=1), folds=("1", "2"))
    complete, lines = _run(sweep)
    assert complete
    records = _by_name(sweep)
    assert len(records) == 6
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    done = [record for record in records.values() if record.state is TrialState.complete]
    stopped = [record for record in records.values() if record.state is TrialState.stopped]
    assert len(done) + len(stopped) == 6
    folds = {fold.fold for record in records.values() for fold in record.folds}
    needed = {key for record in records.values() for fold in record.folds for key in fold.stages}
    assert folds == {"1", "2"}
    assert {name.split("-")[1] for name in starts} == needed
    assert sum(name.startswith("states") for name in starts) == 2
    assert records["k1024"].state is TrialState.stopped
    assert records["k64"].state is TrialState.complete
    assert records["k64"].ua == pytest.approx((ua_of([64], "1", 0) + ua_of([64], "2", 0)) / 2)
    assert all(record.folds[0].ua < records["k64"].folds[0].ua for record in stopped)
    assert sum("validation UA" in line and "fold 1" in line for line in lines) == 6
    assert "6/6] " in lines[-2]
    assert lines[-1].startswith("sweep ended")
    assert "best 64," in lines[-1]
    again, lines = _run(relaunched(sweep))
    assert again
    assert counted(tmp_path / "corpus") == starts
    assert len(lines) == 1


def test_a_failing_set_does_not_affect_other_random_points(tmp_path: Path) -> None:
    """The error of the failed trial is one line; the next launch repeats only this trial."""
    settings = SweepSettings(counts=[16, 64, 256], search=Search.random, trials=2, seed=4, seeds=1, stopping=Stopping.none)
    sweep = make_sweep(tmp_path, settings, folds=("1", "2"))
    points = listed_points(sweep.experiment)
    assert points is not None
    assert len(set(points)) == 2
    bad = "+".join(map(str, points[1].counts))
    sweep = make_sweep(tmp_path, settings, Recipe(failing={f"ptapt {bad} 2": "fail:1"}), folds=("1", "2"))
    complete, lines = _run(sweep)
    assert complete
    records = _by_name(sweep)
    assert {name: record.state for name, record in records.items()} == {
        point.name: TrialState.failed if point == points[1] else TrialState.complete for point in points
    }
    failed = records[points[1].name]
    assert re.match(r"ptapt ptapt fold 2 seed 0 \[\w+\]: .*made to fail", failed.error)
    assert [fold.fold for fold in failed.folds] == ["1"]
    assert sum("failed: ptapt ptapt fold 2" in line for line in lines) == 1
    assert not any("is restarted (" in line for line in lines)
    assert "1 failed" in lines[-1]
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    assert _run(relaunched(sweep))[0]
    assert {record.state for record in read_trials(sweep.folder)} == {TrialState.complete}
    now = counted(tmp_path / "corpus")
    assert {name.split("-")[0]: now[name] - starts.get(name, 0) for name in now if now[name] != starts.get(name, 0)} == {
        "ptapt": 1,
        "finetune": 1,
    }


def test_optuna_repeats_no_point_even_with_damaged_tune_files(tmp_path: Path) -> None:
    """A small space gives fewer points. With damaged files a line reports the restart, and nothing is computed again."""
    settings = SweepSettings(counts=[16, 64], folds=["1"], search=Search.optuna, trials=4, seeds=1, seed=3, stopping=Stopping.none)
    sweep = make_sweep(tmp_path, settings, folds=("1", "2"))
    assert _run(sweep)[0]
    starts = counted(tmp_path / "corpus")
    assert set(starts.values()) == {1}
    assert set(_by_name(sweep)) == {"k16", "k16-64", "k64"}
    tune = sweep.folder.ray / "tune"
    assert restored(sweep, 1, print) is not None
    lines: list[str] = []
    for damaged, text in (
        (sweep.folder.ray / "state.json", "{}"),
        (max(tune.glob("experiment_state-*.json")), "torn"),
        (tune / "tuner.pkl", "torn"),
    ):
        kept = damaged.read_bytes()
        damaged.write_text(text)
        assert restored(sweep, 1, lines.append) is None
        if damaged.name != "tuner.pkl":
            damaged.write_bytes(kept)
    assert len(lines) == 3
    complete, told = _run(relaunched(sweep))
    assert complete
    assert told[0].startswith("Ray Tune's state of this sweep cannot be used (")
    assert counted(tmp_path / "corpus") == starts
    assert [record.state for record in read_trials(sweep.folder)] == [TrialState.complete] * 3


def test_a_killed_trial_resumes_from_the_checkpoint_of_its_stage(tmp_path: Path) -> None:
    """It is restarted; the stage loses at most one step; there is one record of the trial."""
    recipe = Recipe(failing={"ptapt 64 1": "steps:6:0.3"})
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[64]], seeds=1), recipe, folds=("1", "2"))
    corpus = tmp_path / "corpus"
    watcher = _when(lambda: max(counted(corpus, "steps").values(), default=0) >= 2, _kill_trials)
    complete, lines = _run(sweep)
    watcher.join()
    assert complete
    assert any("its process died and is restarted (1 of " in line for line in lines)
    (record,) = read_trials(sweep.folder)
    assert record.state is TrialState.complete
    assert 6 <= max(counted(corpus, "steps").values()) <= 7
    starts = counted(corpus)
    assert all(number == 1 for name, number in starts.items() if not name.startswith("ptapt"))
    assert set(counted(corpus, "ends").values()) == {1}


def _kill_trials() -> None:
    """Kill the processes of trials of this test's Ray."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            if name.startswith(b"ray::SweepTrial") and os.getpid() in _ancestors(int(path.name)):
                os.kill(int(path.name), signal.SIGKILL)
        except OSError:
            continue


def _ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.add(pid)
    return found


def test_a_killed_driver_is_resumed_and_asha_still_stops_trials(tmp_path: Path) -> None:
    """Nothing is computed again, and the rungs have the earlier trials: the bad set is stopped after its first fold."""
    recipe = Recipe(failing={"ptapt 1024 1": "steps:6:0.3"})
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[64], [1024]], seeds=1, at_once=1), recipe, folds=("1", "2"))
    corpus = tmp_path / "corpus"
    command = [sys.executable, "-m", "tests.jobs.sweeps.drive", str(sweep.folder.path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        until = time.monotonic() + 120
        while max(counted(corpus, "steps").values(), default=0) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        driver.kill()
        lines = driver.stdout.read().splitlines()
    before = counted(corpus, "ends")
    assert sum("complete" in line for line in lines) == 1
    assert {record.state for record in read_trials(sweep.folder)} == {TrialState.complete, TrialState.running}
    complete, lines = _run(relaunched(load_sweep(sweep.folder.path)))
    assert complete
    assert not any("the sweep is restarted" in line for line in lines)
    records = _by_name(sweep)
    assert records["k1024"].state is TrialState.stopped
    assert len(records["k1024"].folds) == 1
    assert max(counted(corpus, "steps").values()) <= 7
    assert set(counted(corpus, "ends").values()) == {1}
    starts = counted(corpus)
    assert all(starts[name] == 1 for name in before)


def test_a_stopped_sweep_writes_checkpoints_and_is_resumed(tmp_path: Path) -> None:
    """By a signal or the stop file; trials are unfinished, not failed, and the next launch resumes their stages."""
    recipe = Recipe(failing={"ptapt * 1": "steps:16:0.25"})
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[64], [16]], seeds=1, stopping=Stopping.none), recipe, folds=("1", "2"))
    corpus = tmp_path / "corpus"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    for ask in (partial(os.kill, os.getpid(), signal.SIGINT), partial(ask_to_stop, sweep.folder)):
        watcher = _when(partial(_more_steps, corpus, sum(counted(corpus, "steps").values())), ask)
        complete, lines = _run(sweep)
        watcher.join()
        assert not complete
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
        assert sum(line.startswith("stopping: ") for line in lines) == 1
        assert not any("the sweep is restarted" in line or "failed" in line for line in lines)
        assert lines[-1].startswith("sweep interrupted")
        assert TrialState.interrupted in {record.state for record in read_trials(sweep.folder)}
        assert not {TrialState.running, TrialState.failed} & {record.state for record in read_trials(sweep.folder)}
        assert max(counted(corpus, "steps").values()) < 16
        assert not _run(sweep)[0]  # asked for before: it does not even begin
        sweep = relaunched(sweep)
        assert not run_sweep(sweep, tell=lines.append, heard=lambda: True)  # by a signal, while Ray was starting
    complete, lines = _run(sweep)
    assert complete
    assert {record.state for record in read_trials(sweep.folder)} == {TrialState.complete}
    assert set(counted(corpus, "steps").values()) == {16}
    assert set(counted(corpus, "ends").values()) == {1}


def test_concurrent_trials_depend_on_the_machines(tmp_path: Path) -> None:
    """Twice as many as stages fit on the two cores, never more than there are trials; or as asked for."""
    assert trials_at_once(make_sweep(tmp_path / "a", SweepSettings(sets=SETS))) == 4
    assert trials_at_once(make_sweep(tmp_path / "b", SweepSettings(sets=SETS[:3]))) == 3
    assert trials_at_once(make_sweep(tmp_path / "c", SweepSettings(sets=SETS, at_once=5))) == 5
