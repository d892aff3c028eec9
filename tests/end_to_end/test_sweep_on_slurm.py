"""A whole sweep on a real Slurm whose controller jobs are ended on the way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.end_to_end.accounts import Account
from tests.end_to_end.sweeps import SMALL, STAGES, Swept, claims, show, table
from tests.slurm_cluster.cluster import Cluster
from tests.waiting import wait_until


def controllers(cluster: Cluster) -> list[str]:
    """Jobs of running links of the controller chain."""
    lines = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%i %j").splitlines()
    return [line.split()[0] for line in lines if ".control." in line]


def link_of_record(run: CommandLine) -> int:
    """Job of the last link that has made sure of its successors; 0 before the first one."""
    records = [json.loads(path.read_text()) for path in run.results.glob("demo/sweep/*/controller.json")]
    return int(records[0]["job"] or 0) if records else 0


@pytest.mark.slow
@pytest.mark.slurm
def test_arrays_of_slurm_give_the_same_numbers_whatever_happens_to_the_driver(
    slurm_cluster: Cluster, small_data: Path, account: Account, request: pytest.FixtureRequest
) -> None:
    """One array for each kind of stage. A link is ended in its pass, and another one killed; the next ones end the sweep."""
    run = account.line(small_data)
    done = run("sweep", "demo", "--cluster", "slurm", *SMALL, "resources.ptapt.nodes=2", "resources.default.runs_per_task=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 stages submitted, 14 in Slurm" in done.stdout
    for signal_name in ("TERM", "KILL"):  # the time limit, possibly before the link has submitted any; a dead node, after it has
        assert wait_until(lambda: len(controllers(slurm_cluster)) == 1)
        (link,) = controllers(slurm_cluster)
        if signal_name == "KILL":  # two links in a row that end before they have submitted another one end the chain
            assert wait_until(lambda link=link: link_of_record(run) >= int(link))  # type: ignore[misc]
        slurm_cluster.run("scancel", f"--signal={signal_name}", "--full", link, check=False)
        assert show(run)["standing"] in ("running", "waiting")
        assert wait_until(lambda link=link: link not in controllers(slurm_cluster))  # type: ignore[misc]
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader")), log_of(run)
    assert show(run)["standing"] == "complete", log_of(run)
    folder = next(run.results.glob("demo/sweep/*/submissions"))
    arrays = [json.loads(path.read_text()) for path in (*folder.glob("*.json"), *folder.glob("ended/*.json"))]
    assert Counter({record["stage"]: sum(map(len, record["tasks"])) for record in arrays}) == STAGES
    assert len(arrays) == len(STAGES)
    assert Counter(path.parents[3].name for path in claims(run)) == STAGES  # nothing was computed twice
    ours = sorted(table(run.results / "demo" / "sweep", "runs.csv"), key=lambda row: (row["point"], row["fold"]))
    swept: Swept = request.getfixturevalue("swept")  # last: another test process may be computing it meanwhile
    here = sorted(table(swept.report, "runs.csv"), key=lambda row: (row["point"], row["fold"]))
    assert [row["key"] for row in show(run)["points"][0]["folds"][0]["runs"]]
    assert [(row["point"], row["fold"], row["seed"]) for row in ours] == [(row["point"], row["fold"], row["seed"]) for row in here]
    assert [float(row["ua"]) for row in ours] == pytest.approx([float(row["ua"]) for row in here], abs=15)  # P-TAPT by two processes
    again = run("sweep", "demo", "--cluster", "slurm", *SMALL)
    assert "every trial has ended, nothing is left to compute" in again.stdout, again.stdout + again.stderr


def log_of(run: CommandLine) -> str:
    """The log of the controller chain."""
    return "".join(path.read_text() for path in run.results.glob("demo/sweep/*/logs/*.control.*.out"))
