"""Runs tasks on this machine: as many at once as cores, GPUs and memory allow, those on the longest chains of stages first.

Workers are forked from a server that has imported the heavy packages already (jobs.local.forkserver).

`resources.STAGE.at_once` tasks share a GPU; 0: as many as fit by the peak memory of a finished stage of the same
kind. A task that runs out of memory on a shared GPU is retried on a GPU of its own, and fewer of its kind share the others.

A task that runs for `resources.STAGE.minutes` gets the signal that Slurm sends before its time limit: the worker writes a checkpoint, and
the next attempt resumes from it. One that is still there after `limit_grace` is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from jobs.control.executor_protocol import Batch, EndedTask, Limits, NearbyExecutor
from jobs.control.facts import Departure, InFlight, Phase
from jobs.control.plan import critical_minutes
from jobs.errors import InternalError
from jobs.experiment.config import Resources, at_once_of
from jobs.experiment.graph import Graph, Node
from jobs.store.clock import file_time
from jobs.store.layout import Layout
from jobs.store.records import read_result
from jobs.worker.deaths import RECORDED_EXITS, attempt_of, class_of_death, record_death
from jobs.worker.machine import Capacity, Needs, needs_here, processes_here, tasks_to_start
from jobs.worker.memory import Peak, Room, how_many_fit, larger_peak, measured_peak, was_crowded
from jobs.worker.processes import FORKABLE, Exit
from jobs.worker.task import Workplace, describe, description_to_json

REPOSITORY = Path(__file__).resolve().parents[2]
EXIT_SECONDS = 10.0  # for killed workers to end
LIMIT_GRACE_SECONDS = 120.0  # for a checkpoint at the time limit
PAUSE_SECONDS = 0.1  # between checks while stopping


@dataclass
class _Task:
    """A stage that waits or runs here."""

    name: str
    node: Node
    graph: Graph
    batch: Batch
    priority: float  # minutes of the longest chain of stages that starts with it
    submitted: float  # seconds since the epoch
    needs: Needs
    crowded: bool  # it has run out of memory on a shared GPU
    devices: tuple[str, ...] = ()
    started: bool = False
    began: float = 0.0  # time.monotonic(), which does not count while the machine is suspended
    warned: float = 0.0  # when it reached its time limit; 0: it has not
    killed: bool = False  # because it was still there afterwards

    @property
    def kind(self) -> tuple[str, str]:
        """Tasks of one kind use about the same memory."""
        return self.node.stage, self.node.method

    @property
    def in_flight(self) -> InFlight:
        return InFlight(Phase.running if self.started else Phase.queued, self.name)


@dataclass
class LocalExecutor(NearbyExecutor):
    """Runs tasks of one experiment, each stage as a task of its own. Use it in a `with` block: no process outlives it.

    A task starts only when none of its upstream stages waits or runs here; if an upstream stage ends without a result, the tasks that
    waited for it are returned to the planner. `resources`: what a stage may use, by name. `preload`: modules (or `module:function`) that
    the fork server imports before the first fork. `code`: the folder that workers import from. `limit_grace`: seconds for a checkpoint at
    the time limit; `minute`: seconds of a minute of time limits.
    """

    place: Workplace
    layout: Layout
    resources: Callable[[str], Resources]
    capacity: Capacity
    preload: Sequence[str] = ()
    code: Path = REPOSITORY
    limit_grace: float = LIMIT_GRACE_SECONDS
    minute: float = 60.0
    _names: int = 0
    _tasks: dict[str, _Task] = field(default_factory=dict)  # by key
    _stopping: bool = False
    _departures: dict[str, list[Departure]] = field(default_factory=dict)
    _critical: tuple[Graph | None, dict[str, float]] = (None, {})
    _server: tuple[subprocess.Popen[bytes], Connection] | None = None
    _peaks: dict[tuple[str, str], Peak | None] = field(default_factory=dict)  # kind of task -> largest peak of finished ones
    _most: dict[tuple[str, str], int] = field(default_factory=dict)  # kind of task -> how many may share a GPU, after one was crowded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def limits(self) -> Limits:
        """No limits: tasks that do not fit now wait."""
        return Limits()

    def in_flight(self) -> Mapping[str, InFlight]:
        """Every stage that waits or runs in this executor."""
        return {key: task.in_flight for key, task in self._tasks.items()}

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Accept all stages of a batch, each as a task of its own."""
        if self._critical[0] is not graph:
            self._critical = (graph, critical_minutes(graph, lambda stage: float(self.resources(stage).minutes)))
        for key in batch.keys:
            node, self._names = graph.nodes[key], self._names + 1
            name, needs = f"local-{os.getpid()}-{self._names}", needs_here(self.resources(node.stage), self.capacity)
            crowded = was_crowded(self.layout.stage(node.stage, key))
            self._tasks[key] = _Task(name, node, graph, batch, self._critical[1][key], file_time(self.layout.root), needs, crowded)
        return {key: self._tasks[key].in_flight for key in batch.keys}

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Remove the tasks of these keys that do not run; returns their keys."""
        waiting = tuple(key for key in keys if key in self._tasks and not self._tasks[key].started)
        for key in waiting:
            del self._tasks[key]
        return waiting

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Tasks that ended without a record: they failed, or were lost, before they claimed an attempt."""
        return {key: tuple(self._departures[key]) for key in keys if key in self._departures}

    @property
    def idle(self) -> bool:
        return not self._tasks

    def wait(self, seconds: float) -> tuple[EndedTask, ...]:
        """Start the tasks that fit, then wait at most `seconds` for one to end; returns the tasks that have ended, oldest first.

        Raises InternalError if the fork server has died.
        """
        self._start_what_fits()
        self._enforce_time_limits()
        return tuple(filter(None, (self._handle(event) for event in self._events(seconds))))

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> tuple[EndedTask, ...]:
        self._stopping = True
        self._tasks = {key: task for key, task in self._tasks.items() if task.started}
        ended: list[EndedTask] = []
        for request, patience in (("terminate", grace), ("kill", EXIT_SECONDS)):
            if self._tasks:
                self._send({request: list(self._tasks)})
            deadline = time.monotonic() + patience
            while self._tasks and time.monotonic() < deadline and not (request == "terminate" and hurry()):
                ended.extend(self.wait(PAUSE_SECONDS))
        return tuple(ended)

    def close(self) -> None:
        """End the fork server and its workers."""
        if self._server is None:
            return
        server, connection = self._server
        if self._tasks and server.poll() is None:
            self._send({"kill": list(self._tasks)})
        self._server = None
        connection.close()
        try:
            server.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    def _start_what_fits(self) -> None:
        if self._stopping:
            return
        in_use = [(task.needs, task.devices) for task in self._tasks.values() if task.started]
        waiting = [each for each in self._tasks.values() if not each.started and self._tasks.keys().isdisjoint(each.node.upstream.values())]
        ready = sorted(waiting, key=lambda task: -task.priority)
        for task in ready:
            task.needs = replace(task.needs, share=self._share(task))
        for index, devices in tasks_to_start([task.needs for task in ready], in_use, self.capacity):
            self._start(ready[index], devices)

    def _enforce_time_limits(self) -> None:
        """Warn the tasks that have reached their time limit, and kill those that were warned `limit_grace` ago."""
        now, running = time.monotonic(), [task for task in self._tasks.values() if task.started]
        late = [task for task in running if not task.warned and now - task.began >= self.minute * self.resources(task.node.stage).minutes]
        deaf = [task for task in running if task.warned and not task.killed and now - task.warned >= self.limit_grace]
        for task in late:
            task.warned = now
        for task in deaf:
            task.killed = True
        for request, tasks in (("warn", late), ("kill", deaf)):
            if tasks:
                self._send({request: [task.node.key for task in tasks]})

    def _share(self, task: _Task) -> int:
        """How many tasks like this one may use one GPU at the same time."""
        wanted = at_once_of(self.resources(task.node.stage))
        if task.crowded or task.needs.gpus != 1:
            return 1
        if wanted == 0:
            if task.kind not in self._peaks:
                alike = (node for node in task.graph.nodes.values() if (node.stage, node.method) == task.kind)
                self._peaks[task.kind] = measured_peak((self.layout.stage(node.stage, node.key), node.key) for node in alike)
            peak, host_bytes = self._peaks[task.kind], round(self.capacity.memory_gb * 2**30)
            wanted = how_many_fit(peak, Room(host_bytes, self.capacity.gpu_bytes, self.capacity.cpus)) if peak else 1
        return min(wanted, self._most.get(task.kind, wanted))

    def _start(self, task: _Task, devices: tuple[str, ...]) -> None:
        task.started, task.devices, task.began = True, devices, time.monotonic()
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.capacity.gpus else {}
        description = describe(self.place, task.graph, [[task.node.key]], task.batch.request.relief, task.batch.gone)
        self._send(
            {
                "start": task.node.key,
                "task": description_to_json(replace(description, team=processes_here(self.resources(task.node.stage), task.needs))),
                "index": 0,
                "threads": task.needs.cpus,
                "environment": environment,
                "concurrent": task.needs.share - 1,
                "log": str(self._log(task)),
            }
        )

    def _send(self, request: Mapping[str, Any]) -> None:
        """Send a request to the fork server, starting it if needed. If it has died, `_events` raises an error with its status."""
        if self._server is None:
            self._server = self._launch_server()
        with contextlib.suppress(ConnectionError):
            self._server[1].send_bytes(json.dumps(request).encode())

    def _launch_server(self) -> tuple[subprocess.Popen[bytes], Connection]:
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        paths = [str(self.code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        connection, remote = Pipe()
        with self._server_log.open("ab") as log, remote:
            server = subprocess.Popen(
                # -P: workers import from `code`, not from the current folder
                [sys.executable, "-P", "-m", "jobs.local.forkserver", str(remote.fileno()), *self.preload],
                pass_fds=[remote.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **FORKABLE, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C reaches only the launcher, which asks for checkpoints
            )
        return server, connection

    @property
    def _server_log(self) -> Path:
        return self.layout.logs / "forkserver.log"

    def _events(self, seconds: float) -> list[dict[str, Any]]:
        if self._server is None:
            return []
        server, connection = self._server
        found: list[dict[str, Any]] = []
        try:
            while connection.poll(0 if found else seconds):
                found.append(json.loads(connection.recv_bytes()))
        except (EOFError, OSError) as error:
            if not found:
                raise InternalError(
                    f"the process that starts workers died with status {server.wait()}: see {self._server_log}; "
                    "nothing that is finished is lost: run the same command again"
                ) from error
        return found

    def _handle(self, event: Mapping[str, Any]) -> EndedTask | None:
        key = event["ended"]
        task = self._tasks.get(key)
        if task is None:
            return None
        pid, how, folder = int(event["pid"]), Exit(event["code"], event["signal"]), self.layout.stage(task.node.stage, key)
        if how.code not in RECORDED_EXITS:
            # On this machine only the kernel sends SIGKILL unasked, for want of memory.
            concurrent = task.needs.share - 1
            failure = class_of_death(how.signal, stopping=self._stopping, concurrent=concurrent, oom_killed=True, at_limit=task.killed)
            record_death(folder, task.node, pid, failure, how, str(self._log(task)))
        if how.code == 0 and task.needs.gpus:
            self._peaks[task.kind] = larger_peak(self._peaks.get(task.kind), measured_peak([(folder, key)]))
        elif task.needs.share > 1 and was_crowded(folder):
            self._most[task.kind] = max(1, task.needs.share // 2)
        return self._end(task, how.code, how.signal, unclaimed=how.code not in (0, 3) and attempt_of(folder, pid) is None)

    def _end(self, task: _Task, code: int | None, signal: int | None, *, unclaimed: bool) -> EndedTask:
        """Remove a task that has ended. `unclaimed`: it has left no record."""
        node = task.node
        self._tasks.pop(node.key, None)
        if unclaimed:
            departure = Departure(node.key, task.name, "", task.submitted, file_time(self.layout.root), launch=self.place.launched)
            self._departures.setdefault(node.key, []).append(departure)
        if read_result(self.layout.stage(node.stage, node.key), node.key) is None:
            self._return_dependants(node.key)
        return EndedTask((node.key,), code, signal, self._log(task))

    def _log(self, task: _Task) -> Path:
        return self.layout.log_of(task.node.stage, task.node.key)

    def _return_dependants(self, key: str) -> None:
        """Remove the waiting tasks that need a stage, directly or not."""
        for dependant in [each for each, task in self._tasks.items() if key in task.node.upstream.values() and not task.started]:
            if self._tasks.pop(dependant, None) is not None:
                self._return_dependants(dependant)
