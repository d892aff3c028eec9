"""Whole grids: corpus to compiled table, on this machine and on a real Slurm of three nodes."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.processes import wait_until
from tests.slurm_cluster.users import command_as, folder_of, interpreter_of, require_user

SMALL = (
    *("corpus=small", "folds=[1,2]", "seeds=1", "recipe.cluster.counts=[8,16]", "policy.poll_seconds=0.2", "policy.poll_minutes=0.1"),
    *("recipe.finetune.epochs=3", "recipe.finetune.batch_size=8"),  # less, and it has not learnt
    *("recipe.tapt.steps=3", "recipe.states.steps=3", "recipe.ptapt.steps=3", "recipe.tapt.warmup_steps=1", "recipe.ptapt.warmup_steps=1"),
)
STAGES = 2 * (1 + 2 + (1 + 2 + 1 + 1))  # folds x (V-FT: 1; TAPT: 2; P-TAPT: states, two clusterings, pretraining, fine-tuning)


def attempts(results: Path) -> int:
    """Executions ever begun."""
    return len(list((results / "store").glob("*/*/attempts/*/claim.json")))


def scores(summary: dict[str, Any]) -> dict[tuple[str, str, int], float]:
    """(method, fold, seed) -> UA."""
    return {
        (method["method"], cell["fold"], run["seed"]): run["ua"]
        for method in summary["methods"]
        for cell in method["cells"]
        for run in cell["runs"]
    }


def read_json(file: Path) -> dict[str, Any]:
    """What a file says; nothing if it is not there."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def compile_table(folder: Path) -> Path:
    """Compile tables.tex as it stands."""
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "tables.tex"], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder / "tables.pdf"


@pytest.mark.slow
@pytest.mark.slurm
def test_three_methods_from_sbatch_to_pdf(slurm_cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """All three methods run as job arrays and end in a table that compiles; again, nothing is submitted; here, the numbers are the same."""
    run = CommandLine(small_data, tmp_path / "slurm")
    first = run("grid", "demo", "--cluster", "slurm", "--wait", *SMALL, timeout=600)
    assert first.returncode == 0, first.stdout + first.stderr
    tables = tmp_path / "slurm" / "demo" / "tables"
    summary = json.loads((tables / "summary.json").read_text())
    assert summary["complete"] is True
    assert [method["method"] for method in summary["methods"]] == ["vft", "tapt", "ptapt"]
    assert attempts(tmp_path / "slurm") == STAGES
    assert compile_table(tables).stat().st_size > 10_000
    submissions = sorted((tmp_path / "slurm" / "demo" / "submissions").rglob("*.sh"))
    assert submissions

    again = run("grid", "demo", "--cluster", "slurm", *SMALL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert " 0 submitted" in again.stdout
    assert attempts(tmp_path / "slurm") == STAGES
    assert sorted((tmp_path / "slurm" / "demo" / "submissions").rglob("*.sh")) == submissions

    here = CommandLine(small_data, tmp_path / "local")
    local = here("grid", "demo", *SMALL, "folds=[1]", timeout=600)
    assert local.returncode == 0, local.stdout + local.stderr
    ours = scores(json.loads((tmp_path / "local" / "demo" / "tables" / "summary.json").read_text()))
    assert ours == {run: ua for run, ua in scores(summary).items() if run[1] == "1"}
    assert len(ours) == 3


@pytest.mark.slow
def test_more_seeds_run_only_what_is_missing(small_data: Path, tmp_path: Path) -> None:
    """A second launch computes nothing; one more seed is one more fine-tuning per fold, and pretraining is shared."""
    run = CommandLine(small_data, tmp_path / "results")
    settings = ("methods=[tapt]", *SMALL)
    first = run("grid", "demo", *settings, timeout=300)
    assert first.returncode == 0, first.stdout + first.stderr
    assert attempts(run.results) == 4
    again = run("grid", "demo", *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert attempts(run.results) == 4
    dry = run("grid", "demo", "--dry-run", *settings, "seeds=2")
    assert "submit finetune tapt: 2 tasks" in dry.stdout
    assert "submit tapt" not in dry.stdout
    more = run("grid", "demo", *settings, "seeds=2", timeout=300)
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
    deadline = time.monotonic() + 120
    while not attempts(run.results) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 3, output
    assert f"`python launch.py resume demo --results {run.results}` resumes" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    early = run("collect", "demo")
    assert early.returncode == 3, early.stdout + early.stderr
    assert run("collect", "demo", "--allow-incomplete").returncode == 0
    rest = run("grid", "demo", *settings, timeout=300)
    assert rest.returncode == 0, rest.stdout + rest.stderr


@pytest.mark.slow
@pytest.mark.slurm
def test_launched_cancelled_and_left_to_itself_it_ends_in_tables(slurm_cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """Cancelled, nothing is submitted by any look; launched again and left alone, the chain brings the tables, tells it, and is gone."""
    run = CommandLine(small_data, tmp_path / "results")
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
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)
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
    assert wait_until(lambda: bool(read_json(folder / "tables" / "summary.json").get("complete")), 240)
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)
    done = run("status", "demo", "--json")
    assert json.loads(done.stdout)["complete"] is True
    assert attempts(run.results) >= 2
    assert not [path for path in folder.glob("submissions/*.json") if read_json(path).get("state") == "intent"]


@pytest.mark.slurm
def test_status_only_looks_and_reconcile_acts(slurm_cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """After `scancel` of everything `status` submits nothing, and names the commands that do; `reconcile` is one of them."""
    run = CommandLine(small_data, tmp_path / "results")
    settings = ("--cluster", "slurm", "methods=[vft]", "resources.default.memory_gb=1", *SMALL, "policy.poll_minutes=5")
    launched = run("grid", "demo", *settings, "recipe.finetune.epochs=20000")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    slurm_cluster.run("scancel", f"--user={os.getuid()}")
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)
    for options in ((), ("--json",)):
        shown = run("status", "demo", *options)
        assert shown.returncode == 0, shown.stderr
        assert "no task and no controller of demo is in Slurm's queue" in shown.stdout
        for command in ("resume", "reconcile"):
            assert f"`python launch.py {command} demo --results {run.results}`" in shown.stdout
        assert not slurm_cluster.run("squeue", "--noheader")
    acted = run("reconcile", "demo")
    assert acted.returncode == 0, acted.stdout + acted.stderr
    assert "makes the next pass" in acted.stdout
    assert slurm_cluster.run("squeue", "--noheader")


@pytest.mark.slurm
def test_an_experiment_with_jobs_in_slurm_stays_there(slurm_cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """Without --cluster it continues in Slurm; `local` is refused; `cancel` withdraws its jobs even if its record says `local`."""
    run = CommandLine(small_data, tmp_path / "results")
    settings = ("methods=[vft]", "resources.default.memory_gb=1", *SMALL, "policy.poll_minutes=5", "recipe.finetune.epochs=20000")
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
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)


@pytest.fixture
def one_job_at_once(slurm_cluster: Cluster) -> Iterator[str]:
    """An ordinary user of whom one job may run at a time."""
    user = require_user()
    modify = ("sacctmgr", "--immediate", "modify", "user", user, "set")
    slurm_cluster.run(*modify, "MaxJobs=1")
    yield user
    slurm_cluster.run(*modify, "MaxJobs=-1")


@pytest.mark.slow
@pytest.mark.slurm
def test_an_ordinary_user_in_a_hidden_partition_with_one_job_at_once(
    slurm_cluster: Cluster, one_job_at_once: str, small_data: Path
) -> None:
    """A grid of P-TAPT, launched and left alone, ends complete: nothing is computed twice, and nothing is submitted twice.

    Users have no accounting there: sacct and sacctmgr answer as Slurm's do without it (the limit itself needs accounting).
    Before: passes did not see the user's own jobs there and submitted the whole graph again; the link that ran was the one job.
    """
    home = folder_of(one_job_at_once, slurm_cluster.folder / f"user-{os.urandom(3).hex()}")
    shutil.copytree(small_data / "small", home / "data" / "small")
    python, variables = interpreter_of(one_job_at_once)
    for program in (home / "programs" / "sacct", home / "programs" / "sacctmgr"):
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
        program.chmod(0o755)
    variables = {**variables, "PATH": f"{home}/programs:{slurm_cluster.environment['PATH']}"}
    run = CommandLine(home / "data", home / "results", variables, tuple(command_as(one_job_at_once, python)))
    site = [f"slurm.python={python}", "slurm.partition=hidden", *(f"slurm.environment.{key}={value}" for key, value in variables.items())]
    done = run("grid", "demo", "--cluster", "slurm", *SMALL, *site, "methods=[ptapt]", "folds=[1]", "resources.default.memory_gb=1")
    assert done.returncode == 0, done.stdout + done.stderr
    most = 0
    for _ in range(2400):
        most = max(most, len(slurm_cluster.run("squeue", "--noheader", "--states=RUNNING").splitlines()))
        if read_json(run.results / "demo" / "tables" / "summary.json").get("complete"):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(next((run.results / "demo" / "logs").glob("demo.control.*")).read_text()[-3000:])
    assert most <= 1
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)
    assert attempts(run.results) == 5
    submitted = [
        key
        for pattern in ("*.json", "ended/*.json")
        for file in (run.results / "demo" / "submissions").glob(pattern)
        for task in read_json(file).get("tasks", ())
        for key in task
    ]
    assert len(submitted) == len(set(submitted)) == 5
    assert {path.stat().st_uid for path in run.results.rglob("result.json")} == {pwd.getpwnam(one_job_at_once).pw_uid}


@pytest.mark.slurm
def test_without_an_answer_from_slurm_nothing_is_stored_and_status_shows_the_files(
    slurm_cluster: Cluster, small_data: Path, tmp_path: Path
) -> None:
    """A launch is refused in one line before anything is written; of one that was stored `status` and `cancel` say what they can."""
    (tmp_path / "slurm.conf").write_text("")  # read by no command of Slurm without an error
    run = CommandLine(small_data, tmp_path / "results", {"SLURM_CONF": str(tmp_path / "slurm.conf")})
    settings = ("--cluster", "slurm", "methods=[vft]", "policy.controller=false", *SMALL, "recipe.finetune.epochs=20000")
    refused = run("grid", "demo", *settings)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert not run.results.exists()
    there = CommandLine(small_data, run.results)
    assert there("grid", "demo", *settings).returncode == 0

    def claims() -> list[Path]:
        return list((run.results / "store").glob("*/*/attempts/*/claim.json"))

    assert wait_until(lambda: len(claims()) == 2, 60), "both runs have begun"
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
    assert wait_until(lambda: len(slurm_cluster.run("squeue", "--noheader").splitlines()) == 1, 60)
    assert "everything cancelled" in there("cancel", "demo").stdout
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)

    for claim in claims():
        os.utime(claim, (1, 1))  # the heartbeat of a worker that was killed is not waited for
    (counts,) = (row["counts"] for row in json.loads(there("status", "demo", "--json").stdout)["stages"])
    assert counts["cancelled"] == 2

    file = run.results / "demo" / "experiment.json"
    file.write_text(json.dumps({**read_json(file), "stages": "of other code"}))
    moved_on = there("reconcile", "demo")
    assert (moved_on.returncode, len(moved_on.stderr.splitlines())) == (2, 1), moved_on.stderr


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


@pytest.mark.slow
def test_recorded_speech_from_prepare_to_confusion_matrix(emodb_source: Path, tmp_path: Path) -> None:
    """EmoDB goes from its own files to a table and a matrix of seven classes whose counts are the held-out speakers' utterances."""
    run = CommandLine(tmp_path / "data", tmp_path / "results")
    prepared = run("prepare", "emodb", "--source", str(emodb_source))
    assert prepared.returncode == 0, prepared.stderr
    assert "535 utterances" in prepared.stdout
    done = run("grid", "emodb", "methods=[vft]", "folds=[03-08]", "seeds=1", "recipe.finetune.epochs=1", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (matrix,) = (run.results / "emodb" / "confusion" / "vft").glob("*.csv")
    rows = [line.split(",") for line in matrix.read_text().splitlines()]
    assert rows[0][1:] == ["angry", "boredom", "disgust", "fear", "happy", "neutral", "sad"]
    held_out = [path for path in (emodb_source / "audio").iterdir() if path.name[:2] in ("03", "08")]
    assert sum(int(count) for row in rows[1:] for count in row[1:]) == len(held_out)
