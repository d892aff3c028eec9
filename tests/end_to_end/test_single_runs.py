"""Runs that fail, are cancelled, or are followed: what `explain`, `logs`, `status` and `cancel` say of them, on this machine."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.end_to_end.accounts import Account
from tests.waiting import wait_until

ONE = ("methods=[vft]", "folds=[1]", "recipe.finetune.epochs=1")
IN_TURN = "resources.default.cpus=1000"  # one at a time, whatever the machine


def claims(results: Path) -> int:
    """Executions ever begun."""
    return len(list((results / "store").glob("*/*/attempts/*/claim.json")))


@pytest.mark.slow
def test_a_run_that_diverges_with_every_seed_is_told_whole(small_data: Path, account: Account) -> None:
    """Exit code 3, one line for all that failed alike, its seeds and their fate, its log, and tables that mark it."""
    run = account.line(small_data)
    steps = ("corpus=small", "recipe.finetune.batch_size=8")
    settings = (*ONE, *steps, "seeds=1", "recipe.finetune.learning_rate=1e30", "policy.max_seeds=2")
    done = run("grid", "demo", *settings)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "slot 0 gets another seed" in done.stdout
    shown = run("status", "demo")
    assert shown.returncode == 0
    assert "vft finetune: 1 failed, 1 superseded of 2" in shown.stdout
    assert "vft: 1 run diverged and rerun with other seeds" in shown.stdout
    assert "given up (divergence, attempt 1): Diverged: finetune: the loss is nan" in shown.stdout
    story = run("explain", "demo", "vft/1/0").stdout
    assert re.search(r"seed 0 \[\w{8}\]: dropped: Diverged: finetune: the loss is nan", story)
    key = re.search(r"seed 1000 \[(\w{8})\]: fills the slot now", story)
    assert key is not None
    assert "divergence: the slot of a run gets its next reserve seed" in story
    assert "no reserve seed is left; change the recipe, or raise policy.max_seeds, and launch again" in story
    log = run("logs", "demo", key[1])
    assert "Traceback" in log.stdout
    assert log.stdout.rstrip().endswith(f"[{key[1]}]: failed"), log.stdout + log.stderr

    tables = run("collect", "demo")
    assert tables.returncode == 3
    with (run.results / "demo" / "tables" / "runs.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["diverged"] * 2


@pytest.mark.slow
def test_cancelled_here_it_ends_and_a_launch_goes_on(demo_data: Path, account: Account) -> None:
    """What runs is kept and can be followed to its end, nothing new is begun; the printed command computes the rest of it."""
    run = account.line(demo_data)
    process = run.start("grid", "demo", *ONE, IN_TURN, "seeds=2")
    assert wait_until(lambda: claims(run.results) == 1)
    following = run.start("logs", "demo", "vft/1/0", "-f")
    cancelled = run("cancel", "demo")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "everything cancelled (2 stages had no result)" in cancelled.stdout
    assert re.search(r"still computing a stage, whose result is kept: process \d+ on .*; no other stage is started", cancelled.stdout)
    output, _ = process.communicate()
    assert process.returncode == 3, output
    pasted = re.search(r"cancelled: `python launch.py (.*)` resumes", output)
    assert pasted is not None, output
    assert f"--results {run.results}" in pasted[1]
    followed, _ = following.communicate()
    assert following.returncode == 0
    assert "attempt 1 on" in followed
    assert followed.rstrip().endswith("attempt 1 done")
    assert claims(run.results) == 1
    (counts,) = (row["counts"] for row in json.loads(run("status", "demo", "--json").stdout)["stages"])
    assert (counts["done"], counts["cancelled"]) == (1, 1)
    assert "next: cancelled; launching again lifts that" in run("explain", "demo", "vft/1/1").stdout
    without = run("logs", "demo", "vft/1/1")
    assert (without.returncode, len(without.stderr.splitlines())) == (3, 1)
    assert "no log yet" in without.stderr

    assert "nothing to cancel" in run("cancel", "demo", "vft/1/0").stdout

    again = run(*shlex.split(pasted[1]))
    assert again.returncode == 0, again.stdout + again.stderr
    assert claims(run.results) == 2


@pytest.mark.slow
def test_a_dead_server_of_workers_is_one_line_and_exit_code_1(demo_data: Path, account: Account) -> None:
    """It names its log and what to do; nothing is left running."""
    run = account.line(demo_data)
    process = run.start("grid", "demo", *ONE, "seeds=1", "recipe.finetune.epochs=200")
    assert wait_until(lambda: claims(run.results) == 1)
    (server,) = (Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()).split()
    os.kill(int(server), signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "forkserver.log; nothing that is finished is lost: run the same command again" in output.splitlines()[-1]
