"""Output of a sweep: lines for trials, tables in a pipe and on a terminal, its state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.commands import sweep as console
from jobs.experiment.sweep_section import Stopping, SweepSettings
from jobs.sweeps.decisions import Trial, TrialState
from jobs.sweeps.driver_lock import driving
from jobs.sweeps.records import Sweep
from jobs.sweeps.space import Point
from tests.jobs.sweeps.fake_registry import REPOSITORY, Recipe, compute, launch_here, make_sweep, place_of

FOLDS = ("1", "2")


def session_of(sweep: Sweep) -> console.SweepSession:
    return console.session_of(sweep, place_of(sweep), REPOSITORY, read_only=True)


def test_a_line_for_every_fold_and_every_end() -> None:
    """Each fold and each end of a trial is printed once, with the mean so far."""
    half = Trial(Point((16,)), TrialState.running, 2, {"2": 51.0})
    whole = replace(half, state=TrialState.complete, scores={"1": 61.0, "2": 51.0})
    failed = Trial(Point((64,)), TrialState.failed, 1, error="ptapt: given up")
    stopped = Trial(Point((256,)), TrialState.stopped, 1, {"1": 40.0})
    assert console.trial_lines({}, [half], FOLDS) == ["16: fold 2 validation UA 51.0, mean of 1 51.0"]
    now = [whole, failed, stopped]
    assert console.trial_lines({"k16": half}, now, FOLDS) == [
        *("16: fold 1 validation UA 61.0, mean of 2 56.0", "16: complete", "64: failed: ptapt: given up"),
        *("256: fold 1 validation UA 40.0, mean of 1 40.0", "256: stopped early after 1 of 2 folds"),
    ]
    assert console.trial_lines({trial.point.name: trial for trial in now}, now, FOLDS) == []


@pytest.mark.slow
def test_show_prints_the_report_of_an_unfinished_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned rows, cost, commands to run next, files, and the state of the sweep; with JSON a single value."""
    settings = SweepSettings(sets=[[16], [64]], stopping=Stopping.none)
    sweep = make_sweep(tmp_path, settings, Recipe(failing={"ptapt 64 2": "steps:1000:0.1"}), folds=FOLDS)
    asked: list[int] = []
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if sum(" finetune " in each for each in lines) == 6:  # all but those of 64 on the second fold
            asked.append(1)

    assert compute(sweep, tell=tell, stop_count=lambda: len(asked)).report.interrupted
    console.show(session_of(sweep), as_json=False)
    shown = capsys.readouterr().out.splitlines()
    heading = next(line for line in shown if line.startswith("point"))
    row = next(line for line in shown if line.startswith("16 "))
    assert row[heading.index("UA") :].startswith("53.8")
    assert row.endswith("best")
    assert any(line.startswith("64 ") and "1/2" in line and line.endswith("interrupted") for line in shown)
    assert any(line.startswith("python launch.py grid exp ") and "'recipe.cluster.counts=[16]'" in line for line in shown)
    assert str(sweep.layout.sweep / "table.tex") in shown
    assert shown[-1] == "exp: interrupted, no driver is running: `python launch.py sweep exp` resumes"
    console.show(session_of(sweep), as_json=True)
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (value["best"], value["standing"], value["job"], value["trials"]["interrupted"]) == ("16", "interrupted", "", 1)
    with driving(sweep.folder):
        console.show(session_of(sweep), as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert (value["standing"], value["trials"]["running"], value["under_way"]) == ("running", 1, True)


def test_on_a_terminal_the_table_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by rich; text in square brackets is not markup."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    console._print_rows(("point", "UA"), [("16, x=[red]", "50.0")], bold=[True])
    drawn = capsys.readouterr().out
    assert "16, x=[red]" in drawn
    assert "━" in drawn or "─" in drawn


@pytest.mark.slow
def test_before_the_first_result_there_is_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that is waiting in the queue has a report."""
    console.show(session_of(make_sweep(tmp_path)), as_json=False)
    assert "Nothing to choose yet" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_sweep_cannot_be_cancelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is not running can: the next launch lifts that."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[64]], seeds=1), folds=FOLDS)
    console.cancel(session_of(sweep))
    assert "exp: nothing to cancel, it is not running" in capsys.readouterr().out
    assert launch_here(sweep)[0]
    console.cancel(session_of(sweep))
    assert "nothing to cancel, every trial has ended" in capsys.readouterr().out
