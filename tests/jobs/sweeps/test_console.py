"""Output of a sweep: lines for trials, tables in a pipe and on a terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from jobs.sweeps.session import SweepLauncher, SweepStatus, reopen

from jobs.commands import sweep as console
from jobs.experiment.config import Cluster
from jobs.store.records import write_text
from jobs.sweeps.driver_lock import driving
from jobs.sweeps.records import Sweep, TrialState, latest_file, store_sweep, write_trial
from tests.jobs.sweeps import report_cases as cases
from tests.jobs.sweeps.fake_registry import REGISTRY, make_sweep

UAS = {"1": [50.0, 52.0], "2": [60.0, 62.0]}


def launcher_of(sweep: Sweep) -> SweepLauncher:
    return SweepLauncher(sweep, REGISTRY, Path(sweep.code))


def test_a_line_for_every_fold_and_every_end() -> None:
    """Each fold and each end of a trial is printed once, with the mean so far."""
    half = cases.trial([16], {"1": [50.0, 52.0]}, TrialState.running)
    whole = cases.trial([16], UAS)
    failed = cases.trial([64], {}, TrialState.failed, "ptapt: given up")
    first = console.trial_lines({}, [half], 2)
    assert first == ["16: fold 1 (1 of 2) validation UA 51.0, mean 51.0"]
    second = console.trial_lines({half.trial: half}, [whole, failed], 2)
    assert second == ["16: fold 2 (2 of 2) validation UA 61.0, mean 56.0", "16: complete", "64: failed: ptapt: given up"]
    assert console.trial_lines({whole.trial: whole, failed.trial: failed}, [whole, failed], 2) == []


def test_show_prints_the_table_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned rows, cost, commands to run next, files, and the state of the sweep; with JSON a single value."""
    sweep = make_sweep(tmp_path, replace(cases.sweep().experiment.sweep, folds=["1", "2"], counts=[16, 64]))
    for record in (cases.trial([16], UAS), cases.trial([64], {"1": [40.0, 41.0]}, TrialState.stopped)):
        write_trial(sweep.folder, record)
    console.show(launcher_of(sweep), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    heading = next(line for line in lines if line.startswith("point"))
    row = next(line for line in lines if line.startswith("16 "))
    assert row[heading.index("UA") :].startswith("56.0")
    assert row.endswith("best")
    assert any(line.startswith("64 ") and line.endswith("stopped early") for line in lines)
    assert any(line.startswith("python launch.py grid exp ") and "'recipe.cluster.counts=[16]'" in line for line in lines)
    assert str(sweep.layout.sweep / "table.tex") in lines
    assert "no driver is running" in lines[-1]
    console.show(launcher_of(sweep), as_json=True)
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (value["best"], value["standing"], value["job"]) == ("16", "interrupted", "")


def test_on_a_terminal_the_table_is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by rich; text in square brackets is not markup."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    console._print_rows(("point", "UA"), [("16, x=[red]", "50.0")], bold=[True])
    drawn = capsys.readouterr().out
    assert "16, x=[red]" in drawn
    assert "━" in drawn or "─" in drawn


def test_before_the_first_trial_there_is_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that is waiting in the queue has a report."""
    sweep = make_sweep(tmp_path)
    console.show(launcher_of(sweep), as_json=False)
    assert "Nothing to choose yet" in capsys.readouterr().out


@pytest.mark.parametrize("cluster", [Cluster.local, Cluster.slurm])
def test_launching_a_finished_sweep_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    """Neither Ray nor a job is started: the report is printed, also if another sweep was launched since. Failed trials are run again."""
    monkeypatch.setattr("jobs.sweeps.report.write.plot", lambda summary, kind: b"")  # takes seconds
    for begins in ("run_here", "submit"):
        monkeypatch.setattr(SweepLauncher, begins, lambda *_, **__: pytest.fail("it began"))
    sweep = make_sweep(tmp_path, replace(cases.sweep().experiment.sweep, folds=["1", "2"], counts=[16, 64]))
    sweep = replace(sweep, experiment=replace(sweep.experiment, cluster=cluster))
    write_trial(sweep.folder, cases.trial([16], UAS))
    assert not launcher_of(sweep).nothing_left()
    with driving(sweep.folder) as turn:
        turn.complete = True
        assert not launcher_of(sweep).nothing_left()
    write_text(latest_file(sweep.layout), "another\n")
    launch = console.run_here if cluster is Cluster.local else partial(console.run_on_slurm, wait=True)
    assert launch(launcher_of(sweep))
    assert f"sweep {sweep.digest}: every trial has ended, nothing is left to compute" in capsys.readouterr().out
    assert latest_file(sweep.layout).read_text() == f"{sweep.digest}\n"
    write_trial(sweep.folder, cases.trial([64], {}, TrialState.failed, "ptapt: given up"))
    assert not launcher_of(sweep).nothing_left()
    assert not console._print_report(launcher_of(sweep))
    assert "1 trial failed: `python launch.py sweep exp" in capsys.readouterr().err


def test_show_and_cancel_use_the_last_sweep(tmp_path: Path) -> None:
    """`--show` and `--cancel` use the sweep launched last, with its settings."""
    sweep = make_sweep(tmp_path)
    store_sweep(sweep)
    assert reopen(sweep.layout).digest == sweep.digest
    assert launcher_of(sweep).status() == SweepStatus("interrupted", launcher_of(sweep).status().sentence)
    assert launcher_of(sweep).cancel() == ["exp: nothing to cancel, it is not running"]
    assert not sweep.folder.stop.exists()
