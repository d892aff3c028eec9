"""A grid of an ordinary user, with the limits that sites set for one."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.end_to_end.grids import SMALL, attempts, read_json
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.users import command_as, folder_of, interpreter_of, require_user
from tests.waiting import wait_until


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
    for _ in range(3000):
        most = max(most, len(slurm_cluster.run("squeue", "--noheader", "--states=RUNNING").splitlines()))
        if read_json(run.results / "demo" / "tables" / "summary.json").get("complete"):
            break
        time.sleep(0.2)
    else:
        raise AssertionError(next((run.results / "demo" / "logs").glob("demo.control.*")).read_text()[-3000:])
    assert most <= 1
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"))
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
