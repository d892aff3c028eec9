"""What `status`, `cancel`, `resume` and `reconcile` do with an experiment whose jobs are in a real Slurm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.end_to_end.accounts import Account
from tests.end_to_end.grids import IDLE, SMALL, attempts, read_json
from tests.slurm_cluster.cluster import Cluster
from tests.waiting import wait_until


@pytest.mark.slow
@pytest.mark.slurm
def test_launched_cancelled_and_left_to_itself_it_ends_in_tables(slurm_cluster: Cluster, small_data: Path, account: Account) -> None:
    """Cancelled, nothing is submitted by any look; launched again and left alone, the chain brings the tables, tells it, and is gone."""
    run = account.line(small_data)
    folder = run.results / "demo"
    settings = ("--cluster", "slurm", "methods=[vft]", "resources.default.memory_gb=1", *SMALL)
    first = run("grid", "demo", *settings)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "finetune vft: 2 tasks, array " in first.stdout
    assert "controller: job " in first.stdout
    cancelled = run("cancel", "demo")
    assert cancelled.returncode == 0, cancelled.stdout + cancelled.stderr
    assert "everything cancelled" in cancelled.stdout
    assert "controller ended" in cancelled.stdout
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"))
    scripts = sorted(folder.glob("submissions/scripts/*"))
    shown = run("status", "demo")
    assert shown.returncode == 0, shown.stderr
    assert f"cancelled: `python launch.py resume demo --results {run.results}` resumes" in shown.stdout
    refused = run("reconcile", "demo")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert sorted(folder.glob("submissions/scripts/*")) == scripts
    assert not slurm_cluster.run("squeue", "--noheader")

    again = run("resume", "demo")
    assert again.returncode == 0, again.stdout + again.stderr
    assert wait_until(lambda: bool(read_json(folder / "tables" / "summary.json").get("complete")))
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"))
    done = run("status", "demo", "--json")
    assert json.loads(done.stdout)["complete"] is True
    assert attempts(run.results) >= 2
    assert not [path for path in folder.glob("submissions/*.json") if read_json(path).get("state") == "intent"]


@pytest.mark.slurm
def test_status_only_looks_and_reconcile_acts(slurm_cluster: Cluster, small_data: Path, account: Account) -> None:
    """After `scancel` of everything `status` submits nothing, and names the commands that do; `reconcile` is one of them.

    What the owner has cancelled stays so until the next launch: there `reconcile` names `resume`.
    """
    run = account.line(small_data)
    settings = ("--cluster", "slurm", "methods=[vft]", "resources.default.memory_gb=1", *SMALL, "policy.poll_minutes=5")
    launched = run("grid", "demo", *settings, *IDLE)
    assert launched.returncode == 0, launched.stdout + launched.stderr

    def running() -> int:
        """Number of running tasks in accounting, which lags behind the queue; only accounting records who cancelled a task."""
        rows = slurm_cluster.run(
            "sacct", "-S", "now-1day", "--noheader", "--parsable2", "--allusers", "--allocations", "--format=State,JobName%60"
        )
        return sum(row.startswith("RUNNING|demo.finetune.") for row in rows.splitlines())

    def gone() -> bool:
        return not slurm_cluster.run("squeue", "--noheader") and not running()

    assert wait_until(lambda: running() == 2)
    slurm_cluster.run("scancel", f"--user={account.uid}")  # root is an operator here: its scancel is no cancellation by the owner
    assert wait_until(gone)
    for options in ((), ("--json",)):
        shown = run("status", "demo", *options)
        assert shown.returncode == 0, shown.stderr
        assert "no task and no controller of demo is in Slurm's queue" in shown.stdout
        for command in ("resume", "reconcile"):
            assert f"`python launch.py {command} demo --results {run.results}`" in shown.stdout
        assert not slurm_cluster.run("squeue", "--noheader")
    acted = run("reconcile", "demo")
    if os.getuid() == 0:
        assert acted.returncode == 0, acted.stdout + acted.stderr
        assert "makes the next pass" in acted.stdout
        assert slurm_cluster.run("squeue", "--noheader")
    if account.uid != 0:
        if os.getuid() == 0:
            assert wait_until(lambda: running() == 2)
            slurm_cluster.run("scancel", f"--user={account.uid}", user=account.user)
            assert wait_until(gone)
        acted = run("reconcile", "demo")
        assert acted.returncode == 3, acted.stdout + acted.stderr
        assert f"cancelled: `python launch.py resume demo --results {run.results}` resumes" in acted.stdout


@pytest.mark.slurm
def test_an_experiment_with_jobs_in_slurm_stays_there(slurm_cluster: Cluster, small_data: Path, account: Account) -> None:
    """Without --cluster it continues in Slurm; `local` is refused; `cancel` withdraws its jobs even if its record says `local`."""
    run = account.line(small_data)
    settings = ("methods=[vft]", "resources.default.memory_gb=1", *SMALL, *IDLE, "policy.poll_minutes=5")
    launched = run("grid", "demo", "--cluster", "slurm", *settings)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    again = run("grid", "demo", *settings, "seeds=2", "--dry-run", "--scripts")
    assert again.returncode == 0, again.stderr
    assert "demo: submits jobs to Slurm (site default), as at its last launch" in again.stderr
    assert "#SBATCH --array=0-1" in again.stdout
    refused = run("grid", "demo", "--cluster", "local", *settings)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert "demo has 2 stages and 2 controller jobs in Slurm's queue" in refused.stderr
    assert f"`python launch.py cancel demo --results {run.results}` withdraws them" in refused.stderr

    file = run.results / "demo" / "experiment.json"
    record = read_json(file)
    file.write_text(json.dumps({**record, "config": {**record["config"], "cluster": "local"}}))
    cancelled = run("cancel", "demo")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "2 withdrawn from Slurm" in cancelled.stdout
    assert "controller ended" in cancelled.stdout
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"))


@pytest.mark.slurm
def test_without_an_answer_from_slurm_nothing_is_stored_and_status_shows_the_files(
    slurm_cluster: Cluster, small_data: Path, account: Account
) -> None:
    """A launch is refused in one line before anything is written; of one that was stored `status` and `cancel` say what they can."""
    broken = account.home / "slurm.conf"
    broken.write_text("")  # read by no command of Slurm without an error
    run = account.line(small_data, variables={"SLURM_CONF": str(broken)})
    settings = ("--cluster", "slurm", "methods=[vft]", "policy.controller=false", *SMALL, "recipe.finetune.epochs=20000")
    refused = run("grid", "demo", *settings)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert not run.results.exists()
    there = account.line(small_data)
    assert there("grid", "demo", *settings).returncode == 0

    def claims() -> list[Path]:
        return list((run.results / "store").glob("*/*/attempts/*/claim.json"))

    assert wait_until(lambda: len(claims()) == 2), "both runs have begun"
    shown = run("status", "demo", "--json")
    assert (shown.returncode, len(shown.stderr.splitlines())) == (0, 1), shown.stderr
    assert "the state is shown from the files alone" in shown.stderr
    (counts,) = (row["counts"] for row in json.loads(shown.stdout)["stages"])
    assert counts["queued"] + counts["running"] == 2
    unheard = run("cancel", "demo", "vft/1/0")
    assert (unheard.returncode, len(unheard.stderr.splitlines())) == (2, 1), unheard.stderr
    assert "cancelled on record" in unheard.stderr
    one = there("cancel", "demo", "vft/1/0")
    assert "1 stage cancelled; 1 withdrawn from Slurm" in one.stdout, one.stdout + one.stderr
    assert wait_until(lambda: len(slurm_cluster.run("squeue", "--noheader").splitlines()) == 1)
    assert "everything cancelled" in there("cancel", "demo").stdout
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"))

    for claim in claims():
        os.utime(claim, (1, 1))  # the heartbeat of a worker that was killed is not waited for
    (counts,) = (row["counts"] for row in json.loads(there("status", "demo", "--json").stdout)["stages"])
    assert counts["cancelled"] == 2

    file = run.results / "demo" / "experiment.json"
    file.write_text(json.dumps({**read_json(file), "stages": "of other code"}))
    moved_on = there("reconcile", "demo")
    assert (moved_on.returncode, len(moved_on.stderr.splitlines())) == (2, 1), moved_on.stderr
