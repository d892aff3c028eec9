"""Users, controllers and workers on a simulated Slurm, in memory: their state, and what may happen to them.

The controllers run production code on real records in a folder.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

from jobs.control.controller import Desired, Report, reconcile
from jobs.control.estimates import Bounds
from jobs.control.facts import Asked
from jobs.control.result_index import ResultIndex
from jobs.errors import SlurmUnavailableError
from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite, StageResources, resources_of
from jobs.experiment.graph import Graph, Slot, build_graph, seeds_of_slots
from jobs.slurm.executor import SlurmArrays
from jobs.slurm.submissions import SETTLE_SECONDS, SubmissionBook, base_name
from jobs.store.cancellations import record_cancellation
from jobs.store.layout import Layout
from jobs.store.records import Claim, read_result
from jobs.store.snapshot import Snapshot
from jobs.worker.task import Description, Workplace, read_description
from tests.jobs.fake_registry import REGISTRY
from tests.simulation.client import SimulatedClient
from tests.simulation.crashes import TALLY, Killed, Process, current, instrumented, kill, running
from tests.simulation.slurm import OTHER, OWNER, Accounting, Array, Clock, Element, Reply, SimulatedSlurm
from tests.simulation.worker import Execution, SimulatedWorker, stamp

ROOT = Path(__file__).resolve().parents[2]
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


class SimulatedLab(ABC):
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
        self.judged = self.graph  # the graph of the pass that is made now, or of the last one
        self.points = 0  # of the last pass
        self._tokens = 0
        self._pids = 10
        self._stack = contextlib.ExitStack()
        self.controllers = [self._controller("A"), self._controller("B")]

    @abstractmethod
    def _check_report(self, report: Report, *, calm: bool, began: float) -> None:
        """Check the report of a pass. `calm`: nothing else happened during it; `began`: its start, seconds since the epoch."""

    @abstractmethod
    def _created(self, array: Array) -> None:
        """Check that a new array was rightly submitted, and note what it computes."""

    # ---- life

    def __enter__(self) -> Self:
        patched: list[tuple[str, Any]] = [
            ("jobs.slurm.executor.take_snapshot", lambda source, layout, registry: self.snapshot),
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

        def refill(generations: Mapping[Slot, int]) -> Graph:
            self.judged = self._graph(generations)
            return self.judged

        self.judged = graph
        packing = {"finetune": self.shape.runs_per_task}
        bounds = Bounds({stage: resources_of(self.experiment, stage) for stage in STAGES}, siblings=2)
        return Desired(graph, self.layout, self.shape.policy, self.since, packing, refill, clock=self.clock, bounds=bounds)

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
            self.slurm.release(element)

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

    def set_accounting(self, accounting: Accounting) -> None:
        """Set how sacct answers from now on."""
        self.slurm.accounting = accounting
        self.by_hand_unsure |= accounting not in RELIABLE and bool(self.cancelled_by_hand)

    def name(self, key: str) -> str:
        node = self.graph.nodes.get(key)
        return node.name if node else key

    def _done(self, key: str) -> bool:
        node = self.graph.nodes.get(key) or self.judged.nodes.get(key)
        return node is not None and read_result(self.layout.stage(node.stage, key), key) is not None

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

    def _index_of_current(self, layout: Layout, score: object) -> ResultIndex:
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
