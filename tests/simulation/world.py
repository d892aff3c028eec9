"""An experiment on a simulated cluster, its controllers, and the invariants that must hold after every event.

The controllers run production code on real records in a folder. The world records independently what was created and executed and which
failures occurred, and compares: no invariant relies on the production code that it checks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from jobs.control.controller import Desired, Report, reconcile
from jobs.control.estimates import Bounds
from jobs.control.facts import Asked, needed_keys
from jobs.control.failure_policy import COMMUNICATION_RETRIES, DISK_RETRIES, MAX_FAILED_STARTS, MAX_LOST, MEMORY_RETRIES, STORAGE_RETRIES
from jobs.control.result_index import ResultIndex
from jobs.errors import SlurmUnavailableError
from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite, StageResources, resources_of
from jobs.experiment.graph import Graph, Slot, build_graph, seeds_of_slots
from jobs.slurm.executor import SlurmArrays
from jobs.slurm.submissions import SETTLE_SECONDS, SubmissionBook, base_name
from jobs.store.cancellations import record_cancellation
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import Claim, read_result
from jobs.store.snapshot import Snapshot
from jobs.worker.task import Description, Workplace, read_description
from tests.jobs.fake_registry import REGISTRY
from tests.simulation.crashes import TALLY, Killed, Process, current, instrumented, kill, running
from tests.simulation.slurm import OTHER, OWNER, Accounting, Array, Clock, Element, Reply, SimulatedClient, SimulatedSlurm
from tests.simulation.worker import Execution, SimulatedWorker, stamp

ROOT = Path(__file__).resolve().parents[2]
COSTLY = (
    FailureClass.time_limit,
    FailureClass.memory,
    FailureClass.communication,
    FailureClass.disk,
    FailureClass.code,
    FailureClass.refused,
)
FINAL = (FailureClass.code, FailureClass.refused)
RETRIES = {
    FailureClass.memory: MEMORY_RETRIES,
    FailureClass.communication: COMMUNICATION_RETRIES,
    FailureClass.disk: DISK_RETRIES,
    FailureClass.storage: STORAGE_RETRIES,
}
RELIABLE = (Accounting.fine, Accounting.slow)
STAGES = ("states", "cluster", "tapt", "ptapt", "finetune")
TICK = 1 / 64
ROUND_SECONDS = 70.0  # between passes while everything recovers: more than the settle time
LAST_ROUNDS = 60


@dataclass(frozen=True)
class Shape:
    """The size of the experiment and the cluster."""

    methods: tuple[str, ...] = ("vft", "tapt", "ptapt")
    folds: int = 2
    seeds: int = 2
    runs_per_task: int = 1
    max_submit: int = 0
    max_array_size: int = 1001
    nodes: int = 3
    same_machine: bool = True  # controllers can see whether another one's process lives
    policy: Policy = field(default_factory=lambda: Policy(rounds=2, max_seeds=3, max_attempts=6, max_failures=8))


@dataclass
class Controller:
    """One controller process that makes passes; a new one replaces it when it is killed."""

    name: str
    executor: SlurmArrays
    token: str
    index: ResultIndex
    graph: Graph  # with the runs that filled the slots when it last looked


class World:
    """The whole simulation. `folder` must be empty."""

    def __init__(self, folder: Path, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.clock = Clock()
        self.slurm = SimulatedSlurm(
            self.clock, nodes=self.shape.nodes, max_submit=self.shape.max_submit, max_array_size=self.shape.max_array_size
        )
        self.slurm.created = self._created
        self.slurm.begun = self._begun
        self.slurm.killed = self._killed
        self.layout = Layout(folder / "results", "lab")
        site = SlurmSite(max_submit=self.shape.max_submit)
        resources = {"default": StageResources(cpus=1, gpus=0, memory_gb=4, minutes=60, runs_per_task=self.shape.runs_per_task)}
        self.experiment = Experiment(
            name="lab", corpus="fake", cluster=Cluster.slurm, policy=self.shape.policy, slurm=site, resources=resources
        )
        self.layout.folder.mkdir(parents=True)
        (folder / "corpus").mkdir()
        self.place = Workplace("none:none", str(self.layout.root), "lab", "fake", str(folder / "corpus"), "d1", launched=self.clock())
        self.snapshot = Snapshot(ROOT, ROOT, "0" * 16, {}, "", (), ())
        self.graph = self._graph({})
        self.since = self.clock()
        self.workers: dict[str, SimulatedWorker] = {}
        self.executions: list[Execution] = []
        self.alike: dict[str, tuple[float, str]] = {}  # key -> share of UA and why it diverged: the same whenever it is computed
        self.next_ua: tuple[float, str] = (0.6, "")
        self.published: Counter[str] = Counter()
        self.spoilt: Counter[str] = Counter()  # results that were damaged
        self.cancelled: dict[str, float] = {}  # key -> when, by the program, and not launched since
        self.cancelled_by_hand: dict[str, float] = {}
        self.perhaps_cancelled: set[str] = set()
        self.all_cancelled = False
        self.by_hand_unsure = False  # accounting may not have told
        self.intended: dict[int, float] = {}  # array -> when its submission was begun
        self.keys_of: dict[int, tuple[tuple[str, ...], ...]] = {}
        self.asked: dict[int, Asked | None] = {}
        self.dead: set[str] = set()
        self.interleaved = 0  # how many passes stand still now while somebody else acts, or have
        self.trouble = False  # Slurm was unreachable at some time in this pass
        self.generations: dict[Slot, int] = {}
        self.points = 0  # of the last pass
        self._tokens = 0
        self._pids = 10
        self._stack = contextlib.ExitStack()
        self.controllers = [self._controller("A"), self._controller("B")]

    # ---- life

    def __enter__(self) -> World:
        patched: list[tuple[str, Any]] = [
            ("jobs.slurm.executor.take_snapshot", lambda source, layout: self.snapshot),
            ("jobs.slurm.submissions.render_script", lambda job, site, templates: "#!/bin/bash\n"),
            # Names hold a digest of the folder, which is another one each time: an example must do the same when it is run again.
            ("jobs.slurm.submissions.base_name", lambda layout, batch: base_name(Layout(Path("/results"), layout.experiment), batch)),
            # What a process remembers of results dies with it, and is stored at every change: the thousands that it is for are not here.
            ("jobs.control.controller.index_of", self._index_of_current),
            ("jobs.control.observe.index_of", self._index_of_current),
            ("jobs.control.result_index.ENOUGH", 1),
            ("jobs.slurm.submissions.process_start", lambda pid: self._token_of_current()),
            ("jobs.slurm.submissions.claim_alive", self._writer_alive),
            ("jobs.slurm.submissions.sbatch_under_way", lambda scripts: any(each.sbatch_runs for each in self.slurm.under_way)),
        ]
        for name, replacement in patched:
            self._stack.enter_context(mock.patch(name, replacement))
        self._stack.enter_context(instrumented())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # ---- what people and the cluster do

    def run_pass(self, which: int = 0, *, at: int = 0, kind: str = "", act: Callable[[], None] | None = None) -> Report | None:
        """One pass of a controller, with something happening at one of its points. None if it died or Slurm did not answer."""
        controller = self.controllers[which]
        TALLY["passes"] += 1
        calm = act is None
        process = Process(controller.name, at, kind, act)
        self.clock.now += TICK  # no two passes begin at the same moment
        began = self.clock()
        self.trouble = not self.slurm.reachable
        try:
            with running(process):
                try:
                    report = reconcile(self.desired(controller.graph), controller.executor)
                finally:
                    self.points = len(process.points)
        except Killed:
            TALLY["killed"] += 1
            self.dead.add(controller.token)
            self.controllers[which] = self._controller(controller.name)
            return None
        except SlurmUnavailableError:
            if calm and not self.trouble:
                raise
            return None
        TALLY["passes to the end"] += 1
        controller.graph = report.graph
        self._check_report(report, calm=calm, began=began)
        return report

    def kill_at(self, which: int, at: int, kind: str = "") -> None:
        """A pass that dies at one of its points, if it has so many."""
        self.run_pass(which, at=at, kind=kind, act=kill)

    def interleave(self, which: int, at: int, act: Callable[[], None], kind: str = "") -> int:
        """Another process or user acts in the middle of a pass. Returns how many points the pass had."""
        self.interleaved += 1
        try:
            report = self.run_pass(which, at=at, kind=kind, act=act)
        finally:
            self.interleaved -= 1
        if report is not None and self.slurm.reachable:
            for key in set(report.submitted) & self.cancelled.keys():
                for element in self.live_holders(key):
                    wanted = self.cancelled.keys() >= set(self.keys_of[element.job][element.index])
                    assert element.state != "PENDING" or not wanted, f"{element.name} waits although {self.name(key)} is cancelled"
        return self.points

    def advance(self, seconds: float) -> None:
        """Advance the clock; living processes touch their heartbeats."""
        self.clock.now += seconds
        self.slurm.moved_on()
        for worker in self.workers.values():
            worker.beat()

    def start(self, count: int = 1) -> list[SimulatedWorker]:
        """Slurm starts what may start."""
        begun: list[SimulatedWorker] = []
        for _ in range(count):
            eligible = self.slurm.eligible()
            if not eligible:
                break
            self.slurm.start(eligible[0])
            begun.append(self.workers[eligible[0].name])
        return begun

    def finish(self, worker: SimulatedWorker) -> None:
        """A worker finishes all its stages, and its element ends."""
        worker.run()
        self.leave(worker)

    def leave(self, worker: SimulatedWorker, *, completing: bool = False) -> None:
        """End the element of a worker that has finished."""
        if worker.over and self.workers.get(worker.job) is worker:
            element = self.slurm.find(worker.job)
            self.slurm.end(element, "FAILED" if worker.exit_code else "COMPLETED", completing=completing)

    def cancel(self, keys: Collection[str] | None = None) -> None:
        """What `cancel` does: first the record, then Slurm."""
        chosen = set(self.graph.nodes) if keys is None else set(keys)
        self.all_cancelled |= keys is None
        record_cancellation(self.layout, keys, self.clock())
        for key in chosen:
            self.cancelled[key] = self.clock()
        executor = self._controller("cancel").executor
        with contextlib.suppress(SlurmUnavailableError):
            if keys is None:
                executor.cancel_all()
            else:
                executor.cancel(keys)
                held = executor.in_flight().items()
                SimulatedClient(self.slurm).cancel({flight.job for key, flight in held if key in chosen and self._only(flight.job, chosen)})

    def _only(self, job: str, keys: Collection[str]) -> bool:
        """Whether an element holds none but these stages."""
        number, _, index = job.partition("_")
        return number.isdigit() and set(self.keys_of[int(number)][int(index)]) <= set(keys)

    def scancel_by_hand(self, element: Element, *, heard: bool) -> None:
        """The owner cancels one element with scancel."""
        worker = self.workers.get(element.name)
        if heard and worker is not None:
            worker.stop()
        self.by_hand_unsure |= self.slurm.accounting not in RELIABLE
        self.slurm.cancel([element.name], OWNER)
        for key in self.keys_of[element.job][element.index]:
            self.perhaps_cancelled.add(key)
            if not self._done(key):
                self.cancelled_by_hand[key] = self.clock()

    def scancel_by_another(self, element: Element, *, heard: bool) -> None:
        """An operator cancels one element that runs: nothing of it is given up."""
        worker = self.workers.get(element.name)
        if heard and worker is not None:
            worker.stop()
        self.slurm.cancel([element.name], OTHER)

    def launch(self) -> None:
        """`grid` again."""
        self.clock.now += 1
        self.since = self.clock()
        self.clock.now += 1
        self.cancelled.clear()
        self.cancelled_by_hand.clear()
        self.perhaps_cancelled.clear()
        self.all_cancelled = False
        self.place = replace(self.place, launched=self.since)
        self.controllers = [self._controller(each.name) for each in self.controllers]  # those of former launches refuse to go on

    def launch_with_seeds(self, seeds: int) -> None:
        """`grid` again, with another number of slots in each cell; all controllers restart."""
        self.shape = replace(self.shape, seeds=seeds)
        self._graphs.clear()
        self.graph = self._graph({})
        self.generations.clear()  # other runs, another judgement
        self.launch()

    def spoil(self, key: str, how: int) -> None:
        """Damage or remove a result on disk."""
        folder = self.layout.stage(self.graph.nodes[key].stage, key)
        result = read_result(folder, key)
        if result is None:
            return
        weights = folder.attempt(result.attempt).output / "weights"
        if how == 0:
            folder.result.write_text(folder.result.read_text()[:40])
        elif how == 1:
            weights.unlink(missing_ok=True)
        else:
            weights.write_text("other bytes")
        stamp(folder.result, self.clock())
        self.spoilt[key] += 1

    # ---- questions

    def desired(self, graph: Graph) -> Desired:
        """The desired state, starting with this graph."""
        packing = {"finetune": self.shape.runs_per_task}
        bounds = Bounds({stage: resources_of(self.experiment, stage) for stage in STAGES}, siblings=2)
        return Desired(graph, self.layout, self.shape.policy, self.since, packing, self._graph, clock=self.clock, bounds=bounds)

    def running(self) -> list[SimulatedWorker]:
        """Living workers, in the order of their start."""
        return list(self.workers.values())

    def live_holders(self, key: str) -> list[Element]:
        """Elements in the queue that are to compute a stage."""
        return [element for array, element in self.slurm.elements() if element.live and key in self.keys_of[array.number][element.index]]

    def recover(self) -> None:
        """End all faults."""
        self.slurm.updates_work, self.slurm.back_at = True, 0.0
        self.slurm.reply = Reply.given
        self.slurm.accounting = Accounting.fine if self.slurm.accounting is not Accounting.absent else Accounting.absent
        for node in self.slurm.up:
            self.slurm.up[node] = True
        for _, element in self.slurm.elements():
            element.held = ""

    def settle(self) -> Report:
        """Passes without faults, the clock advancing, until nothing is left to do; AssertionError if that takes too long."""
        self.recover()
        self.next_ua = (0.6, "")
        report: Report | None = None
        for _ in range(LAST_ROUNDS):
            self.advance(ROUND_SECONDS)
            report = self.run_pass(0)
            assert report is not None
            pauses = [report.facts[key].not_before for key in report.plan.deferred if report.facts[key].not_before]
            if pauses and not (report.plan.waiting or report.submitted):
                self.advance(max(0.0, min(pauses) - self.clock()))
            if report.settled and not list(self.slurm.elements()) and not self.slurm.under_way:
                return report
            for _ in range(4 * len(self.graph.nodes)):
                begun = self.start(1)
                waiting = [worker for worker in self.running() if worker not in begun]
                for worker in (*waiting, *begun):
                    self.finish(worker)
                if not begun:
                    break
        assert report is not None
        raise AssertionError(f"not settled after {LAST_ROUNDS} rounds: {self._describe(report)}")

    def finish_everything(self) -> None:
        """Everything recovers; every run without a reason to be missing gets its result, and after another launch all do."""
        report = self.settle()
        self.check()
        self.check_complete(report)
        if report.complete:
            return
        self.launch()
        report = self.settle()
        self.check()
        self.check_complete(report)
        assert not report.plan.held_or_cancelled, (
            f"launched again, and still {[report.plan.reasons[key] for key in report.plan.held_or_cancelled]}"
        )
        for key in report.plan.given_up:
            assert report.facts[key].diverged, f"launched again, and still: {report.plan.reasons[key]}"

    def set_accounting(self, accounting: Accounting) -> None:
        """Set how sacct answers from now on."""
        self.slurm.accounting = accounting
        self.by_hand_unsure |= accounting not in RELIABLE and bool(self.cancelled_by_hand)

    # ---- what must hold

    def check(self) -> None:
        """Invariants that hold after every step."""
        alive = Counter(execution.key for execution in self.executions if execution.alive)
        running = {(array.name, array.number) for array, element in self.slurm.elements() if element.state == "RUNNING"}
        assert len({name for name, _ in running}) == len(running), f"two arrays of one name run: {sorted(running)}"
        for execution in self.executions:
            stopped = self.cancelled.get(execution.key)
            assert stopped is None or execution.looked <= stopped, f"{self.name(execution.key)} begins although it is cancelled"
        assert all(count == 1 for count in alive.values()), f"executed twice at once: {alive}"
        attempts = Counter((execution.key, execution.attempt) for execution in self.executions)
        assert all(count == 1 for count in attempts.values()), f"an attempt has two executions: {attempts}"
        for key, count in self.published.items():
            assert count <= 1 + self.spoilt[key], f"{self.name(key)} has been computed {count} times"

    def check_complete(self, report: Report) -> None:
        """After everything has recovered and settled: every missing result has a reason."""
        plan = report.plan
        for key in plan.given_up:
            assert plan.reasons.get(key), f"{self.name(key)} given up without a reason"
            blamed = [each for each in self.executions if each.key == key and not each.result]
            alone = bool(report.facts[key].diverged) or bool(blamed) or self._silent_ends(key) > 0 or self.spoilt[key] > 0
            assert alone, f"{self.name(key)} given up ({plan.reasons[key]}) although nothing went wrong with it"
        for key in plan.held_or_cancelled:
            assert plan.reasons.get(key), f"{self.name(key)} stayed without a reason"
            held = plan.reasons[key].startswith("held")
            assert held or self.all_cancelled or key in self.cancelled or key in self.perhaps_cancelled, (
                f"{self.name(key)} stayed: {plan.reasons[key]}"
            )
        hopeless = {*plan.given_up, *plan.held_or_cancelled, *plan.blocked}
        for key in plan.blocked:
            assert any(parent in hopeless for parent in report.graph.nodes[key].upstream.values()), f"{self.name(key)} blocked by nothing"
        for key in self.cancelled:
            if key in report.graph.nodes and not self._done(key):
                assert key in hopeless or key not in needed_keys(report.graph, report.facts), f"{self.name(key)} is not cancelled any more"
        assert report.complete == (not hopeless)
        for run in report.graph.runs:
            if run.key not in hopeless:
                assert report.facts[run.key].done
                assert self._done(run.key), f"{self.name(run.key)} counts as done"

    def name(self, key: str) -> str:
        node = self.graph.nodes.get(key)
        return node.name if node else key

    def _check_report(self, report: Report, *, calm: bool, began: float) -> None:
        plan, graph = report.plan, report.graph
        for run in (*graph.superseded, *graph.runs):
            if run.key not in self.graph.nodes:
                self.graph = graph
        planned = [key for batch in plan.batches for key in batch.keys]
        places = [*plan.reused, *plan.waiting, *planned, *plan.deferred, *plan.blocked, *plan.given_up, *plan.held_or_cancelled]
        needed = needed_keys(graph, report.facts)
        assert sorted(places) == sorted(needed), "a stage is lost, or planned twice"
        slots = Counter((run.method, run.fold, run.slot) for run in graph.runs)
        assert set(slots.values()) <= {1}, "a slot has two runs"
        assert len(slots) == len(self.shape.methods) * self.shape.folds * self.shape.seeds
        seeds = Counter((run.method, run.fold, run.seed) for run in (*graph.runs, *graph.superseded))
        assert set(seeds.values()) <= {1}, "a seed is in two slots"
        for run in graph.runs:
            assert run.generation < self.shape.policy.max_seeds
        for key in (*plan.given_up, *plan.held_or_cancelled):
            assert plan.reasons.get(key), f"{self.name(key)} has no reason"
        if calm:
            self._check_doubles()
            self._check_needed(report)
            for key in plan.waiting:
                assert key in report.in_flight or report.facts[key].awaited
            for key, fact in report.facts.items():
                assert fact.done <= (self.published[key] > 0), f"{self.name(key)} counts as done and is not"
            if not sum(self.spoilt.values()):
                for slot, generation in self.generations.items():
                    now = report.judgements.generations.get(slot, 0)
                    assert now >= generation, f"{slot} went back from seed {generation} to {now}"
            self.generations = dict(report.judgements.generations)
            for key in report.submitted:
                if key in report.in_flight and not report.in_flight[key].job.startswith("?"):
                    assert self.live_holders(key) or not self.slurm.find(report.in_flight[key].job).live
            for run in graph.runs:
                if self._done(run.key) and not report.facts[run.key].diverged:
                    assert run.key in plan.reused, f"{self.name(run.key)} has a result and is not taken for done"

    def _check_doubles(self) -> None:
        """After an undisturbed pass: no other element computes what a pending one is to compute."""
        holding: dict[tuple[str, ...], list[Element]] = {}
        for array, element in self.slurm.elements():
            if element.live:
                holding.setdefault(self.keys_of[array.number][element.index], []).append(element)
        for elements in holding.values():
            waiting = [element.name for element in elements if element.state == "PENDING"]
            assert len(elements) == 1 or not waiting, f"{waiting} wait for what {len(elements)} elements hold"

    def _check_needed(self, report: Report) -> None:
        """After an undisturbed pass: every pending element is still needed."""
        wanted = {*report.plan.waiting, *report.submitted}
        wanted |= {parent for key in report.plan.waiting for parent in report.graph.nodes[key].upstream.values()}
        for array, element in self.slurm.elements():
            if element.state == "PENDING":
                keys = self.keys_of[array.number][element.index]
                assert wanted & set(keys), f"{element.name} waits although nothing needs {', '.join(map(self.name, keys))}"

    def _done(self, key: str) -> bool:
        node = self.graph.nodes.get(key)
        return node is not None and read_result(self.layout.stage(node.stage, key), key) is not None

    def _created(self, array: Array) -> None:
        """Check that a new array was rightly submitted."""
        description = self._description(array.name)
        self.keys_of[array.number] = description.tasks
        record = SubmissionBook(self.layout).find(array.name)
        self.intended[array.number] = record.created if record is not None else 0.0
        TALLY["arrays"] += 1
        asked = self.asked[array.number] = record.asked if record is not None else None
        TALLY["arrays that ask for less than configured"] += asked is not None and asked.less_time and asked.less_memory
        namesakes = [each for each in self.slurm.arrays.values() if each.name == array.name and each is not array]
        double = any(element.queued for each in namesakes for element in each.elements)
        landing = self.slurm.landing
        if landing is not None:  # the sbatch of a process that is dead, or has given it up
            assert landing.very_late or not double, f"{array.name} comes in late, and was submitted again"
            return
        if not self.interleaved:
            assert not double, f"{array.name} is submitted again while it is in the queue"
        late = [each for each in self.slurm.under_way if each.name == array.name and not each.very_late]
        assert not late, f"{array.name} is submitted again while its sbatch is under way"
        failures = self._failures(description.nodes)
        for element, keys in zip(array.elements, description.tasks, strict=True):
            for key in keys:
                if self.interleaved:  # it was decided before whatever has happened since
                    continue
                others = [other for other in self.live_holders(key) if other is not element]
                assert not others, f"{self.name(key)} is submitted again while {others[0].name} holds it"
                self._check_warranted(key, description, failures, self.name(key))
                short = [each for each in self.executions if each.key == key and each.said is FailureClass.memory and self._blamed(each)]
                assert not (short and asked and asked.less_memory), f"{self.name(key)} is short of memory, and asks for no more"

    def _blamed(self, execution: Execution) -> bool:
        """Whether an attempt requested less than configured and may have failed for that: then it does not count."""
        asked = self.asked.get(int(execution.job.partition("_")[0]))
        if asked is None or execution.superseded:
            return False
        return (asked.less_time and execution.said is FailureClass.time_limit) or (
            asked.less_memory and execution.said in (FailureClass.memory, None)
        )

    def _check_warranted(self, key: str, description: Description, failures: Mapping[str, Counter[FailureClass]], name: str) -> None:
        assert not self.all_cancelled, f"{name} is submitted although everything is cancelled"
        assert key not in self.cancelled, f"{name} is submitted although it is cancelled"
        if key in self.cancelled_by_hand and not self.by_hand_unsure:
            raise AssertionError(f"{name} is submitted although its owner cancelled it")
        mine = [each for each in self.executions if each.key == key]
        assert not any(each.alive for each in mine), f"{name} is submitted while it is executed"
        recent = [each for each in mine if each.begun >= self.since and not (each.result or each.superseded or self._blamed(each))]
        assert not any(each.said in FINAL for each in recent), f"{name} is tried again after {FailureClass.code}"
        assert not any(each.said is FailureClass.divergence for each in mine), f"{name} is tried again after it diverged"
        for failure, retries in RETRIES.items():
            assert failures[key][failure] <= retries, f"{name} is tried again after {failures[key][failure]} times {failure.value}"
        lost = itertools.takewhile(lambda each: each.said in (None, FailureClass.interrupted) and not each.progress, reversed(recent))
        assert len(list(lost)) <= MAX_LOST, f"{name} is tried again although it gets lost again and again"
        silent = self._silent_ends(key, self.since)
        assert silent < MAX_FAILED_STARTS + 2, f"{name} is tried again although {silent} jobs ended without having begun"
        fruitless = [each for each in recent if not each.progress and each.said is not FailureClass.storage]
        assert len(fruitless) < self.shape.policy.max_attempts, f"{name}: {len(fruitless)} attempts in vain, and another"
        told = failures[key][FailureClass.memory]
        assert description.relief >= min(told, MEMORY_RETRIES), f"{name} is given no relief after memory ran out {told} times"
        undone = [counts for other, counts in failures.items() if not self._done(other)]  # what was overcome costs nothing
        spent = sum(count for counts in undone for failure, count in counts.items() if failure in COSTLY)
        if sum(failures[key][failure] for failure in COSTLY):
            assert spent < self.shape.policy.max_failures, f"{name} is tried again, the budget of the experiment being spent"

    def _failures(self, keys: Iterable[str]) -> dict[str, Counter[FailureClass]]:
        """Key -> classes of failure that its attempts since the launch recorded, also for these keys."""
        found: dict[str, Counter[FailureClass]] = {key: Counter() for key in keys}
        for each in self.executions:
            at_limit = each.said is FailureClass.time_limit and each.progress  # costs nothing
            if each.said is not None and each.begun >= self.since and not (each.superseded or at_limit or self._blamed(each)):
                found.setdefault(each.key, Counter())[each.said] += 1
        return found

    def _silent_ends(self, key: str, since: float = 0.0) -> int:
        """How many elements of a stage have left the queue since then without starting any of their stages."""
        jobs = {execution.job for execution in self.executions}
        return sum(
            bool(element.begun) and not element.queued and element.name not in jobs and key in self.keys_of[array.number][element.index]
            for array in self.slurm.arrays.values()
            for element in array.elements
            if array.created >= since
        )

    def _describe(self, report: Report) -> str:
        plan = report.plan
        lines = [f"waiting {len(plan.waiting)}, planned {len(plan.batches)}, deferred {len(plan.deferred)}, in flight {report.in_flight}"]
        lines += [f"{element.name} {element.state} waits {element.waits!r}" for _, element in self.slurm.elements()]
        lines += [str(record) for record in SubmissionBook(self.layout).open()]
        return "\n".join(lines)

    # ---- inside

    @functools.cached_property
    def _graphs(self) -> dict[tuple[tuple[Slot, int], ...], Graph]:
        return {}

    def _graph(self, generations: Mapping[Slot, int]) -> Graph:
        shape, known = self.shape, tuple(sorted(generations.items()))
        if known not in self._graphs:
            folds = [str(number) for number in range(1, shape.folds + 1)]
            slots = seeds_of_slots(shape.methods, folds, seeds=shape.seeds, first_seed=0, generations=generations)
            self._graphs[known] = build_graph(
                REGISTRY, {}, corpus="fake", corpus_digest="d1", methods=shape.methods, folds=folds, seeds=slots
            )
        return self._graphs[known]

    def _controller(self, name: str) -> Controller:
        self._tokens += 1
        client = SimulatedClient(self.slurm)
        executor = SlurmArrays(
            self.experiment,
            self.layout,
            self.place,
            source=ROOT,
            client=client,
            settle_seconds=SETTLE_SECONDS,
            clock=self.clock,
            user=OWNER,
        )
        return Controller(name, executor, f"{name}{self._tokens}", ResultIndex(self.layout.index), self._graph({}))

    def _token_of_current(self) -> str:
        process = current()
        if process is None:
            return ""
        return next((each.token for each in self.controllers if each.name == process.name), "")

    def _index_of_current(self, layout: Layout) -> ResultIndex:
        process = current()
        known = [each.index for each in self.controllers if process is not None and each.name == process.name]
        return known[0] if known else ResultIndex(layout.index)

    def _writer_alive(self, claim: Claim, *arguments: object, **options: object) -> bool:
        return not (self.shape.same_machine and claim.process_start in self.dead)

    def _description(self, name: str) -> Description:
        return read_description(SubmissionBook(self.layout).tasks_file(name))

    def _begun(self, element: Element, array: Array) -> None:
        description = self._description(array.name)
        self._pids += 1
        self.workers[element.name] = SimulatedWorker(
            description,
            description.tasks[element.index],
            element.name,
            element.node,
            self._pids,
            self.clock,
            self.executions,
            published=self._published,
            ua_of=lambda key: self.alike.setdefault(key, self.next_ua),
        )

    def _killed(self, element: Element) -> None:
        worker = self.workers.pop(element.name, None)
        if worker is not None:
            worker.die()

    def _published(self, key: str) -> None:
        self.published[key] += 1


@contextlib.contextmanager
def world(folder: Path, shape: Shape | None = None) -> Iterator[World]:
    """A world in an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = World(folder, shape)
    with made:
        yield made


def new_folder() -> Path:
    """An empty folder, in memory where that can be: thousands of small files are written."""
    shared = Path("/dev/shm")  # noqa: S108 - a place, no name of a file
    return Path(tempfile.mkdtemp(prefix="ser-grid-simulation-", dir=shared if os.access(shared, os.W_OK) else None))


__all__: Sequence[str] = ("Shape", "World", "new_folder", "world")
