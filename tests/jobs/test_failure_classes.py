"""Each class of failure, produced: real workers on a real Slurm that are killed, requeued, starved and cut off, and what follows."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.cancellations import record_cancellation
from jobs.config import Cluster as Where
from jobs.config import Experiment, Policy, SlurmSite, StageResources
from jobs.controller import Desired, Report, reconcile, run_local
from jobs.failures import FailureClass
from jobs.graph import Graph, Run
from jobs.layout import Layout, StageFolder
from jobs.observe import Sight, ended_attempts, read_attempts, read_facts
from jobs.plan import ALIKE, Batch, NodeFacts, Phase, Task
from jobs.records import Claim, Outcome, Result, attempt_numbers, read_claim, read_outcome, read_result
from jobs.slots import Slot
from jobs.slurm import SlurmArrays
from jobs.slurm_client import SlurmClient, SlurmUnavailableError
from jobs.submissions import State, SubmissionBook, new_submission
from jobs.tasks import Workplace, describe, write_description
from tests.jobs import fake_registry, local_launch
from tests.jobs.slurm_cases import make_source
from tests.slurm_cluster import Cluster
from tests.slurm_cluster.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
FIRST = "1"


class Trial:
    """An experiment of the fake registry on the test cluster, looked after by the real controller."""

    def __init__(
        self,
        folder: Path,
        behaviours: Mapping[int, str],
        *,
        seeds: int,
        methods: tuple[str, ...] = ("vft",),
        site: SlurmSite | None = None,
        policy: Policy | None = None,
        settle_seconds: float = 20.0,
        **resources: Any,
    ) -> None:
        self.folder, self.corpus = folder, fake_registry.make_corpus(folder / "corpus")
        self.layout = Layout(folder / "results", "trial")
        self.layout.root.mkdir()
        self.recipe = {"failing": {f"finetune {methods[-1]} {FIRST} {seed}": behaviour for seed, behaviour in behaviours.items()}}
        self.methods, self.seeds, self.policy = methods, seeds, policy or Policy()
        site = site or SlurmSite()
        site.environment["PYTHONPATH"] = str(ROOT)
        given = StageResources(**{"cpus": 1, "gpus": 0, "memory_gb": 0.5, "minutes": 5, **resources})
        self.experiment = Experiment(name="trial", corpus="fake", cluster=Where.slurm, resources={"default": given}, slurm=site)
        self.source = make_source(folder / "source")
        self.settle_seconds = settle_seconds
        self.arrays = self.executor()
        self.desired = self.launched()

    def executor(self, client: SlurmClient | None = None) -> SlurmArrays:
        place = Workplace(fake_registry.NAME, str(self.layout.root), "trial", "fake", str(self.corpus), "d1", fake_registry.DIGEST_OF)
        worker = (sys.executable, "-m", "jobs.worker")
        return SlurmArrays(
            self.experiment, self.layout, place, source=self.source, worker=worker, client=client, settle_seconds=self.settle_seconds
        )

    def graph(self, generations: Mapping[Slot, int] | None = None) -> Graph:
        return fake_registry.make_graph(self.recipe, methods=self.methods, folds=(FIRST,), seeds=self.seeds, generations=generations)

    def launched(self) -> Desired:
        return Desired(self.graph(), self.layout, self.policy, since=time.time(), refill=self.graph)

    def launch_again(self) -> None:
        self.desired = self.launched()

    def look(self) -> Report:
        return reconcile(self.desired, self.arrays)

    def settle(self, seconds: float = 60.0, each: Callable[[Report], None] = lambda report: None) -> Report:
        """Passes until nothing is left to do."""
        end = time.monotonic() + seconds
        while True:
            report = self.look()
            each(report)
            if report.settled:
                return report
            assert time.monotonic() < end, [(key, report.facts[key]) for key in report.plan.waiting]
            time.sleep(0.3)

    def run(self, slot: int, generation: int = 0) -> Run:
        graph = self.graph({("vft", FIRST, slot): generation}) if generation else self.graph()
        return next(run for run in graph.runs if (run.method, run.slot, run.generation) == (self.methods[-1], slot, generation))

    def stage(self, slot: int, generation: int = 0) -> StageFolder:
        return self.layout.stage("finetune", self.run(slot, generation).key)

    def claims(self, slot: int) -> list[Claim]:
        folder = self.stage(slot)
        return [claim for number in attempt_numbers(folder) if (claim := read_claim(folder.attempt(number)))]

    def outcome(self, slot: int, attempt: int = 1) -> Outcome | None:
        return read_outcome(self.stage(slot).attempt(attempt))

    def result(self, slot: int, generation: int = 0) -> Result | None:
        return read_result(self.stage(slot, generation), self.run(slot, generation).key)

    def classes(self, slot: int) -> list[str]:
        """The class of every attempt that ended without a result."""
        key = self.run(slot).key
        files = read_attempts(self.stage(slot), Sight(live_jobs=self.arrays.live_jobs()))
        return [each.failure.name for each in ended_attempts(files, self.arrays.departures([key]).get(key, ()), 0.0)]

    def states(self, slot: int) -> list[str]:
        """What Slurm said of every job that held it."""
        key = self.run(slot).key
        return [each.state for each in self.arrays.departures([key]).get(key, ())]

    def script(self, job: str) -> str:
        """What was handed to sbatch for an element."""
        (script,) = (self.layout.submissions / "scripts").glob(f"{job.partition('_')[0]}_submission.sh")
        return script.read_text()

    def starts(self, slot: int, generation: int = 0) -> int:
        return fake_registry.count(self.corpus, "starts").get(self.run(slot, generation).key, 0)

    def bury(self) -> None:
        """Let time pass for every worker that was killed: its heartbeat is old as soon as its job is gone."""
        live = self.arrays.live_jobs() or frozenset()
        for slot in range(self.seeds):
            folder = self.stage(slot)
            for number in attempt_numbers(folder)[-1:]:
                attempt = folder.attempt(number)
                claim = read_claim(attempt)
                if claim is not None and claim.slurm_job not in live and read_outcome(attempt) is None:
                    os.utime(attempt.claim, (1, 1))


# What each slot of the first grid meets; all of them start at once, four on each of three nodes.
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

    def fact(self, slot: int) -> NodeFacts:
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
        assert wait_until(lambda: subprocess.run(command, env=environment, capture_output=True).returncode == 0, 10, 0.2)

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
            if b"jobs.worker" not in (process / "cmdline").read_bytes() or not marks.issubset(environment):
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
        trial.settle(150, found.strike)
        yield found
    finally:
        slurm_session.clear()
        if found.dead_node:
            slurm_session.start_node(found.dead_node)
            assert wait_until(lambda: "idle" in slurm_session.run("sinfo", "-h", "-n", found.dead_node, "-p", "main", "-o", "%T"), 40, 0.2)


@pytest.mark.slurm
def test_everything_but_code_and_a_hopeless_limit_is_there_in_the_end(storm: Storm) -> None:
    """Two slots are given up, each with its reason; nothing was computed twice to its end."""
    report = storm.report
    assert report is not None
    hopeless = {storm.trial.run(slot).key for slot in (STALLED, WRONG)}
    assert set(report.plan.given_up) == hopeless
    assert (report.plan.blocked, report.plan.stayed) == ((), ())
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
    """FAILED by signal 9, without a word: nobody's fault, nothing learnt, tried again."""
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
    assert "ask for more `minutes`" in storm.fact(STALLED).stopped


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


@pytest.mark.slurm
def test_when_the_first_tasks_all_fail_alike_the_rest_is_withdrawn(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Six tasks, one at a time: after the third failure the waiting ones leave the queue, until it is mended and launched again."""
    trial = Trial(tmp_path, dict.fromkeys(range(6), "broken"), seeds=6, throttle=1)
    report = trial.settle()
    starts = sum(fake_registry.count(trial.corpus, "starts").values())
    assert ALIKE <= starts < 6
    assert len(report.plan.given_up) == starts
    assert len(report.plan.stayed) == 6 - starts
    assert not slurm_cluster.run("squeue", "-h")
    assert "all failed alike" in report.plan.reasons[report.plan.stayed[0]]
    (trial.corpus / "mended").touch()
    assert not trial.look().submitted, "nothing is tried again by itself"
    trial.experiment.resources["default"].throttle = 0
    trial.launch_again()
    assert trial.settle().complete


@pytest.mark.slurm
def test_a_missing_artifact_is_computed_again_although_slurm_let_its_reader_start(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """`afterok` proves nothing: what was written is gone when the reader starts, which waits, and reads what is made anew."""
    trial = Trial(tmp_path, {}, seeds=1, methods=("tapt",))
    first = trial.look()
    (tapt,) = (trial.layout.stage(node.stage, key) for key, node in first.graph.nodes.items() if node.stage == "tapt")
    reader = first.in_flight[first.graph.runs[0].key].job
    slurm_cluster.run("scontrol", "hold", reader)
    assert wait_until(lambda: read_result(tapt, tapt.path.name) is not None, 30)
    (tapt.attempt(1).output / "sum.json").unlink()
    assert wait_until(lambda: "Dependency" not in slurm_cluster.run("squeue", "-h", "-j", reader, "-o", "%r"), 20)
    slurm_cluster.run("scontrol", "release", reader)
    assert wait_until(lambda: slurm_cluster.run("squeue", "-h", "-j", reader, "-o", "%T") == "RUNNING", 20)
    assert trial.settle().complete
    assert attempt_numbers(tapt) == (1, 2)
    assert trial.starts(0) == 1
    assert trial.classes(0) == []


def passes(trial: Trial, number: int) -> None:
    """What a controller in a process of its own does."""
    for _ in range(number):
        reconcile(trial.desired, trial.executor())
        time.sleep(0.1)


@pytest.mark.slurm
def test_two_controllers_execute_every_stage_once(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Twenty passes each, at the same time, on one experiment whose runs fail now and then."""
    trial = Trial(tmp_path, {1: "comm:1", 3: "oom:1", 4: "nan"}, seeds=6, methods=("tapt", "vft"))
    context = multiprocessing.get_context("fork")
    controllers = [context.Process(target=passes, args=(trial, 20)) for _ in range(2)]
    for controller in controllers:
        controller.start()
    for controller in controllers:
        controller.join(90)
    assert [controller.exitcode for controller in controllers] == [0, 0]
    report = trial.settle()
    assert report.complete
    assert set(fake_registry.count(trial.corpus, "ends").values()) == {1}
    starts = fake_registry.count(trial.corpus, "starts")
    assert [starts.pop(trial.run(slot).key) for slot in (1, 3)] == [2, 2]
    assert set(starts.values()) == {1}


@pytest.mark.slurm
def test_no_more_is_submitted_than_the_queue_may_hold(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Room for three: the rest is deferred, not failed, and follows. A job that Slurm has never heard of is waited for, and made good."""
    trial = Trial(tmp_path, {}, seeds=7, site=SlurmSite(max_submit=3), settle_seconds=1.0)
    book, keys = SubmissionBook(trial.layout), tuple(run.key for run in trial.desired.graph.runs)
    vanished = Batch("finetune", "vft", (Task((keys[0],)),))
    record = new_submission(book.next_name(vanished), vanished, time.time())
    assert book.begin(record)
    book.change(record, state=State.submitted, job="99999")
    deferred: set[str] = set()

    def watch(report: Report) -> None:
        deferred.update(report.plan.deferred)
        assert len(trial.arrays.live_jobs() or ()) <= 3

    report = trial.settle(each=watch)
    assert report.complete
    assert len(deferred) >= 3
    assert set(fake_registry.count(trial.corpus, "starts").values()) == {1}
    (departure, _) = trial.arrays.departures(keys)[keys[0]]
    assert (departure.job, departure.state) == ("99999_0", "")


@pytest.mark.slurm
def test_what_is_cancelled_as_it_ends_stays_either_way(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """One stage has just computed its numbers, one waits: whatever Slurm makes of it, nothing is begun again before the next launch."""
    trial = Trial(tmp_path, {}, seeds=2, throttle=1)
    trial.look()
    assert wait_until(lambda: bool(fake_registry.count(trial.corpus, "ends")), 30, 0.01)
    record_cancellation(trial.layout, None, time.time())
    trial.arrays.cancel_all()
    report = trial.settle()
    begun = fake_registry.count(trial.corpus, "starts")
    for _ in range(3):
        assert not trial.look().submitted
    assert fake_registry.count(trial.corpus, "starts") == begun
    assert {*report.plan.reused, *report.plan.stayed} == {run.key for run in report.graph.runs}
    assert report.plan.stayed
    trial.launch_again()
    assert trial.settle().complete


@pytest.mark.slurm
def test_a_queue_that_cannot_be_seen_or_lies_submits_nothing(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """squeue fails: no pass, and no file touched. squeue is empty while a worker runs: its heartbeat holds the stage."""
    trial = Trial(tmp_path, {0: "stall:1"}, seeds=1)
    trial.look()
    assert wait_until(lambda: trial.starts(0) == 1, 30)
    trial.look()
    files = {path: path.stat().st_mtime_ns for path in trial.layout.submissions.rglob("*")}
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    with monkeypatch.context() as shadowed:
        shadowed.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
        squeue.write_text("#!/bin/sh\nexit 1\n")
        squeue.chmod(0o755)
        trial.arrays = trial.executor(SlurmClient(looks=2, pause=0.05))
        with pytest.raises(SlurmUnavailableError):
            trial.look()
        assert {path: path.stat().st_mtime_ns for path in trial.layout.submissions.rglob("*")} == files
        squeue.write_text("#!/bin/sh\n")
        report = trial.look()
        assert report.submitted == ()
        assert report.plan.waiting == (trial.run(0).key,)
        assert report.facts[trial.run(0).key].held == f"Slurm job {trial.claims(0)[0].slurm_job}"
    trial.arrays = trial.executor()
    report = trial.look()
    assert report.in_flight[trial.run(0).key].phase is Phase.running
    slurm_cluster.run("scancel", "--signal=USR1", trial.claims(0)[0].slurm_job)
    assert trial.settle().complete
    assert trial.starts(0) == 2


def test_a_torn_result_is_computed_again(tmp_path: Path) -> None:
    """Half of a result is neither success nor failure, wherever it was cut."""
    desired = local_launch.desired(tmp_path, {})
    key = desired.graph.runs[0].key
    folder = desired.layout.stage("finetune", key)
    with local_launch.executor(tmp_path) as executor:
        assert run_local(desired, executor).complete
        text = folder.result.read_bytes()
        folder.result.write_bytes(text[: len(text) // 2])
        report = run_local(desired, executor)
    assert report.complete
    result = read_result(folder, key)
    assert result is not None
    assert result.attempt == 2
    assert report.facts[key].failures == 0
    assert fake_registry.count(tmp_path / "corpus", "starts").pop(key) == 2


ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from jobs.tasks import read_description
from jobs.execution import WorkerProcess, execute
from jobs.stop import StopRequest

process = WorkerProcess(read_description(Path(sys.argv[1])), 1, lambda line: None, StopRequest(), lag_seconds=0.0)
nodes = process.description.nodes
print(json.dumps([execute(process, nodes[key]).value for (key,) in process.description.tasks]))
"""


def test_a_full_disk_is_its_own_class_and_leaves_nothing_torn(tmp_path: Path) -> None:
    """A real one of eight megabytes: the worker's last word still fits, no result is there, and the stage that is small goes through."""
    folder, disk = tmp_path / "trial", tmp_path / "trial" / "results"
    place = local_launch.workplace(folder)
    graph = fake_registry.make_graph({"failing": {"finetune vft 1 0": "write:20"}}, methods=("vft",), folds=("1",), seeds=2)
    disk.mkdir()
    large, small = (graph.nodes[run.key] for run in graph.runs)
    write_description(folder / "tasks.json", describe(place, graph, [[large.key], [small.key]]))
    kept = tmp_path / "kept"
    lines = [
        f"mount -t tmpfs -o size=8m tmpfs {disk}",
        f"{sys.executable} -c '{ON_A_SMALL_DISK}' {folder}/tasks.json",
        f"cp -r {disk} {kept}",
    ]
    command = [*namespace(), "sh", "-c", " && ".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["failed", "done"]
    layout = Layout(kept, "exp")
    attempt = layout.stage("finetune", large.key).attempt(1)
    outcome = read_outcome(attempt)
    assert outcome is not None
    assert (outcome.error, outcome.kind) == ("OSError", FailureClass.disk.name)
    assert "No space left on device" in outcome.message
    assert not attempt.output.exists()
    assert not list(kept.rglob(".*")), "no temporary file"
    facts = read_facts(graph, layout)
    assert (facts[large.key].failure, facts[large.key].stopped, facts[small.key].done) == ("disk", "", True)


def namespace() -> list[str]:
    """The command in front of another that lets it mount."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.fail("no way to mount a small disk here")
