"""All methods from corpus to compiled table on a real Slurm of three nodes, and the same on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.accounts import Account
from tests.end_to_end.grids import ON_SLURM, SMALL, STAGES, attempts, compile_table, scores
from tests.slurm_cluster.cluster import Cluster


@pytest.mark.slow
@pytest.mark.slurm
def test_three_methods_from_sbatch_to_pdf(slurm_cluster: Cluster, small_data: Path, account: Account) -> None:
    """All three methods run as job arrays and end in a table that compiles; again, nothing is submitted; here, the numbers are the same.

    A task computes both clusterings of a fold: it imports torch once.
    """
    run, here = account.line(small_data, "slurm"), account.line(small_data, "local")
    local = here.start("grid", "demo", *SMALL, "folds=[1]")  # computes meanwhile
    settings = ("--cluster", "slurm", *SMALL, *ON_SLURM, "resources.default.runs_per_task=2")
    first = run("grid", "demo", "--wait", *settings, timeout=600)
    assert first.returncode == 0, first.stdout + first.stderr
    tables = run.results / "demo" / "tables"
    summary = json.loads((tables / "summary.json").read_text())
    assert summary["complete"] is True
    assert [method["method"] for method in summary["methods"]] == ["vft", "tapt", "ptapt"]
    assert attempts(run.results) == STAGES
    assert compile_table(tables).stat().st_size > 10_000
    submissions = sorted((run.results / "demo" / "submissions").rglob("*.sh"))
    assert submissions

    again = run("grid", "demo", *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert " 0 submitted" in again.stdout
    assert attempts(run.results) == STAGES
    assert sorted((run.results / "demo" / "submissions").rglob("*.sh")) == submissions

    output, _ = local.communicate(timeout=600)
    assert local.returncode == 0, output
    ours = scores(json.loads((here.results / "demo" / "tables" / "summary.json").read_text()))
    assert ours == {run: ua for run, ua in scores(summary).items() if run[1] == "1"}
    assert len(ours) == 3
