"""All methods from corpus to compiled table on a real Slurm of three nodes, and the same on this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.accounts import Account
from tests.end_to_end.grids import ON_SLURM, SMALL, attempts, compile_table, scores
from tests.slurm_cluster.cluster import Cluster

GRID = (
    *(*SMALL, "folds=[1]", "seeds=2", "methods=[vft,tapt,ptapt,adaptors]"),
    "variants.adaptors={method: vft, recipe: {finetune: {adaptors: {kinds: [ba, lora, ws, wg]}, learning_rate: 0.01}}}",
)
STAGES = 1 + (1 + 2 + 1) + 4 * 2  # TAPT; P-TAPT: states, two clusterings, pretraining; fine-tuning: methods x seeds


@pytest.mark.slow
@pytest.mark.slurm
def test_three_methods_from_sbatch_to_pdf(slurm_cluster: Cluster, small_data: Path, account: Account) -> None:
    """All methods run as job arrays and end in a table that compiles; again, nothing is submitted; here, every artifact is the same.

    All adaptors together are a fourth method. A task computes both clusterings, or both seeds of a method: it imports torch once.
    """
    run, here = account.line(small_data, "slurm"), account.line(small_data, "local")
    local = here.start("grid", "demo", *GRID)  # computes meanwhile
    settings = ("--cluster", "slurm", *GRID, *ON_SLURM, "resources.default.runs_per_task=2")
    first = run("grid", "demo", "--wait", *settings)
    assert first.returncode == 0, first.stdout + first.stderr
    tables = run.results / "demo" / "tables"
    summary = json.loads((tables / "summary.json").read_text())
    assert summary["complete"] is True
    assert [method["method"] for method in summary["methods"]] == ["vft", "tapt", "ptapt", "adaptors"]
    assert attempts(run.results) == STAGES
    assert compile_table(tables).stat().st_size > 10_000
    submissions = sorted((run.results / "demo" / "submissions").rglob("*.sh"))
    assert submissions
    check_waiting(run.results / "store")
    report = (tables / "report.html").read_text()
    assert all(title in report for title in ("Waiting in the queue by stage", "Requested and used by stage"))

    again = run("grid", "demo", *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert " 0 submitted" in again.stdout
    assert attempts(run.results) == STAGES
    assert sorted((run.results / "demo" / "submissions").rglob("*.sh")) == submissions

    output, _ = local.communicate()
    assert local.returncode == 0, output
    ours = scores(json.loads((here.results / "demo" / "tables" / "summary.json").read_text()))
    assert ours == scores(summary)
    assert len(ours) == 8
    digests = artifacts(run.results / "store")
    assert any(name.startswith("adaptors/") for _, _, name in digests)
    assert digests == artifacts(here.results / "store")


def artifacts(store: Path) -> dict[tuple[str, str, str], str]:
    """(stage, key, name) -> digest of every artifact but event files, which hold times."""
    results = {file.parent: json.loads(file.read_text())["artifacts"] for file in store.glob("*/*/result.json")}
    return {
        (folder.parent.name, folder.name, name): digest
        for folder, found in results.items()
        for name, digest in found.items()
        if not name.startswith("tensorboard/")
    }


def check_waiting(store: Path) -> None:
    """Every result has the request of its job, and submission and start of the job as accounting has them."""
    results = {file.parent.name: json.loads(file.read_text()) for file in store.glob("*/*/result.json")}
    written = {file.parent.name: file.stat().st_mtime for file in store.glob("*/*/result.json")}
    columns = "--format=JobID,Submit,Start,Timelimit,ReqMem,ReqCPUS"
    command = ["sacct", "--starttime=now-1day", "--noheader", "--parsable2", "--allocations", columns]  # without it: since midnight
    rows = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "SLURM_TIME_FORMAT": "%s"})
    jobs = {job: values for job, *values in (line.split("|") for line in rows.stdout.splitlines())}
    assert len(results) == STAGES
    for result in results.values():
        queue, requested = (result["provenance"][name] for name in ("queue", "requested"))
        submitted, started, limit, memory, cpus = jobs[result["provenance"]["slurm_job"]]
        assert queue["submitted"] == pytest.approx(float(submitted), abs=20)
        assert float(started) - 2 <= queue["started"] < float(started) + 60, "the worker begins later than its job"
        eligible = max([queue["submitted"], *(written[key] for key in result["upstream"].values())])
        assert queue["eligible"] == pytest.approx(eligible, abs=0.01)
        assert queue["waited"] == pytest.approx(max(0.0, queue["started"] - queue["eligible"]), abs=0.01)
        assert limit == f"{int(requested['minutes']) // 60:02d}:{int(requested['minutes']) % 60:02d}:00"
        assert int(cpus) == requested["cpus"]
        assert memory in (f"{requested['memory_mb']:g}M", f"{requested['memory_mb'] / 1024:g}G")
    assert any(result["provenance"]["requested"]["stages"] == 2 for result in results.values())
