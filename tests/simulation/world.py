"""What must hold in the simulated laboratory, after every step and in the end.

The world records independently what was created and executed and which failures occurred, and compares: no invariant relies on the
production code that it checks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jobs.control.controller import Report
from jobs.control.facts import needed_keys
from jobs.control.failure_policy import COMMUNICATION_RETRIES, DISK_RETRIES, MAX_FAILED_STARTS, MAX_LOST, MEMORY_RETRIES, STORAGE_RETRIES
from jobs.slurm.submissions import SubmissionBook
from jobs.store.failures import FailureClass
from jobs.worker.task import Description
from tests.simulation.crashes import TALLY
from tests.simulation.lab import Shape, SimulatedLab
from tests.simulation.slurm import Array, Element
from tests.simulation.worker import Execution

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


class World(SimulatedLab):
    """A laboratory whose every pass and submission is checked. `folder` must be empty."""

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
        reasons = [report.plan.reasons[key] for key in report.plan.held_or_cancelled]
        assert all("does not learn" in reason for reason in reasons), f"launched again, and still {reasons}"
        for key in report.plan.given_up:
            assert report.facts[key].diverged, f"launched again, and still: {report.plan.reasons[key]}"

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

    def _alone_with_its_error(self, execution: Execution) -> bool:
        """Whether a second stage of its kind failed on the same node, since the launch too, and a third one has its result from another."""
        nodes = {**self.graph.nodes, **self.judged.nodes}
        if execution.key not in nodes:
            return False
        kind = (nodes[execution.key].stage, nodes[execution.key].method)
        siblings = [each for each in self.executions if each.key in nodes and (nodes[each.key].stage, nodes[each.key].method) == kind]
        alike = {each.key for each in siblings if each.begun >= self.since and each.said in FINAL and each.node == execution.node}
        return len(alike) > 1 and any(each.result and each.ended >= self.since and each.node != execution.node for each in siblings)

    def _check_warranted(self, key: str, description: Description, failures: Mapping[str, Counter[FailureClass]], name: str) -> None:
        assert not self.all_cancelled, f"{name} is submitted although everything is cancelled"
        assert key not in self.cancelled, f"{name} is submitted although it is cancelled"
        if key in self.cancelled_by_hand and not self.by_hand_unsure:
            raise AssertionError(f"{name} is submitted although its owner cancelled it")
        mine = [each for each in self.executions if each.key == key]
        assert not any(each.alive for each in mine), f"{name} is submitted while it is executed"
        recent = [each for each in mine if each.begun >= self.since and not (each.result or each.superseded or self._blamed(each))]
        final = [each for each in recent if each.said in FINAL]
        assert not final or (len(final) == 1 and self._alone_with_its_error(final[0])), f"{name} is tried again after {FailureClass.code}"
        assert not any(each.said is FailureClass.divergence for each in mine), f"{name} is tried again after it diverged"
        for failure, retries in RETRIES.items():
            assert failures[key][failure] <= retries, f"{name} is tried again after {failures[key][failure]} times {failure.value}"
        lost = itertools.takewhile(lambda each: each.said in (None, FailureClass.interrupted) and not each.progress, reversed(recent))
        assert len(list(lost)) <= MAX_LOST, f"{name} is tried again although it gets lost again and again"
        silent = self._silent_ends(key, self.since)
        since_begun = self._silent_ends(key, max(self.since, self._last_begun(description.nodes[key].stage)))
        assert since_begun < MAX_FAILED_STARTS + 2, f"{name} is tried again although {since_begun} jobs ended without having begun"
        most = max(MAX_FAILED_STARTS, self.shape.policy.max_attempts)
        assert silent < most + 2, f"{name} is tried again although {silent} jobs of it alone ended without having begun"
        fruitless = [each for each in recent if not each.progress and each.said is not FailureClass.storage]
        assert len(fruitless) < self.shape.policy.max_attempts, f"{name}: {len(fruitless)} attempts in vain, and another"
        told = failures[key][FailureClass.memory]
        assert description.relief >= min(told, MEMORY_RETRIES), f"{name} is given no relief after memory ran out {told} times"
        # Neither what was overcome counts, nor a stage that the experiment no longer has.
        undone = [counts for other, counts in failures.items() if other in self.judged.nodes and not self._done(other)]
        spent = sum(count for counts in undone for failure, count in counts.items() if failure in COSTLY)
        if sum(failures[key][failure] for failure in COSTLY):
            assert spent < self.shape.policy.max_failures, f"{name} is tried again, the budget of the experiment being spent"

    def _failures(self, keys: Iterable[str]) -> dict[str, Counter[FailureClass]]:
        """Key, also each of these -> classes of failure of its attempts since the launch, without the first that its node caused."""
        found: dict[str, Counter[FailureClass]] = {key: Counter() for key in keys}
        forgiven: set[str] = set()
        for each in self.executions:
            at_limit = each.said is FailureClass.time_limit and each.progress  # costs nothing
            if each.said is not None and each.begun >= self.since and not (each.superseded or at_limit or self._blamed(each)):
                of_node = each.said in FINAL and each.key not in forgiven and self._alone_with_its_error(each)
                if of_node:
                    forgiven.add(each.key)
                else:
                    found.setdefault(each.key, Counter())[each.said] += 1
        return found

    def _last_begun(self, stage: str) -> float:
        """When a worker last worked on a stage of that name, in seconds since the epoch."""
        arrays = self.slurm.arrays
        named = (each for each in self.executions if arrays[int(each.job.partition("_")[0])].name.split(".")[1] == stage)
        return max((max(each.begun, each.ended if each.result else 0.0) for each in named), default=0.0)

    def _silent_ends(self, key: str, since: float = 0.0) -> int:
        """How many elements of a stage that were submitted since then have left the queue without starting any of their stages."""
        jobs = {execution.job for execution in self.executions}
        return sum(
            bool(element.begun) and not element.queued and element.name not in jobs and key in self.keys_of[array.number][element.index]
            for array in self.slurm.arrays.values()
            for element in array.elements
            if self.intended.get(array.number, 0.0) >= since
        )


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
