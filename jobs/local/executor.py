"""Runs tasks on this machine: as many at once as cores, GPUs and memory allow, those on the longest chains of stages first.

Workers are forked from a server that has imported the heavy packages already (jobs.local.forkserver).

`resources.STAGE.at_once` tasks share a GPU; 0: as many as fit by the peak memory of a finished stage of the same
kind. A task that runs out of memory on a shared GPU is retried on a GPU of its own, and fewer of its kind share the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jobs.control.executor_protocol import EndedTask
from jobs.errors import InternalError
from jobs.experiment.config import at_once_of
from jobs.local.stage_tasks import EXIT_SECONDS, StageExecutor, StageTask
from jobs.worker.deaths import RECORDED_EXITS, attempt_of, class_of_death, record_death
from jobs.worker.machine import Capacity, Needs, needs_here, processes_here, tasks_to_start
from jobs.worker.memory import Peak, Room, how_many_fit, larger_peak, measured_peak, was_crowded
from jobs.worker.processes import FORKABLE, Exit
from jobs.worker.task import describe, description_to_json

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class _Task(StageTask):
    """A stage that waits or runs here."""

    needs: Needs = field(kw_only=True)
    crowded: bool = field(kw_only=True)  # it has run out of memory on a shared GPU
    devices: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[str, str]:
        """Tasks of one kind use about the same memory."""
        return self.node.stage, self.node.method


@dataclass
class LocalExecutor(StageExecutor[_Task]):
    """Runs tasks of one experiment.

    `preload`: modules (or `module:function`) that the fork server imports before the first fork. `code`: the folder that workers import
    from. `environment` is added to theirs. `lag_seconds`: how long they wait for files of another machine to become visible.
    """

    capacity: Capacity
    preload: Sequence[str] = ()
    code: Path = REPOSITORY
    environment: Mapping[str, str] = field(default_factory=dict)
    lag_seconds: float = 0.0
    _server: tuple[subprocess.Popen[bytes], Connection] | None = None
    _peaks: dict[tuple[str, str], Peak | None] = field(default_factory=dict)  # kind of task -> largest peak of finished ones
    _most: dict[tuple[str, str], int] = field(default_factory=dict)  # kind of task -> how many may share a GPU, after one was crowded

    def wait(self, seconds: float) -> tuple[EndedTask, ...]:
        """Start the tasks that fit, then wait at most `seconds` for one to end; returns the tasks that have ended, oldest first.

        Raises InternalError if the fork server has died.
        """
        self._start_what_fits()
        return tuple(filter(None, (self._handle(event) for event in self._events(seconds))))

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

    def _task(self, task: StageTask) -> _Task:
        stage = task.node.stage
        needs, crowded = needs_here(self.resources(stage), self.capacity), was_crowded(self.layout.stage(stage, task.node.key))
        return _Task(**vars(task), needs=needs, crowded=crowded)

    def _request_end(self, step: int) -> None:
        self._send({"kill" if step else "terminate": list(self._tasks)})

    def _start_what_fits(self) -> None:
        if self._stopping:
            return
        in_use = [(task.needs, task.devices) for task in self._tasks.values() if task.started]
        ready = self._ready()
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
        task.started, task.devices = True, devices
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.capacity.gpus else {}
        description = describe(self.place, task.graph, [[task.node.key]], task.batch.request.relief, task.batch.gone)
        self._send(
            {
                "start": task.node.key,
                "task": description_to_json(replace(description, team=processes_here(self.resources(task.node.stage), task.needs))),
                "index": 0,
                "threads": task.needs.cpus,
                "environment": {**environment, **self.environment},
                "concurrent": task.needs.share - 1,
                "lag": self.lag_seconds,
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
            failure = class_of_death(how.signal, stopping=self._stopping, concurrent=task.needs.share - 1, oom_killed=True)
            record_death(folder, task.node, pid, failure, how, str(self._log(task)))
        if how.code == 0 and task.needs.gpus:
            self._peaks[task.kind] = larger_peak(self._peaks.get(task.kind), measured_peak([(folder, key)]))
        elif task.needs.share > 1 and was_crowded(folder):
            self._most[task.kind] = max(1, task.needs.share // 2)
        return self._end(task, how.code, how.signal, unclaimed=how.code not in (0, 3) and attempt_of(folder, pid) is None)
