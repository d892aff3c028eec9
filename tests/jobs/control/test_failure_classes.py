"""Each class of failure, produced: real workers on a real Slurm that are killed, requeued, starved and cut off, and what follows."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.control.controller import Report
from jobs.control.facts import StageFacts
from jobs.experiment.config import SlurmSite
from jobs.store.failures import FailureClass
from jobs.store.records import Claim
from tests.jobs import fake_registry
from tests.jobs.failure_trial import FIRST, Trial
from tests.slurm_cluster import Cluster
from tests.waiting import wait_until

ON_A_NODE_THAT_DIES = (0, 1, 2, 3)
KILLED, REQUEUED, STALLED, WARNED = 4, 5, 6, 7
CUDA_MEMORY, HOST_MEMORY, WRONG, PEER_GONE = 8, 9, 10, 11
TIMED_OUT, NOT_A_NUMBER, COLLAPSED = 12, 13, 14
BEHAVIOURS = {
    **dict.fromkeys((*ON_A_NODE_THAT_DIES, KILLED, REQUEUED, TIMED_OUT), "hang:1"),
    STALLED: "stall:9",
    WARNED: "sleep:600",
    CUDA_MEMORY: "oom:1",
    HOST_MEMORY: "eat:6000",
    WRONG: "fail:9",
    PEER_GONE: "comm:1",
    NOT_A_NUMBER: "nan",
    COLLAPSED: "collapse",
}
LIMITED = SlurmSite(prologue=["ulimit -v 4000000"])  # KiB; srun hands it on to the worker


class Storm:
    """One grid that meets all of it, and what was left of it."""

    def __init__(self, trial: Trial, cluster: Cluster) -> None:
        self.trial, self.cluster = trial, cluster
        self.dead_node = ""
        self.struck: set[str] = set()
        self.report: Report | None = None

    def fact(self, slot: int) -> StageFacts:
        assert self.report is not None
        return self.report.facts[self.trial.run(slot).key]

    def strike(self, report: Report) -> None:
        """Whatever is due by now."""
        self.report = report
        trial, run = self.trial, self.cluster.run
        begun = {slot: trial.starts(slot) for slot in BEHAVIOURS}
        claims = {slot: trial.claims(slot) for slot in BEHAVIOURS}  # second: whatever has begun has claimed its attempt before
        if self._once("begun", all(begun[slot] for slot in (*ON_A_NODE_THAT_DIES, KILLED, REQUEUED, STALLED, WARNED))):
            self.dead_node = claims[0][0].node
            assert {claims[slot][0].node for slot in ON_A_NODE_THAT_DIES} == {self.dead_node}
            self.cluster.kill_node(self.dead_node)
            run("scontrol", "update", f"nodename={self.dead_node}", "state=down", "reason=power")  # noticed sooner than by a time-out
            run("scontrol", "requeue", claims[REQUEUED][0].slurm_job)
            self._ends(claims[STALLED][0], "now")
            self._ends(claims[WARNED][0], "now+60")
        if self._once("timed out", begun[TIMED_OUT] > 0 and "begun" in self.struck):
            self._ends(claims[TIMED_OUT][0], "now")
        if self._once("stalled again", begun[STALLED] > 1):
            run("scancel", "--signal=USR1", claims[STALLED][1].slurm_job)
        if self._once("killed", all(len(claims[slot]) > 1 for slot in ON_A_NODE_THAT_DIES)):
            os.kill(worker_process(claims[KILLED][0]), signal.SIGKILL)
        trial.bury()

    def _ends(self, claim: Claim, when: str) -> None:
        """Bring a running job's time limit forward: Slurm warns, and ends it, within half a minute."""
        command = ["scontrol", "update", f"JobId={claim.slurm_job}", f"EndTime={when}"]
        environment = dict(self.cluster.environment)
        assert wait_until(lambda: subprocess.run(command, env=environment, capture_output=True).returncode == 0, step=0.2)

    def _once(self, what: str, now: bool) -> bool:
        """True the first time that the moment has come."""
        if not now or what in self.struck:
            return False
        self.struck.add(what)
        return True


def worker_process(claim: Claim) -> int:
    """Pid, as seen from here, of the worker that holds a claim on a node of its own namespace."""
    array, _, index = claim.slurm_job.partition("_")
    marks = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            if b"jobs.worker.main" not in (process / "cmdline").read_bytes() or not marks.issubset(environment):
                continue
            (names,) = [line for line in (process / "status").read_text().splitlines() if line.startswith("NSpid")]
        except OSError:
            continue
        if int(names.split()[-1]) == claim.pid:
            return int(process.name)
    raise AssertionError(f"no process of {claim}")


@pytest.fixture(scope="module")
def storm(slurm_session: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    """The grid, after everything has happened to it."""
    slurm_session.clear()
    trial = Trial(tmp_path_factory.mktemp("storm"), BEHAVIOURS, seeds=len(BEHAVIOURS), site=LIMITED)
    found = Storm(trial, slurm_session)
    try:
        trial.settle(400, found.strike)
        yield found
    finally:
        slurm_session.clear()
        if found.dead_node:
            slurm_session.start_node(found.dead_node)
            assert wait_until(lambda: "idle" in slurm_session.run("sinfo", "-h", "-n", found.dead_node, "-p", "main", "-o", "%T"), step=0.2)


@pytest.mark.slurm
def test_everything_but_code_and_a_hopeless_limit_is_there_in_the_end(storm: Storm) -> None:
    """Two slots are given up, each with its reason; nothing was computed twice to its end."""
    report = storm.report
    assert report is not None
    hopeless = {storm.trial.run(slot).key for slot in (STALLED, WRONG)}
    assert set(report.plan.given_up) == hopeless
    assert (report.plan.blocked, report.plan.held_or_cancelled) == ((), ())
    assert all(report.facts[run.key].done for run in report.graph.runs if run.key not in hopeless)
    assert set(fake_registry.count(storm.trial.corpus, "ends").values()) == {1}
    assert storm.struck == {"begun", "timed out", "stalled again", "killed"}


@pytest.mark.slurm
def test_a_node_that_dies_is_left_and_then_avoided(storm: Storm) -> None:
    """NODE_FAIL: Slurm puts the elements back, the same seeds run elsewhere, at no cost; what is submitted later excludes the node."""
    for slot in ON_A_NODE_THAT_DIES:
        first, second = storm.trial.claims(slot)
        assert first.slurm_job == second.slurm_job
        assert (first.node, second.node != first.node) == (storm.dead_node, True)
        assert storm.trial.classes(slot) == ["node"]
        assert storm.fact(slot).bad_nodes == (storm.dead_node,)
    later = storm.trial.script(storm.trial.claims(KILLED)[1].slurm_job)
    assert f"#SBATCH --exclude={storm.dead_node}\n" in later
    assert "--exclude" not in storm.trial.script(storm.trial.claims(KILLED)[0].slurm_job)


@pytest.mark.slurm
def test_a_worker_that_is_killed_is_followed_by_another_job(storm: Storm) -> None:
    """FAILED by signal 9, without an outcome: class node, no change of the request, retried."""
    first, second = storm.trial.claims(KILLED)
    assert first.slurm_job != second.slurm_job
    assert storm.trial.states(KILLED)[0] == "FAILED"
    assert storm.trial.classes(KILLED) == ["node"]
    assert storm.trial.outcome(KILLED) is None
    result = storm.trial.result(KILLED)
    assert result is not None
    assert (result.attempt, result.provenance["relief"]) == (2, 0)


@pytest.mark.slurm
def test_a_requeue_is_one_more_attempt_of_that_element_alone(storm: Storm) -> None:
    """The same job, and no other of its array."""
    first, second = storm.trial.claims(REQUEUED)
    assert first.slurm_job == second.slurm_job
    assert storm.trial.starts(REQUEUED) == 2
    assert storm.trial.starts(COLLAPSED) == 1
    assert storm.trial.starts(KILLED) == 2


@pytest.mark.slurm
def test_at_the_time_limit_a_checkpoint_is_resumed(storm: Storm) -> None:
    """Slurm's warning comes before the end: saved, left, and resumed by the next job."""
    outcome, result = storm.trial.outcome(WARNED), storm.trial.result(WARNED)
    assert outcome is not None
    assert (outcome.error, outcome.kind) == ("FakeStopError", FailureClass.time_limit.name)
    assert storm.trial.classes(WARNED) == ["time_limit"]
    assert storm.trial.claims(WARNED)[1].checkpoint > 0
    assert result is not None
    assert result.attempt == 2


@pytest.mark.slurm
def test_a_time_limit_without_a_word_is_tried_once_more(storm: Storm) -> None:
    """TIMEOUT: a worker that does not hear is killed at the limit."""
    assert storm.trial.states(TIMED_OUT)[0] == "TIMEOUT"
    assert storm.trial.classes(TIMED_OUT) == ["time_limit"]
    assert storm.trial.outcome(TIMED_OUT) is None
    assert storm.fact(TIMED_OUT).done


@pytest.mark.slurm
def test_a_stage_that_comes_no_further_in_its_time_is_stopped(storm: Storm) -> None:
    """Two limits, no newer checkpoint: more of the same would not help, and what would is said."""
    assert storm.trial.states(STALLED) == ["TIMEOUT", "FAILED"]
    assert storm.trial.classes(STALLED) == ["time_limit", "time_limit"]
    assert "request more `minutes`" in storm.fact(STALLED).stopped


@pytest.mark.slurm
@pytest.mark.parametrize(("slot", "error"), [(CUDA_MEMORY, "OutOfMemoryError"), (HOST_MEMORY, "MemoryError")])
def test_out_of_memory_is_met_with_half_the_work_and_more_memory(storm: Storm, slot: int, error: str) -> None:
    """The graphics card's own error, and the kernel's refusal under a real limit; asked for is half as much memory again."""
    outcome, result = storm.trial.outcome(slot), storm.trial.result(slot)
    assert outcome is not None
    assert (outcome.error, outcome.kind) == (error, FailureClass.memory.name)
    assert result is not None
    assert result.provenance["relief"] == 1
    first, second = storm.trial.claims(slot)
    assert (first.relief, second.relief) == (0, 1)
    assert "#SBATCH --mem=512M\n" in storm.trial.script(first.slurm_job)
    assert "#SBATCH --mem=768M\n" in storm.trial.script(second.slurm_job)


@pytest.mark.slurm
def test_an_exception_is_not_tried_again(storm: Storm) -> None:
    """One start, and its words are the reason."""
    assert storm.trial.starts(WRONG) == 1
    assert storm.fact(WRONG).stopped == "ValueError: made to fail, start 1"


@pytest.mark.slurm
def test_a_lost_peer_is_tried_again_elsewhere(storm: Storm) -> None:
    """The node is excluded for this stage alone."""
    first, second = storm.trial.claims(PEER_GONE)
    assert first.node != second.node
    assert f"#SBATCH --exclude={first.node}\n" in storm.trial.script(second.slurm_job)
    assert storm.fact(PEER_GONE).done


@pytest.mark.slurm
@pytest.mark.parametrize("slot", [NOT_A_NUMBER, COLLAPSED])
def test_a_diverged_run_gives_its_slot_to_a_reserve_seed(storm: Storm, slot: int) -> None:
    """NaN leaves no result, a collapse one that does not count; neither seed is tried again."""
    report = storm.report
    assert report is not None
    assert report.judgements.generations[("vft", FIRST, slot)] == 1
    assert [run.seed for run in report.graph.runs if run.slot == slot] == [slot + 1000]
    assert storm.trial.starts(slot) == 1
    reserve = storm.trial.result(slot, generation=1)
    assert reserve is not None
    assert not reserve.diverged
    assert (storm.trial.result(slot) is None) == (slot == NOT_A_NUMBER)
