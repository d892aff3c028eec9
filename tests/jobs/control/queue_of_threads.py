"""An executor for tests of the controller: a queue whose jobs run in this process when a test lets them."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from jobs.control.controller import Report
from jobs.control.executor_protocol import Batch, Executor, Limits
from jobs.control.facts import Departure, InFlight, Phase
from jobs.errors import RequestRefusedError, SlurmUnavailableError
from jobs.experiment.graph import Graph
from jobs.signals import StopRequest
from jobs.slurm.executor import describe_batch
from jobs.worker.main import run_task
from jobs.worker.stage import WorkerProcess
from tests.jobs import local_launch


@dataclass
class QueueOfThreads(Executor):
    """An executor with a queue of its own: every look at it runs the elements whose upstream is done, with the real worker."""

    folder: Path
    room: int = 0
    broken: bool = False  # jobs end before the worker begins
    refuses: int = 0  # the first so many batches are not taken
    rejects: str = ""  # a stage whose requests Slurm rejects
    rejected: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    unseen: int = 0  # the first so many looks fail
    unseen_error: Exception = field(default_factory=lambda: SlurmUnavailableError("squeue did not answer"))
    at_once: int = 0  # elements that run between two looks; 0: all
    unsettled: frozenset[str] = frozenset()
    queue: dict[str, InFlight] = field(default_factory=dict)
    submissions: list[Batch] = field(default_factory=list)
    upstreams: list[Mapping[str, InFlight]] = field(default_factory=list)
    processes: list[tuple[WorkerProcess, int, tuple[str, ...]]] = field(default_factory=list)
    gone: list[Departure] = field(default_factory=list)

    def limits(self) -> Limits:
        return Limits(array_size=3, queue_room=self.room)

    def in_flight(self) -> Mapping[str, InFlight]:
        if self.unseen:
            self.unseen -= 1
            raise self.unseen_error
        return dict(self.queue)

    def live_jobs(self) -> frozenset[str] | None:
        return frozenset(flight.job for flight in self.queue.values())

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        return {key: tuple(each for each in self.gone if each.key == key) for key in keys}

    def refusals(self, keys: Collection[str]) -> Mapping[str, tuple[tuple[float, str], ...]]:
        return {key: tuple(self.rejected[key]) for key in keys if key in self.rejected}

    def settling(self) -> frozenset[str]:
        return self.unsettled

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        withdrawn = [each for each in self.processes if set(each[2]) <= set(keys)]
        self.processes = [each for each in self.processes if each not in withdrawn]
        for _, _, held in withdrawn:
            self.leave(held, "CANCELLED by 1000", withdrawn=True)
        return tuple(key for _, _, held in withdrawn for key in held)

    def leave(self, keys: Collection[str], state: str, *, withdrawn: bool = False) -> None:
        for key in keys:
            self.gone.append(Departure(key, self.queue.pop(key).job, state, time.time(), time.time(), withdrawn))

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        if self.refuses:
            self.refuses -= 1
            return {}
        if batch.stage == self.rejects:
            for key in batch.keys:
                self.rejected.setdefault(key, []).append((time.time(), "QOSMaxCpuPerJobLimit"))
            raise RequestRefusedError("QOSMaxCpuPerJobLimit")
        self.submissions.append(batch)
        self.upstreams.append(upstream)
        description = describe_batch(local_launch.workplace(self.folder), graph, batch)
        taken: dict[str, InFlight] = {}
        for index, task in enumerate(batch.tasks):
            self.processes.append((WorkerProcess(description, 1, lambda line: None, StopRequest(), lag_seconds=0.0), index, task.keys))
            taken.update(dict.fromkeys(task.keys, InFlight(Phase.queued, f"{len(self.submissions)}_{index}")))
        self.queue.update(taken)
        return taken

    def run(self, report: Report) -> None:
        """Let what is queued run and leave the queue."""
        now, self.processes = self.processes[: self.at_once or None], self.processes[self.at_once or len(self.processes) :]
        for process, index, keys in now:
            array, _, element = self.queue[keys[0]].job.partition("_")
            if not self.broken:
                with mock.patch.dict(os.environ, {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": element, "SLURMD_NODENAME": "n1"}):
                    run_task(process, index)
            self.leave(keys, "FAILED")
