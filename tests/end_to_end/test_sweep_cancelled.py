"""A sweep on a real Slurm that is cancelled and launched again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.end_to_end.sweeps import SMALL, Swept, claims, show, table
from tests.slurm_cluster.cluster import Cluster
from tests.waiting import wait_until


@pytest.mark.slow
@pytest.mark.slurm
def test_a_cancelled_sweep_leaves_slurm_and_resumes(
    slurm_cluster: Cluster, small_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Arrays and links are cancelled. The next launch, here with `--wait`, decides rung by rung, and gives the numbers of this machine."""
    run = CommandLine(small_data, tmp_path / "results")
    rungs = (each for each in SMALL if each != "sweep.stopping=none")
    settings = ("sweep", "demo", "--cluster", "slurm", *rungs, "policy.poll_seconds=1", "resources.default.runs_per_task=2")
    assert run(*settings).returncode == 0
    assert wait_until(lambda: len(claims(run)) > 0)
    cancelled = run("sweep", "demo", "--cancel")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "withdrawn from Slurm" in cancelled.stdout
    assert "controller ended" in cancelled.stdout
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"))
    assert show(run)["standing"] == "interrupted"
    done = run(*settings, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    value = show(run)
    assert (value["standing"], value["trials"]["complete"], value["trials"]["stopped"]) in (("complete", 1, 1), ("complete", 2, 0))
    ours = sorted(table(run.results / "demo" / "sweep", "runs.csv"), key=lambda row: (row["point"], row["fold"]))
    swept: Swept = request.getfixturevalue("swept")  # last: another test process may be computing it meanwhile
    here = {(row["point"], row["fold"]): row["ua"] for row in table(swept.report, "runs.csv")}
    assert {(row["point"], row["fold"]): row["ua"] for row in ours}.items() <= here.items()
    assert "nothing to cancel" in run("sweep", "demo", "--cancel").stdout
