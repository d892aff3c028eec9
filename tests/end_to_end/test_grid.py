"""Whole grids on this machine: more seeds, Ctrl-C, a dry run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.end_to_end.grids import SMALL, attempts
from tests.waiting import until


@pytest.mark.slow
def test_more_seeds_run_only_what_is_missing(small_data: Path, tmp_path: Path) -> None:
    """A second launch computes nothing; one more seed is one more fine-tuning per fold, and pretraining is shared."""
    run = CommandLine(small_data, tmp_path / "results")
    settings = ("methods=[tapt]", *SMALL)
    first = run("grid", "demo", *settings)
    assert first.returncode == 0, first.stdout + first.stderr
    assert attempts(run.results) == 4
    again = run("grid", "demo", *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert attempts(run.results) == 4
    dry = run("grid", "demo", "--dry-run", *settings, "seeds=2")
    assert "submit finetune tapt: 2 tasks" in dry.stdout
    assert "submit tapt" not in dry.stdout
    more = run("grid", "demo", *settings, "seeds=2")
    assert more.returncode == 0, more.stdout + more.stderr
    assert attempts(run.results) == 6
    state = json.loads(run("status", "demo", "--json").stdout)
    assert state["complete"] is True


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_a_second_launch_goes_on(small_data: Path, tmp_path: Path) -> None:
    """After Ctrl-C no process is left, `collect` marks the table as incomplete with exit code 3, and the same command finishes the grid."""
    run = CommandLine(small_data, tmp_path / "results")
    settings = ("corpus=small", "methods=[vft]", "folds=[1]", "seeds=3", "recipe.finetune.epochs=6")
    process = run.start("grid", "demo", *settings)
    until(lambda: attempts(run.results))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 3, output
    assert f"`python launch.py resume demo --results {run.results}` resumes" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    early = run("collect", "demo")
    assert early.returncode == 3, early.stdout + early.stderr
    assert run("collect", "demo", "--allow-incomplete").returncode == 0
    rest = run("grid", "demo", *settings)
    assert rest.returncode == 0, rest.stdout + rest.stderr


def test_a_dry_run_touches_nothing(small_data: Path, tmp_path: Path) -> None:
    """`--dry-run` shows the cost and ends with the totals, `--scripts` first the scripts; no file is written, Slurm is asked for no job."""
    run = CommandLine(small_data, tmp_path / "results")
    done = run("grid", "demo", "--cluster", "slurm", "--dry-run", "--scripts", "resources.default.gpus=1", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "#SBATCH --array=0-1" in done.stdout
    assert "#SBATCH --gpus-per-node=1" in done.stdout
    assert "states ptapt: 2 tasks, 2 stages, 0.5 GPU-hours, 0.5 CPU-hours (requested time)" in done.stdout
    assert "in total " in done.stdout.splitlines()[-1]
    brief = run("grid", "demo", "--cluster", "slurm", "--dry-run", "resources.default.gpus=1", *SMALL)
    assert brief.returncode == 0, brief.stderr
    assert "#SBATCH" not in brief.stdout
    assert done.stdout.endswith(brief.stdout)
    assert not run.results.exists()
