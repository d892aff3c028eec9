"""For any sequence of events no run is lost, none is computed twice, and cancelled runs stay cancelled.

Hypothesis drives production code of the controller against a simulated cluster (tests.simulation.world): it starts and kills workers,
nodes and passes and loses replies, in any order. SER_GRID_EXAMPLES sets how many examples are tried; `make explore` draws fresh ones.
"""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from jobs.experiment.config import OutlierRule, Policy
from jobs.store.failures import FailureClass
from tests.simulation.crashes import TALLY
from tests.simulation.slurm import Accounting, Element, Reply
from tests.simulation.worker import Place, SimulatedWorker
from tests.simulation.world import Shape, World, new_folder

EXAMPLES = int(os.environ.get("SER_GRID_EXAMPLES", "150"))
STEPS = 50
POINTS = st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(1, 60))  # most passes have few
KINDS = st.sampled_from(("", "", "", "sbatch", "hardlink_to submissions", "submissions/ended", "scancel", "scontrol", "squeue"))
WHICH = st.integers(0, 1)
NUMBER = st.integers(0, 7)
SECONDS = st.sampled_from((1, 12, 25, 50, 65, 130, 310, 1000, 4000))
FAILURES = st.sampled_from(
    (
        FailureClass.code,
        FailureClass.memory,
        FailureClass.communication,
        FailureClass.disk,
        FailureClass.storage,
        FailureClass.divergence,
        FailureClass.refused,
        FailureClass.interrupted,
        FailureClass.time_limit,
    )
)
ENDS = st.sampled_from(("FAILED", "OUT_OF_MEMORY", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "COMPLETED"))
REQUEUES = st.sampled_from(("NODE_FAIL", "PREEMPTED", "REQUEUED"))
SHARES = st.sampled_from(((0.6, ""), (0.61, ""), (0.62, ""), (0.2, ""), (0.99, ""), (0.25, "the loss never moved")))
SHAPES = st.builds(
    Shape,
    methods=st.sampled_from((("vft",), ("tapt",), ("vft", "tapt"), ("vft", "tapt", "ptapt"))),
    folds=st.integers(1, 2),
    seeds=st.integers(1, 3),
    runs_per_task=st.integers(1, 2),
    max_submit=st.sampled_from((0, 0, 3, 6)),
    max_array_size=st.sampled_from((1001, 1001, 2)),
    nodes=st.integers(2, 3),
    same_machine=st.booleans(),
    policy=st.builds(
        Policy,
        outliers=st.sampled_from(OutlierRule),
        rounds=st.integers(1, 2),
        max_seeds=st.integers(1, 3),
        max_attempts=st.sampled_from((2, 6, 12)),
        max_failures=st.integers(2, 10),
    ),
)


class Laboratory(RuleBasedStateMachine):
    """Actions of users, controllers, nodes and Slurm, with faults."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = new_folder()
        self.world: World | None = None

    @property
    def lab(self) -> World:
        assert self.world is not None
        return self.world

    @initialize(shape=SHAPES)
    def open(self, shape: Shape) -> None:
        self.world = World(self.folder / "world", shape)
        self.world.__enter__()
        TALLY["examples"] += 1

    # ---- controllers

    @rule(which=WHICH)
    def look_after(self, which: int) -> None:
        self.lab.run_pass(which)

    @rule(which=WHICH, at=POINTS, kind=KINDS)
    def die_in_a_pass(self, which: int, at: int, kind: str) -> None:
        self.lab.kill_at(which, at if not kind else 1 + at % 6, kind)

    @rule(which=WHICH, reply=st.sampled_from(Reply))
    def a_reply_is_lost(self, which: int, reply: Reply) -> None:
        self.lab.slurm.reply = reply
        self.lab.run_pass(which)

    @rule(which=WHICH, at=POINTS, kind=KINDS)
    def two_at_once(self, which: int, at: int, kind: str) -> None:
        self.lab.interleave(which, at if not kind else 1 + at % 6, lambda: (self.lab.run_pass(1 - which), None)[1], kind)

    @rule(which=WHICH, at=POINTS, other=POINTS)
    def two_at_once_and_one_dies(self, which: int, at: int, other: int) -> None:
        self.lab.interleave(which, at, lambda: self.lab.kill_at(1 - which, other))

    @rule(which=WHICH, at=POINTS, seconds=SECONDS, count=NUMBER)
    def the_cluster_moves_during_a_pass(self, which: int, at: int, seconds: int, count: int) -> None:
        def move() -> None:
            for worker in self.lab.running()[:count]:
                self.lab.finish(worker)
            self.lab.start(count)
            self.lab.advance(min(seconds, 100))

        self.lab.interleave(which, at, move)

    @rule(which=WHICH, at=POINTS)
    def cancelled_during_a_pass(self, which: int, at: int) -> None:
        self.lab.interleave(which, at, self.lab.cancel)

    # ---- time and the cluster

    @rule(seconds=SECONDS)
    def time_goes_by(self, seconds: int) -> None:
        self.lab.advance(seconds)

    @rule(count=st.integers(1, 6))
    def elements_start(self, count: int) -> None:
        self.lab.start(count)

    @rule(count=st.integers(1, 6))
    def elements_start_and_finish(self, count: int) -> None:
        for worker in self.lab.start(count):
            self.lab.finish(worker)

    @rule(node=NUMBER, requeue=st.booleans())
    def a_node_dies(self, node: int, requeue: bool) -> None:
        self.lab.slurm.fail_node(f"n{node % self.lab.shape.nodes}", requeue=requeue)

    @rule()
    def nodes_come_back(self) -> None:
        for node in self.lab.slurm.up:
            self.lab.slurm.up[node] = True

    @rule(number=NUMBER)
    def a_launch_fails(self, number: int) -> None:
        eligible = self.lab.slurm.eligible()
        if eligible:
            self.lab.slurm.fail_launch(eligible[number % len(eligible)])

    @rule(number=NUMBER, reason=st.sampled_from(("JobHeldUser", "PartitionTimeLimit", "BadConstraints", "JobHeldAdmin")))
    def an_element_is_held(self, number: int, reason: str) -> None:
        element = self._element(number, "PENDING")
        if element is not None and element.held:
            self.lab.slurm.release(element)
        elif element is not None:
            self.lab.slurm.hold(element, reason)

    @rule(number=NUMBER, state=st.sampled_from(("SPECIAL_EXIT", "REQUEUE_HOLD", "RESV_DEL_HOLD")))
    def an_element_is_put_back_and_held(self, number: int, state: str) -> None:
        element = self._element(number)
        if element is not None:
            self.lab.slurm.hold(element, "JobHeldUser", state)

    @rule(seconds=SECONDS)
    def slurm_is_down(self, seconds: int) -> None:
        self.lab.slurm.back_at = self.lab.clock() + seconds

    @rule(accounting=st.sampled_from(Accounting))
    def accounting_changes(self, accounting: Accounting) -> None:
        self.lab.set_accounting(accounting)

    @rule(works=st.booleans())
    def updates_work_or_do_not(self, works: bool) -> None:
        self.lab.slurm.updates_work = works

    # ---- workers

    @rule(number=NUMBER, steps=st.integers(1, 5))
    def a_worker_works(self, number: int, steps: int) -> None:
        worker = self._worker(number)
        if worker is not None:
            for _ in range(steps):
                worker.step()

    @rule(number=NUMBER, share=SHARES, completing=st.booleans())
    def a_worker_finishes(self, number: int, share: tuple[float, str], completing: bool) -> None:
        worker = self._worker(number)
        if worker is not None:
            self.lab.next_ua = share
            worker.run()
            self.lab.leave(worker, completing=completing)

    @rule(share=SHARES)
    def numbers_become(self, share: tuple[float, str]) -> None:
        self.lab.next_ua = share

    @rule(number=NUMBER)
    def a_worker_makes_progress(self, number: int) -> None:
        worker = self._worker(number)
        if worker is not None:
            self._to_work(worker)
            worker.checkpoint()

    @rule(number=NUMBER, failure=FAILURES)
    def a_stage_fails(self, number: int, failure: FailureClass) -> None:
        worker = self._worker(number)
        if worker is not None:
            self._to_work(worker)
            worker.fail(failure)
            self.lab.leave(worker)

    @rule(count=st.integers(1, 4), failure=FAILURES)
    def many_stages_fail(self, count: int, failure: FailureClass) -> None:
        for worker in [*self.lab.start(count), *self.lab.running()][:count]:
            self._to_work(worker)
            worker.fail(failure)
            self.lab.leave(worker)

    @rule(number=NUMBER, failure=st.one_of(FAILURES, ENDS), times=st.integers(2, 7), which=WHICH)
    def a_stage_keeps_failing(self, number: int, failure: FailureClass | str, times: int, which: int) -> None:
        """With an outcome, or by the end of its element alone; at once if the worker has not started."""
        worker = self._worker(number)
        key = worker.key if worker is not None else ""
        for _ in range(times):
            worker = next((each for each in self.lab.running() if key in each.keys), None)
            if worker is not None and isinstance(failure, FailureClass):
                self._to_work(worker)
                worker.fail(failure)
                self.lab.leave(worker)
            elif worker is not None:
                self.lab.slurm.end(self.lab.slurm.find(worker.job), str(failure))
            self.lab.advance(65)
            self.lab.run_pass(which)
            self.lab.start(6)

    @rule(number=NUMBER, failure=st.sampled_from((FailureClass.interrupted, FailureClass.time_limit)), begin=st.booleans())
    def a_worker_is_asked_to_stop(self, number: int, failure: FailureClass, begin: bool) -> None:
        worker = self._worker(number)
        if worker is not None:
            if begin:
                self._to_work(worker)
            worker.stop(failure)
            self.lab.leave(worker)

    @rule(number=NUMBER, state=ENDS, begin=st.booleans())
    def an_element_ends_without_a_word(self, number: int, state: str, begin: bool) -> None:
        worker = self._worker(number)
        if worker is not None:
            if begin:
                self._to_work(worker)
            self.lab.slurm.end(self.lab.slurm.find(worker.job), state)

    @rule(number=NUMBER, state=REQUEUES, begin=st.booleans())
    def an_element_is_requeued(self, number: int, state: str, begin: bool) -> None:
        worker = self._worker(number)
        if worker is not None:
            if begin:
                self._to_work(worker)
            self.lab.slurm.requeue(self.lab.slurm.find(worker.job), state)

    # ---- people

    @rule(which=WHICH)
    def everything_is_cancelled(self, which: int) -> None:
        self.lab.cancel()

    @rule(number=NUMBER, count=st.integers(1, 4))
    def some_runs_are_cancelled(self, number: int, count: int) -> None:
        keys = [run.key for run in self.lab.graph.runs]
        self.lab.cancel(keys=keys[number % len(keys) :][:count])

    @rule(number=NUMBER, heard=st.booleans())
    def the_owner_types_scancel(self, number: int, heard: bool) -> None:
        element = self._element(number)
        if element is not None:
            self.lab.scancel_by_hand(element, heard=heard)

    @rule(number=NUMBER, heard=st.booleans())
    def another_account_types_scancel(self, number: int, heard: bool) -> None:
        element = self._element(number)
        if element is not None and element.state == "RUNNING":
            self.lab.scancel_by_another(element, heard=heard)

    @rule(which=WHICH)
    def the_owner_launches_again(self, which: int) -> None:
        self.lab.launch()
        self.lab.run_pass(which)

    @rule(which=WHICH, at=POINTS)
    def launched_during_a_pass(self, which: int, at: int) -> None:
        self.lab.interleave(which, at, self.lab.launch)

    @rule(which=WHICH)
    def the_owner_asks_for_more_seeds(self, which: int) -> None:
        if self.lab.shape.seeds < 4:
            self.lab.launch_with_seeds(self.lab.shape.seeds + 1)
            self.lab.run_pass(which)

    @rule(which=WHICH)
    def the_owner_asks_for_fewer_seeds(self, which: int) -> None:
        if self.lab.shape.seeds > 1:
            self.lab.launch_with_seeds(self.lab.shape.seeds - 1)
            self.lab.run_pass(which)

    @rule(number=NUMBER, how=st.integers(0, 2))
    def a_result_is_spoilt(self, number: int, how: int) -> None:
        done = [key for key, count in self.lab.published.items() if count and key in self.lab.graph.nodes]
        if done:
            self.lab.spoil(done[number % len(done)], how)

    # ---- what must hold

    @precondition(lambda self: self.world is not None)
    @invariant()
    def everything_adds_up(self) -> None:
        self.lab.check()

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None
        try:
            if self.world is not None and not failed:
                self.lab.finish_everything()
        finally:
            if self.world is not None:
                self.world.__exit__()
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- choices

    def _worker(self, number: int) -> SimulatedWorker | None:
        running = self.lab.running()
        return running[number % len(running)] if running else None

    def _element(self, number: int, state: str = "") -> Element | None:
        found = [element for _, element in self.lab.slurm.elements() if element.live and (not state or element.state == state)]
        return found[number % len(found)] if found else None

    def _to_work(self, worker: SimulatedWorker) -> None:
        for _ in range(4):
            if worker.place not in (Place.work, Place.artifacts):
                worker.step()


def run_laboratory(machine: type[Laboratory], examples: int) -> None:
    """Run examples until one fails."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),  # without `explain`, which traces every line to compare failing steps with others
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.timeout(900)
def test_no_run_is_lost_doubled_or_started_after_its_cancellation() -> None:
    """Steps in any order, all invariants after each; then everything recovers, and every run must get its result."""
    TALLY.clear()
    run_laboratory(Laboratory, EXAMPLES)
    if "SER_GRID_EXAMPLES" in os.environ:
        sys.stderr.write("\n" + "\n".join(f"{count:9d} {what}" for what, count in sorted(TALLY.items())) + "\n")
    assert TALLY["killed"]
