"""Whether the process that holds a claim is alive: by its pid where that is visible, else by its heartbeat or Slurm's queue."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.store.attempts import (
    GONE_SECONDS,
    QUIET_SECONDS,
    Heartbeat,
    claim_alive,
    is_slurm_job,
    new_claim,
    own_slurm_job,
    process_start,
)
from jobs.store.records import Claim
from tests.waiting import until

ELSEWHERE = Claim(1, "node9", 4, "another-boot/pid:[1]/77", 100.0)


def test_own_process_is_alive_and_a_reused_pid_is_not() -> None:
    """The pid counts only together with the start time of its process."""
    claim = new_claim(1)
    assert claim_alive(claim, 0.0, live_jobs=None, now=1e12)
    head, _, ticks = claim.process_start.rpartition("/")
    assert not claim_alive(replace(claim, process_start=f"{head}/{int(ticks) - 1}"), time.time(), live_jobs=None, now=time.time())


def test_an_ended_process_is_dead_also_as_a_zombie() -> None:
    """A child that has ended but was not reaped is dead."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    claim = replace(new_claim(1), pid=child.pid, process_start=process_start(child.pid))
    assert claim_alive(claim, 0.0, live_jobs=None, now=time.time())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not claim_alive(claim, time.time(), live_jobs=None, now=time.time())
    child.communicate()
    assert not claim_alive(claim, time.time(), live_jobs=None, now=time.time())


@pytest.mark.parametrize(("age", "alive"), [(0, True), (QUIET_SECONDS - 1, True), (QUIET_SECONDS + 1, False)])
def test_on_another_machine_the_heartbeat_decides(age: float, alive: bool) -> None:
    """Alive while its claim file was touched recently."""
    assert claim_alive(ELSEWHERE, 1000.0, live_jobs=None, now=1000.0 + age) is alive


@pytest.mark.parametrize(
    ("jobs", "age", "alive"),
    [
        ({"7_3"}, 1e6, True),
        ({"7_4"}, GONE_SECONDS - 1, True),
        ({"7_4"}, GONE_SECONDS + 1, False),
        (None, GONE_SECONDS + 1, True),
        (None, QUIET_SECONDS + 1, False),
    ],
)
def test_the_queue_decides_where_it_was_read(jobs: set[str] | None, age: float, alive: bool) -> None:
    """In the queue: alive. Not in it: dead after GONE_SECONDS without a heartbeat. Queue not read: the heartbeat decides."""
    claim = replace(ELSEWHERE, slurm_job="7_3")
    assert claim_alive(claim, 1000.0, live_jobs=jobs, now=1000.0 + age) is alive


@pytest.mark.parametrize(("uid", "cluster"), [(1, "here"), (0, "there")])
@pytest.mark.parametrize(("age", "alive"), [(GONE_SECONDS + 1, True), (QUIET_SECONDS - 1, True), (QUIET_SECONDS + 1, False)])
def test_the_queue_does_not_decide_on_another_users_or_clusters_job(uid: int, cluster: str, age: float, alive: bool) -> None:
    """Neither that it lacks the job, nor that it has one of the same number, nor that such a job has left it: the heartbeat decides."""
    claim = replace(ELSEWHERE, slurm_job="7_3", uid=os.getuid() + uid, cluster=cluster)
    for jobs in ((), ("7_3",), None):
        for gone in ((), ("7_3",)):
            assert claim_alive(claim, 1000.0, live_jobs=jobs, now=1000.0 + age, gone=gone, cluster=lambda: "here") is alive


def test_the_same_job_number_on_another_cluster_is_not_this_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim is not one of a previous execution of this job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    claim = replace(ELSEWHERE, slurm_job="7", uid=os.getuid(), cluster="here")
    assert not claim_alive(claim, 1000.0, live_jobs=None, now=1000.0)
    assert claim_alive(replace(claim, cluster="there"), 1000.0, live_jobs=None, now=1000.0)
    own = new_claim(1)
    assert (own.uid, own.cluster) == (os.getuid(), "here")


def test_where_the_cluster_or_the_user_is_not_known_the_queue_decides() -> None:
    """Claims of older versions, and a Slurm that does not state its name."""
    for claim in (replace(ELSEWHERE, slurm_job="7_3"), replace(ELSEWHERE, slurm_job="7_3", uid=os.getuid(), cluster="there")):
        assert not claim_alive(claim, 1000.0, live_jobs=(), now=1000.0 + GONE_SECONDS + 1, cluster=lambda: "")


def test_a_job_name_that_is_not_slurms_is_not_looked_up_in_the_queue() -> None:
    """A claim that an older version has recorded for a stage of a sweep: alive although the queue has no job of this name."""
    claim = replace(ELSEWHERE, slurm_job="ray-abc-1")
    assert not is_slurm_job(claim.slurm_job)
    assert claim_alive(claim, 1000.0, live_jobs={"7_3"}, now=1000.0 + QUIET_SECONDS - 1)
    assert not claim_alive(claim, 1000.0, live_jobs={"7_3"}, now=1000.0 + QUIET_SECONDS + 1)


def test_a_requeued_job_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim of the same Slurm job by another process belongs to the job's previous execution."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert own_slurm_job() == "7_3"
    assert not claim_alive(replace(ELSEWHERE, slurm_job="7_3"), 1000.0, live_jobs=None, now=1000.0)
    assert claim_alive(replace(ELSEWHERE, slurm_job="7_4"), 1000.0, live_jobs=None, now=1000.0)


@pytest.mark.parametrize(("age", "alive"), [(GONE_SECONDS - 1, True), (GONE_SECONDS + 1, False)])
def test_a_job_known_to_have_left_the_queue(age: float, alive: bool) -> None:
    """A worker that cannot read the queue, but knows from its description that the job has left it, waits no longer than one that can."""
    claim = replace(ELSEWHERE, slurm_job="7_3")
    assert claim_alive(claim, 1000.0, live_jobs=None, now=1000.0 + age, gone=("7_3",)) is alive
    assert claim_alive(claim, 1000.0, live_jobs=None, now=1000.0 + age, gone=("7_4",))


def test_a_claim_records_slurms_name_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--exclude` needs it; outside of Slurm the host name."""
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert new_claim(1).node == new_claim(1).host == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-0-17")
    claim = new_claim(2, log="/logs/x.out", relief=1, checkpoint=5.0)
    assert (claim.node, claim.log, claim.relief, claim.checkpoint) == ("gpu-0-17", "/logs/x.out", 1, 5.0)


def test_a_heartbeat_touches_the_file_and_ends(tmp_path: Path) -> None:
    """The modification time advances while the block lasts, and not after; a missing file is no error."""
    file = tmp_path / "claim.json"
    file.write_text("{}")
    os.utime(file, (5, 5))
    with Heartbeat(file, seconds=0.01), Heartbeat(tmp_path / "missing", seconds=0.01):
        until(lambda: file.stat().st_mtime != 5, step=0.01)
    assert file.stat().st_mtime > 5
    os.utime(file, (5, 5))
    time.sleep(0.05)
    assert file.stat().st_mtime == 5
