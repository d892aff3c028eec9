"""Runs tasks on this machine: as many at once as cores, GPUs and memory allow, those on the longest chains of stages first.

Workers are forked from a server that has imported the heavy packages already (jobs.local.forkserver). A task starts only when none of its
upstream stages waits or runs here; if an upstream stage ends without a result, the tasks that waited for it are returned to the planner.

If `resources.STAGE.at_once` says so, tasks share a GPU: that many, or (0) as many as fit by the peak memory of a finished stage of the same
kind. A task that runs out of memory on a shared GPU is retried on a GPU of its own, and fewer of its kind share the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.control.executor_protocol import Batch, Limits, NearbyExecutor
from jobs.control.facts import Departure, InFlight, Phase
from jobs.control.plan import critical_minutes
from jobs.errors import InternalError
from jobs.experiment.config import Resources, at_once_of
from jobs.experiment.graph import Graph, Node
from jobs.store.layout import Layout
from jobs.store.records import read_result
from jobs.worker.deaths import RECORDED_EXITS, attempt_of, class_of_death, record_death
from jobs.worker.machine import Capacity, Needs, needs_here, processes_here, tasks_to_start
from jobs.worker.memory import Peak, Room, how_many_fit, larger_peak, measured_peak, was_crowded
from jobs.worker.processes import FORKABLE, Exit
from jobs.worker.task import Workplace, describe, description_to_json

REPOSITORY = Path(__file__).resolve().parents[2]
EXIT_SECONDS = 10.0  # for the fork server to exit, and for killed workers to end


@dataclass(frozen=True)
class Ended:
    """A task that has ended, successfully or not. Exit code and signal: one of the two is None."""

    keys: tuple[str, ...]
    code: int | None
    signal: int | None
    log: Path


@dataclass
class _Task:
    """A stage that waits or runs here."""

    name: str
    node: Node
    graph: Graph
    needs: Needs
    priority: float
    log: Path
    relief: int
    gone: tuple[str, ...]
    submitted: float  # seconds since the epoch
    crowded: bool = False  # it has run out of memory on a shared GPU
    devices: tuple[str, ...] = ()
    running: bool = False

    @property
    def kind(self) -> tuple[str, str]:
        """Tasks of one kind use about the same memory."""
        return self.node.stage, self.node.method

    @property
    def in_flight(self) -> InFlight:
        return InFlight(Phase.running if self.running else Phase.queued, self.name)


@dataclass
class LocalExecutor(NearbyExecutor):
    """Runs tasks of one experiment.

    `resources`: what a stage may use, by name. `preload`: modules (or `module:function`) that the fork server imports before the first
    fork. `code`: the folder that workers import from. `environment` is added to theirs. `lag_seconds`: how long they wait for files of
    another machine to become visible. Use it in a `with` block: no process outlives it.
    """

    place: Workplace
    layout: Layout
    resources: Callable[[str], Resources]
    capacity: Capacity
    preload: Sequence[str] = ()
    code: Path = REPOSITORY
    environment: Mapping[str, str] = field(default_factory=dict)
    lag_seconds: float = 0.0
    _tasks: dict[str, _Task] = field(default_factory=dict)  # by key
    _server: subprocess.Popen[bytes] | None = None
    _partial: bytes = b""
    _submitted: int = 0
    _stopping: bool = False
    _unclaimed: dict[str, list[Departure]] = field(default_factory=dict)
    _peaks: dict[tuple[str, str], Peak | None] = field(default_factory=dict)  # kind of task -> largest peak of finished ones
    _most: dict[tuple[str, str], int] = field(default_factory=dict)  # kind of task -> how many may share a GPU, after one was crowded
    _critical: tuple[Graph | None, dict[str, float]] = (None, {})

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def limits(self) -> Limits:
        """No limits: tasks that do not fit now wait here."""
        return Limits()

    def in_flight(self) -> Mapping[str, InFlight]:
        """Every stage that waits or runs here."""
        return {key: task.in_flight for key, task in self._tasks.items()}

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Accept all stages of a batch, each as a task of its own: starting a process is cheap here."""
        if self._critical[0] is not graph:
            self._critical = (graph, critical_minutes(graph, lambda stage: float(self.resources(stage).minutes)))
        for key in batch.keys:
            node = graph.nodes[key]
            self._submitted += 1
            self._tasks[key] = _Task(
                name=f"local-{os.getpid()}-{self._submitted}",
                node=node,
                graph=graph,
                needs=needs_here(self.resources(node.stage), self.capacity),
                priority=self._critical[1][key],
                log=self.layout.log_of(node.stage, node.key),
                relief=batch.request.relief,
                gone=batch.gone,
                submitted=time.time(),
                crowded=was_crowded(self.layout.stage(node.stage, key)),
            )
        return {key: self._tasks[key].in_flight for key in batch.keys}

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Remove the tasks of these keys that have not started; returns their keys."""
        waiting = tuple(key for key in keys if key in self._tasks and not self._tasks[key].running)
        for key in waiting:
            del self._tasks[key]
        return waiting

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Tasks that failed before they claimed an attempt: no record of theirs is in the files."""
        return {key: tuple(self._unclaimed[key]) for key in keys if key in self._unclaimed}

    @property
    def idle(self) -> bool:
        """Nothing waits or runs here."""
        return not self._tasks

    def wait(self, seconds: float) -> tuple[Ended, ...]:
        """Start the tasks that fit, then wait at most `seconds` for one to end; returns the tasks that have ended, oldest first.

        Raises InternalError if the fork server has died.
        """
        self._start_what_fits()
        if self._server is None:
            return ()
        return tuple(filter(None, (self._handle(event) for event in self._events(seconds))))

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> tuple[Ended, ...]:
        """Ask all workers to write a checkpoint and exit; kill those left after `grace` seconds, or as soon as `hurry` returns True."""
        self._stopping = True
        self.cancel(list(self._tasks))
        ended: list[Ended] = []
        for request, patience in (("terminate", grace), ("kill", EXIT_SECONDS)):
            if self._tasks:
                self._send({request: list(self._tasks)})
            deadline = time.monotonic() + patience
            while self._tasks and time.monotonic() < deadline and not (request == "terminate" and hurry()):
                ended.extend(self.wait(0.1))
        return tuple(ended)

    def close(self) -> None:
        """End the fork server and its workers."""
        if self._server is None:
            return
        if self._tasks and self._server.poll() is None:
            self._send({"kill": list(self._tasks)})
        server, self._server = self._server, None
        for pipe in (server.stdin, server.stdout):
            if pipe is not None:
                pipe.close()
        try:
            server.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    def _start_what_fits(self) -> None:
        if self._stopping:
            return
        in_use = [(task.needs, task.devices) for task in self._tasks.values() if task.running]
        ready = [task for task in self._tasks.values() if not task.running and self._tasks.keys().isdisjoint(task.node.upstream.values())]
        ready.sort(key=lambda task: -task.priority)
        for task in ready:
            task.needs = replace(task.needs, share=self._share(task))
        for index, devices in tasks_to_start([task.needs for task in ready], in_use, self.capacity):
            self._start(ready[index], devices)

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
        task.running, task.devices = True, devices
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.capacity.gpus else {}
        description = describe(self.place, task.graph, [[task.node.key]], task.relief, task.gone)
        self._send(
            {
                "start": task.node.key,
                "task": description_to_json(replace(description, team=processes_here(self.resources(task.node.stage), task.needs))),
                "index": 0,
                "threads": task.needs.cpus,
                "environment": {**environment, **self.environment},
                "concurrent": task.needs.share - 1,
                "lag": self.lag_seconds,
                "log": str(task.log),
            }
        )

    def _send(self, request: Mapping[str, Any]) -> None:
        """Send a request to the fork server, starting it if needed. If it has died, `_events` raises an error with its status."""
        if self._server is None:
            self._server = self._launch_server()
        if self._server.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._server.stdin.write(json.dumps(request).encode() + b"\n")
                self._server.stdin.flush()

    def _launch_server(self) -> subprocess.Popen[bytes]:
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        paths = [str(self.code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with self._server_log.open("ab") as log:
            return subprocess.Popen(
                # -P: workers import from `code`, not from the current folder
                [sys.executable, "-P", "-m", "jobs.local.forkserver", *self.preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **FORKABLE, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C reaches only the launcher, which asks for checkpoints
            )

    @property
    def _server_log(self) -> Path:
        return self.layout.logs / "forkserver.log"

    def _events(self, seconds: float) -> list[dict[str, Any]]:
        if self._server is None or self._server.stdout is None:
            return []
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        received = os.read(self._server.stdout.fileno(), 1 << 16)
        if not received:
            raise InternalError(
                f"the process that starts workers died with status {self._server.wait()}: see {self._server_log}; "
                "nothing that is finished is lost: run the same command again"
            )
        *lines, self._partial = (self._partial + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def _handle(self, event: Mapping[str, Any]) -> Ended | None:
        key = event["ended"]
        task = self._tasks.pop(key, None)
        if task is None:
            return None
        pid, how, folder = int(event["pid"]), Exit(event["code"], event["signal"]), self.layout.stage(task.node.stage, key)
        if how.code not in RECORDED_EXITS:
            # On this machine only the kernel sends SIGKILL unasked, for want of memory.
            failure = class_of_death(how.signal, stopping=self._stopping, concurrent=task.needs.share - 1, oom_killed=True)
            record_death(folder, task.node, pid, failure, how, str(task.log))
        if how.code == 0 and task.needs.gpus:
            self._peaks[task.kind] = larger_peak(self._peaks.get(task.kind), measured_peak([(folder, key)]))
        elif task.needs.share > 1 and was_crowded(folder):
            self._most[task.kind] = max(1, task.needs.share // 2)
        if how.code not in (0, 3) and attempt_of(folder, pid) is None:
            self._unclaimed.setdefault(key, []).append(Departure(key, task.name, "", task.submitted, time.time()))
        if read_result(folder, key) is None:
            self._return_dependants(key)
        return Ended((key,), how.code, how.signal, task.log)

    def _return_dependants(self, key: str) -> None:
        """Remove the waiting tasks that need a stage, directly or not."""
        for dependant in [each for each, task in self._tasks.items() if key in task.node.upstream.values() and not task.running]:
            if self._tasks.pop(dependant, None) is not None:
                self._return_dependants(dependant)
