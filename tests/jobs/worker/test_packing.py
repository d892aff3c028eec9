"""Concurrent stages: real packers with real children that run at the same time, compete for memory, are asked to stop, and are killed."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control.controller import read_facts, run_local
from jobs.control.facts import StageFacts
from jobs.experiment.config import Resources
from jobs.local.executor import LocalExecutor
from jobs.store.attempts import process_start
from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import Outcome, Result, attempt_numbers, read_claim, read_outcome, read_result
from jobs.worker.deaths import class_of_death, oom_kills
from jobs.worker.machine import Capacity
from jobs.worker.memory import CONTEXT_BYTES, Peak, Room, how_many_fit, larger_peak, measured_peak, peak_of
from jobs.worker.task import describe, write_description
from tests.jobs import fake_registry, local_launch
from tests.jobs.failure_trial import Trial
from tests.slurm_cluster import Cluster
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]
GB = 1 << 30
H200 = Room(128 * GB, 143_771 << 20, 16)


@pytest.mark.parametrize(
    ("peak", "room", "count"),
    [
        (Peak(2 * GB, 10 * GB), H200, 11),  # 0.9 x 140.4 GiB / (10 GiB and a context)
        (Peak(2 * GB, 1 * GB), H200, 16),  # no more than cores
        (Peak(20 * GB, 1 * GB), H200, 5),  # host memory
        (Peak(2 * GB, 100 * GB), H200, 1),
        (Peak(500 * GB, 200 * GB), H200, 1),  # one is always tried
        (Peak(2 * GB, 0), H200, 1),  # measured where there was no GPU
        (Peak(2 * GB, 10 * GB), replace(H200, gpu_bytes=None), 1),  # nobody says how large it is
        (Peak(2 * GB, 10 * GB), replace(H200, gpu_bytes=0), 16),  # here on cores
        (Peak(2 * GB, 0), Room(24 * GB, 0, 32), 10),
    ],
)
def test_how_many_stages_fit(peak: Peak, room: Room, count: int) -> None:
    """The scarcer of GPU and host memory decides, a tenth stays free; at most one per core, at least one."""
    assert how_many_fit(peak, room) == count


@given(st.integers(1, 200 * GB), st.integers(1, 200 * GB), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_stages_that_fit_stay_below_both_memories(host: int, gpu: int, threads: int) -> None:
    """Two or more stages stay below nine tenths of both memories."""
    room = Room(128 * GB, 141 * GB, threads)
    count = how_many_fit(Peak(host, gpu), room)
    assert count == 1 or (count * host <= 0.9 * room.host_bytes and count * (gpu + CONTEXT_BYTES) <= 0.9 * 141 * GB)


def test_peaks_are_read_from_provenance() -> None:
    """The maximum of each memory; a result without a number has no peak."""
    assert peak_of({"peak_rss_bytes": 5, "peak_gpu_bytes": 7}) == Peak(5, 7)
    assert peak_of({"peak_rss_bytes": 5}) == Peak(5, 0)
    assert peak_of({}) is None
    assert peak_of({"peak_rss_bytes": "much"}) is None
    assert larger_peak(Peak(5, 1), Peak(3, 2)) == Peak(5, 2)
    assert larger_peak(None, Peak(3, 2)) == Peak(3, 2)


@pytest.mark.parametrize(
    ("number", "stopping", "beside", "oom_killed", "failure"),
    [
        (signal.SIGKILL, False, 2, True, FailureClass.crowded),
        (signal.SIGKILL, False, 0, True, FailureClass.memory),
        (signal.SIGKILL, False, 2, False, FailureClass.node),
        (signal.SIGKILL, True, 2, True, FailureClass.interrupted),
        (signal.SIGSEGV, False, 2, True, FailureClass.code),
        (None, False, 2, True, FailureClass.code),
    ],
)
def test_class_of_a_dead_child(number: int | None, stopping: bool, beside: int, oom_killed: bool, failure: FailureClass) -> None:
    """SIGKILL means memory only if the out-of-memory killer was active, and counts against the stage only if it ran alone."""
    assert class_of_death(number, stopping=stopping, concurrent=beside, oom_killed=oom_killed) is failure


def test_the_kernel_counts_out_of_memory_kills() -> None:
    """On Linux there is a number, or none at all in some containers."""
    assert (oom_kills() or 0) >= 0


class Element:
    """Fine-tunings of one array element, and the process that computes them."""

    def __init__(self, folder: Path, behaviours: list[str], *, at_once: int, memory: int = 0) -> None:
        self.folder, self.at_once, self.memory = folder, at_once, memory
        self.place = local_launch.workplace(folder)
        self.corpus = folder / "corpus"
        failing = {f"finetune vft 1 {seed}": behaviour for seed, behaviour in enumerate(behaviours)}
        self.graph = fake_registry.make_graph({"failing": failing}, methods=("vft",), folds=("1",), seeds=len(behaviours))
        self.nodes = [self.graph.nodes[run.key] for run in self.graph.runs]
        self.layout = local_launch.desired(folder, {}).layout

    @contextmanager
    def start(self, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """The worker as Slurm starts it; whatever happens, it is gone afterwards."""
        file = self.layout.root / "tasks.json"
        description = describe(self.place, self.graph, [[node.key for node in self.nodes]])
        write_description(file, replace(description, at_once=self.at_once))
        values = {**os.environ, "SLURM_CPUS_PER_TASK": "6", **environment, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "jobs.worker.main", str(file), "0"]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory))) if self.memory else None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=values, cwd=ROOT, preexec_fn=limit
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, **environment: str) -> tuple[int, str]:
        """Exit code and log."""
        with self.start(**environment) as process:
            output, _ = process.communicate()
            return process.returncode, output

    def stage(self, number: int) -> StageFolder:
        return self.layout.stage("finetune", self.nodes[number].key)

    def result(self, number: int) -> Result:
        result = read_result(self.stage(number), self.nodes[number].key)
        assert result is not None
        return result

    def outcomes(self, number: int) -> list[Outcome]:
        folder = self.stage(number)
        return [outcome for each in attempt_numbers(folder) if (outcome := read_outcome(folder.attempt(each)))]

    def kinds(self) -> list[list[str]]:
        """The classes of all attempts without a result, stage by stage."""
        return [[outcome.kind for outcome in self.outcomes(number)] for number in range(len(self.nodes))]

    def facts(self) -> list[StageFacts]:
        found = read_facts(self.graph, self.layout)
        return [found[node.key] for node in self.nodes]

    def children(self) -> list[int]:
        """Pids of all that ever claimed an attempt."""
        folders = [self.stage(number) for number in range(len(self.nodes))]
        claims = [read_claim(folder.attempt(number)) for folder in folders for number in attempt_numbers(folder)]
        return [claim.pid for claim in claims if claim is not None]

    def begun(self) -> int:
        return len(fake_registry.count(self.corpus, "starts"))


@pytest.mark.slow
def test_concurrent_stages_give_the_same_results_as_sequential_ones(tmp_path: Path) -> None:
    """They really run at the same time; metrics and artifacts equal those of a plain worker; cores are divided."""
    packed = Element(tmp_path / "packed", ["meet:3"] * 5, at_once=3)
    plain = Element(tmp_path / "plain", [""] * 5, at_once=1)
    code, log = packed.run()
    assert (code, plain.run()[0]) == (0, 0)
    for number in range(5):
        ours, theirs = packed.result(number), plain.result(number)
        assert (ours.metrics, ours.artifacts, ours.confusion) == (theirs.metrics, theirs.artifacts, theirs.confusion)
        assert theirs.provenance["beside"] == 0
    facts = [packed.result(number).provenance for number in range(5)]
    assert max(fact["beside"] for fact in facts) == 2
    assert [fact["threads"] for fact in facts[:3]] == [2, 2, 2]
    assert len(set(packed.children())) == 5, "each in a process of its own"
    named = re.compile(r"[0-9: -]{19} finetune vft fold 1 seed [0-9] \[[0-9a-f]{8}\]")
    assert all(named.match(line) for line in log.splitlines()), log
    assert len(log.splitlines()) == 15


@pytest.mark.slow
def test_stages_with_a_result_are_not_computed_again(tmp_path: Path) -> None:
    """A second array task finds every result: no attempt is claimed."""
    element = Element(tmp_path, ["", ""], at_once=2)
    assert element.run()[0] == 0
    code, log = element.run()
    assert code == 0
    assert log.count("had a result already") == 2
    assert [attempt_numbers(element.stage(number)) for number in range(2)] == [(1,), (1,)]


@pytest.mark.slow
def test_a_crowded_stage_is_retried_alone_free_of_charge(tmp_path: Path) -> None:
    """Four need 300 of 1000: one runs out of memory and succeeds alone, without relief and without a counted failure."""
    element = Element(tmp_path, ["card:300"] * 5, at_once=4)
    (element.corpus / "card").write_text("1000")
    code, log = element.run()
    assert code == 0, log
    crowded = [number for number, kinds in enumerate(element.kinds()) if kinds]
    assert crowded
    for number in crowded:
        assert element.kinds()[number] == [FailureClass.crowded.name]
        assert element.result(number).provenance["beside"] == 0
        assert element.result(number).provenance["relief"] == 0
    assert all(fact.done and fact.failures == 0 for fact in element.facts())
    assert "out of memory beside other stages; retried alone, at most 2 others at once" in log


def test_a_crowded_stage_runs_alone_in_later_tasks_too(tmp_path: Path) -> None:
    """In the next array task it starts when the others have ended, and no stage starts beside it."""
    element = Element(tmp_path, ["card:400"] * 3, at_once=3)
    (element.corpus / "card").write_text("1000")
    with element.start() as process:
        until(lambda: (element.corpus / "refused").exists())
        until(lambda: any(element.kinds()))
        process.kill()
    before = element.facts()
    number = next(number for number, kinds in enumerate(element.kinds()) if kinds)
    if not before[number].done:
        assert (before[number].request.relief, before[number].stopped) == (0, "")
    code, log = element.run()
    assert code == 0, log
    assert element.result(number).provenance["beside"] == 0


def test_a_stage_that_needs_too_much_alone_fails_with_memory(tmp_path: Path) -> None:
    """With a real limit on every child: crowded first, memory when alone; then half the micro-batch and more memory. The others succeed."""
    element = Element(tmp_path, ["eat:6000", "meet:2", "meet:2"], at_once=3, memory=4 * GB)
    code, log = element.run()
    assert code == 1, log
    assert element.kinds()[0] == [FailureClass.crowded.name, FailureClass.memory.name]
    assert [fact.done for fact in element.facts()] == [False, True, True]
    request = element.facts()[0].request
    assert request.relief == 1
    assert element.outcomes(0)[1].error == "MemoryError"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, "interrupted"), (signal.SIGUSR1, "time_limit")])
def test_a_stop_signal_reaches_every_child(tmp_path: Path, number: signal.Signals, kind: str) -> None:
    """Each writes a checkpoint and an outcome, the fourth does not start; the next array task resumes them."""
    element = Element(tmp_path, ["sleep:60"] * 4, at_once=3)
    with element.start() as process:
        until(lambda: element.begun() == 3)
        process.send_signal(number)
        assert process.wait() == 3
    assert element.kinds() == [[kind]] * 3 + [[]]
    assert all((element.stage(each).checkpoint / "state.json").is_file() for each in range(3))
    for each in range(4):
        element.stage(each).checkpoint.mkdir(parents=True, exist_ok=True)
        (element.stage(each).checkpoint / "state.json").touch()
    assert element.run()[0] == 0
    assert [element.result(each).attempt for each in range(4)] == [2, 2, 2, 1]


@pytest.mark.slow
def test_no_child_outlives_the_packer(tmp_path: Path) -> None:
    """After SIGKILL of the packer the kernel kills its children, also those that ignore signals; the stages are retried."""
    element = Element(tmp_path, ["hang:1", "hang:1", ""], at_once=2)
    with element.start() as process:
        until(lambda: element.begun() == 2)
        children = element.children()
        process.kill()
        process.wait(10)
        until(lambda: not any(process_start(pid) for pid in children))
    assert element.kinds() == [[], [], []]
    assert element.run()[0] == 0
    assert [element.result(each).attempt for each in range(3)] == [2, 2, 1]


def test_a_child_that_is_killed_or_fails_does_not_affect_the_others(tmp_path: Path) -> None:
    """Killed by a user: class node, recorded at once. An exception: class code. Exit without an outcome: class code. Exit code 1."""
    element = Element(tmp_path, ["kill:1", "fail:1", "exit:1", "", ""], at_once=2)
    code, log = element.run()
    assert code == 1
    assert element.kinds() == [[FailureClass.node.name], [FailureClass.code.name], [FailureClass.code.name], [], []]
    assert [fact.done for fact in element.facts()] == [False, False, False, True, True]
    assert "its process was killed by signal 9" in log
    outcome = element.outcomes(2)[0]
    assert (outcome.error, outcome.ending.value) == ("exit7", "failed")


def test_the_first_stage_is_measured_alone(tmp_path: Path) -> None:
    """at_once=0: the first runs alone; by its peak the other two fit at the same time."""
    element = Element(tmp_path, ["", "meet:2", "meet:2"], at_once=0)
    assert element.run(SLURM_CPUS_PER_TASK="2")[0] == 0
    beside = [element.result(number).provenance["beside"] for number in range(3)]
    assert beside == [0, 1, 1]
    peak = measured_peak((element.stage(number), element.nodes[number].key) for number in range(3))
    assert peak is not None
    assert peak.host_bytes == max(element.result(number).provenance["peak_rss_bytes"] for number in range(3))


def test_the_memory_requested_from_slurm_is_the_limit(tmp_path: Path) -> None:
    """If one stage fills it, no other runs beside it."""
    element = Element(tmp_path, [""] * 3, at_once=0)
    assert element.run(SLURM_MEM_PER_NODE="20")[0] == 0
    assert [element.result(number).provenance["beside"] for number in range(3)] == [0, 0, 0]


def local(folder: Path, at_once: int, gpu_bytes: int = 0) -> LocalExecutor:
    """A machine with one GPU that does not exist, for stages that do not use it."""
    resources = Resources(cpus=1, gpus=1, memory_gb=0.1, minutes=1, at_once=at_once)
    layout = local_launch.desired(folder, {}).layout
    return LocalExecutor(local_launch.workplace(folder), layout, lambda stage: resources, Capacity(4, ("0",), 8.0, gpu_bytes))


def grid(folder: Path, behaviours: Mapping[int, str], executor: LocalExecutor) -> dict[str, StageFacts]:
    recipe: dict[str, object] = {"failing": {f"finetune vft 1 {seed}": behaviour for seed, behaviour in behaviours.items()}}
    desired = local_launch.desired(folder, recipe)
    graph = fake_registry.make_graph(recipe, methods=("vft",), folds=("1",), seeds=len(behaviours))
    with executor:
        report = run_local(replace(desired, graph=graph, refill=lambda generations: graph), executor)
    assert report.complete
    return dict(report.facts)


def test_local_tasks_share_a_gpu(tmp_path: Path) -> None:
    """Two run at the same time on the only GPU."""
    grid(tmp_path, dict.fromkeys(range(3), "meet:2"), local(tmp_path, 2))


def test_a_crowded_local_task_is_retried_on_a_gpu_of_its_own(tmp_path: Path) -> None:
    """Without relief and without a counted failure; from then on fewer share."""
    (fake_registry.make_corpus(tmp_path / "corpus") / "card").write_text("1000")
    executor = local(tmp_path, 3)
    facts = grid(tmp_path, dict.fromkeys(range(4), "card:400"), executor)
    results = [read_result(executor.layout.stage("finetune", key), key) for key in facts]
    again = [result for result in results if result is not None and result.attempt == 2]
    assert again
    assert all(result.provenance["beside"] == 0 and result.provenance["relief"] == 0 for result in again)
    assert all(fact.failures == 0 for fact in facts.values())


@pytest.mark.slow
@pytest.mark.parametrize(("gpu_bytes", "behaviour", "beside"), [(0, "meet:2", 3), (100 * GB, "", 0)])
def test_the_first_local_task_is_measured_alone(tmp_path: Path, gpu_bytes: int, behaviour: str, beside: int) -> None:
    """Its peak decides how many share from then on; if it used no GPU although there is one, the peak is useless, and none share."""
    executor = local(tmp_path, 0, gpu_bytes)
    facts = grid(tmp_path, {0: "", 1: behaviour, 2: behaviour}, executor)
    results = [read_result(executor.layout.stage("finetune", key), key) for key in facts]
    assert [result.provenance["beside"] for result in results if result is not None] == [0, beside, beside]


@pytest.mark.slurm
def test_an_array_task_of_four_runs_computes_two_at_once(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """One job with a time limit for two rounds; two run at the same time; a failure does not stop the rest."""
    trial = Trial(tmp_path, {0: "meet:2", 1: "meet:2", 2: "fail:9", 3: ""}, seeds=4, runs_per_task=4, at_once=2, minutes=3)
    trial.desired = replace(trial.desired, runs_per_task={"finetune": 4})
    trial.settle()
    jobs = {claim.slurm_job for slot in range(4) for claim in trial.claims(slot)}
    assert len(jobs) == 1
    assert "#SBATCH --time=6\n" in trial.script(jobs.pop())
    assert [trial.result(slot) is not None for slot in range(4)] == [True, True, False, True]
    assert trial.classes(2) == [FailureClass.code.name]
    assert len({claim.pid for slot in range(4) for claim in trial.claims(slot)}) == 4
