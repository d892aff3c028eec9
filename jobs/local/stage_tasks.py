"""What executors that this process waits for have in common: every stage is a task of its own, kept here until it has ended.

A task starts only when none of its upstream stages waits or runs here; if an upstream stage ends without a result, the tasks that waited
for it are returned to the planner.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

from jobs.control.executor_protocol import Batch, EndedTask, Limits, NearbyExecutor
from jobs.control.facts import Departure, InFlight, Phase
from jobs.control.plan import critical_minutes
from jobs.experiment.config import Resources
from jobs.experiment.graph import Graph, Node
from jobs.store.layout import Layout
from jobs.store.records import read_result
from jobs.worker.task import Workplace

EXIT_SECONDS = 10.0  # for killed workers to end
PAUSE_SECONDS = 0.1  # between checks while stopping


@dataclass
class StageTask:
    """A stage that waits or runs in an executor."""

    name: str
    node: Node
    graph: Graph
    batch: Batch
    priority: float  # minutes of the longest chain of stages that starts with it
    submitted: float  # seconds since the epoch
    started: bool = False


TaskT = TypeVar("TaskT", bound=StageTask)


@dataclass
class StageExecutor(NearbyExecutor, Generic[TaskT]):
    """The part of an executor that does not depend on how tasks are run. Use it in a `with` block: no process outlives it.

    `resources`: what a stage may use, by name.
    """

    kill_seconds: ClassVar[tuple[float, ...]] = (EXIT_SECONDS,)  # how long `stop` waits after each request but the first

    place: Workplace
    layout: Layout
    resources: Callable[[str], Resources]
    _prefix: str = field(default_factory=lambda: f"local-{os.getpid()}", init=False)  # of the names of tasks
    _names: int = field(default=0, init=False)
    _tasks: dict[str, TaskT] = field(default_factory=dict, init=False)  # by key
    _stopping: bool = field(default=False, init=False)
    _departures: dict[str, list[Departure]] = field(default_factory=dict, init=False)
    _critical: tuple[Graph | None, dict[str, float]] = field(default=(None, {}), init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def limits(self) -> Limits:
        """No limits: tasks that do not fit now wait."""
        return Limits()

    def in_flight(self) -> Mapping[str, InFlight]:
        """Every stage that waits or runs in this executor."""
        return {key: self._in_flight(task) for key, task in self._tasks.items()}

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Accept all stages of a batch, each as a task of its own."""
        if self._critical[0] is not graph:
            self._critical = (graph, critical_minutes(graph, lambda stage: float(self.resources(stage).minutes)))
        for key in batch.keys:
            self._tasks[key] = self._task(StageTask(self._new_name(), graph.nodes[key], graph, batch, self._critical[1][key], time.time()))
        return {key: self._in_flight(self._tasks[key]) for key in batch.keys}

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Remove the tasks of these keys that do not run; returns their keys."""
        waiting = tuple(key for key in keys if key in self._tasks and not self._runs(self._tasks[key]))
        for key in waiting:
            self._withdraw(self._tasks.pop(key))
        return waiting

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Tasks that ended without a record: they failed, or were lost, before they claimed an attempt."""
        return {key: tuple(self._departures[key]) for key in keys if key in self._departures}

    @property
    def idle(self) -> bool:
        return not self._tasks

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> tuple[EndedTask, ...]:
        self._stopping = True
        self._tasks = {key: task for key, task in self._tasks.items() if task.started}
        ended: list[EndedTask] = []
        for step, patience in enumerate((grace, *self.kill_seconds)):
            if self._tasks:
                self._request_end(step)
            deadline = time.monotonic() + patience
            while self._tasks and time.monotonic() < deadline and not (step == 0 and hurry()):
                ended.extend(self.wait(PAUSE_SECONDS))
        return tuple(ended)

    @abstractmethod
    def close(self) -> None:
        """End everything that runs."""

    @abstractmethod
    def _task(self, task: StageTask) -> TaskT:
        """The same with what this executor adds to it."""

    @abstractmethod
    def _request_end(self, step: int) -> None:
        """Ask the workers of all tasks to write a checkpoint and exit (step 0), or kill them (the steps after it)."""

    def _withdraw(self, task: TaskT) -> None:
        """Take back a task that was removed before it ran."""

    def _runs(self, task: TaskT) -> bool:
        return task.started

    def _in_flight(self, task: TaskT) -> InFlight:
        return InFlight(Phase.running if self._runs(task) else Phase.queued, task.name)

    def _new_name(self) -> str:
        self._names += 1
        return f"{self._prefix}-{self._names}"

    def _ready(self) -> list[TaskT]:
        """Tasks that can start, those on the longest chains of stages first."""
        found = [task for task in self._tasks.values() if not task.started and self._tasks.keys().isdisjoint(task.node.upstream.values())]
        return sorted(found, key=lambda task: -task.priority)

    def _end(self, task: TaskT, code: int | None, signal: int | None, *, unclaimed: bool) -> EndedTask:
        """Remove a task that has ended. `unclaimed`: it has left no record."""
        node = task.node
        self._tasks.pop(node.key, None)
        if unclaimed:
            self._departures.setdefault(node.key, []).append(Departure(node.key, task.name, "", task.submitted, time.time()))
        if read_result(self.layout.stage(node.stage, node.key), node.key) is None:
            self._return_dependants(node.key)
        return EndedTask((node.key,), code, signal, self._log(task))

    def _log(self, task: TaskT) -> Path:
        return self.layout.log_of(task.node.stage, task.node.key)

    def _return_dependants(self, key: str) -> None:
        """Remove the waiting tasks that need a stage, directly or not."""
        for dependant in [each for each, task in self._tasks.items() if key in task.node.upstream.values() and not task.started]:
            if self._tasks.pop(dependant, None) is not None:
                self._return_dependants(dependant)
