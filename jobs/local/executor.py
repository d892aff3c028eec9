"""Runs tasks on this machine: as many at once as cores, GPUs and memory allow, the longest chains first, and no more.

Workers are forked from a server that has imported the heavy packages already (jobs.local.forkserver). A task starts only when
nothing upstream
of it is held here any more; when an upstream stage ends without a result, what waited for it is handed back and planned again.

Where `resources.STAGE.at_once` says so, tasks share a GPU: so many, or (0) as many as fit by the memory that a finished stage of the same
kind has used. One that runs out of memory on a GPU it shared is then given a whole one, and fewer of its kind share the others.
"""

from __future__ import annotations

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
from jobs.worker.deaths import ENDS_OF_ITS_OWN, attempt_of, class_of_death, state_end
from jobs.worker.machine import Capacity, Needs, Peak, Room, fits, fitting, larger, measured_peak, processes_here, was_crowded, whole
from jobs.worker.processes import FORKABLE
from jobs.worker.task import Workplace, describe, description_to_json

REPOSITORY = Path(__file__).resolve().parents[2]
LEAVE_SECONDS = 10.0  # for the fork server, once it has no workers


@dataclass(frozen=True)
class Ended:
    """A task that is over, however it ended."""

    keys: tuple[str, ...]
    code: int | None  # exit code
    signal: int | None  # that killed it
    log: Path


@dataclass
class _Held:
    """A task this executor has taken."""

    name: str
    keys: tuple[str, ...]
    node: Node  # the first: its stage says what the task needs, its key names the log
    graph: Graph
    upstream: frozenset[str]
    needs: Needs
    priority: float
    log: Path
    relief: int
    gone: tuple[str, ...]
    submitted: float  # seconds since the epoch
    crowded: bool = False  # it has run out of memory on a GPU that it shared
    devices: tuple[str, ...] = ()
    running: bool = False


@dataclass
class LocalExecutor(NearbyExecutor):
    """Holds tasks of one experiment and runs them.

    `resources` says what a stage is given, by name; `preload` names modules (or `module:function`) that the fork server imports before the
    first fork; `code` is the folder that workers import from, `environment` is added to theirs; they wait `lag_seconds` for
    what another machine has finished to be seen on this one. Use it in a `with` block: no process outlives it.
    """

    place: Workplace
    layout: Layout
    resources: Callable[[str], Resources]
    capacity: Capacity
    preload: Sequence[str] = ()
    code: Path = REPOSITORY
    environment: Mapping[str, str] = field(default_factory=dict)
    lag_seconds: float = 0.0
    _held: dict[str, _Held] = field(default_factory=dict)
    _of_key: dict[str, str] = field(default_factory=dict)
    _server: subprocess.Popen[bytes] | None = None
    _partial: bytes = b""
    _taken: int = 0
    _stopping: bool = False
    _wordless: dict[str, list[Departure]] = field(default_factory=dict)
    _peaks: dict[tuple[str, str], Peak | None] = field(default_factory=dict)  # (stage, method) -> what its finished ones used at most
    _most: dict[tuple[str, str], int] = field(default_factory=dict)  # (stage, method) -> how many may share a GPU, since that was too many
    _critical: tuple[Graph | None, dict[str, float]] = (None, {})

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def limits(self) -> Limits:
        """None: what does not fit now waits here."""
        return Limits()

    def in_flight(self) -> Mapping[str, InFlight]:
        """Every stage that waits or runs here."""
        return {key: _in_flight(self._held[name]) for key, name in self._of_key.items()}

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Take all tasks of a batch, each stage as a task of its own: a start costs next to nothing here."""
        if self._critical[0] is not graph:
            self._critical = (graph, critical_minutes(graph, lambda stage: float(self.resources(stage).minutes)))
        taken: dict[str, InFlight] = {}
        for key in batch.keys:
            node = graph.nodes[key]
            self._taken += 1
            held = _Held(
                name=f"local-{os.getpid()}-{self._taken}",
                keys=(key,),
                node=node,
                graph=graph,
                upstream=frozenset(node.upstream.values()),
                needs=whole(self.resources(node.stage), self.capacity),
                priority=self._critical[1][key],
                log=self.layout.log_of(node.stage, node.key),
                relief=batch.request.relief,
                gone=batch.gone,
                submitted=time.time(),
                crowded=was_crowded(self.layout.stage(node.stage, key)),
            )
            self._held[held.name] = held
            self._of_key[key] = held.name
            taken[key] = _in_flight(held)
        return taken

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Hand back what waits here of these keys."""
        waiting = [self._held[self._of_key[key]] for key in keys if key in self._of_key]
        for held in waiting:
            if not held.running:
                self._forget(held)
        return tuple(key for held in waiting if not held.running for key in held.keys)

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Tasks that failed before they had claimed an attempt: the only ones that left no word in the files."""
        return {key: tuple(self._wordless[key]) for key in keys if key in self._wordless}

    @property
    def idle(self) -> bool:
        """Nothing waits or runs here."""
        return not self._held

    def wait(self, seconds: float) -> tuple[Ended, ...]:
        """Start what fits, then wait for a task to end, at most `seconds`; returns the tasks that have ended, oldest first.

        Raises InternalError when the fork server has died.
        """
        self._start_what_fits()
        if self._server is None:
            return ()
        return tuple(filter(None, (self._take_in(event) for event in self._events(seconds))))

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> tuple[Ended, ...]:
        """Ask all workers to write a checkpoint and leave; kill what is left after `grace` seconds, or as soon as `hurry` says so."""
        self._stopping = True
        for held in [held for held in self._held.values() if not held.running]:
            self._forget(held)
        ended: list[Ended] = []
        for request, patience in (("terminate", grace), ("kill", LEAVE_SECONDS)):
            if self._held:
                self._ask({request: list(self._held)})
            deadline = time.monotonic() + patience
            while self._held and time.monotonic() < deadline and not (request == "terminate" and hurry()):
                ended.extend(self.wait(0.1))
        return tuple(ended)

    def close(self) -> None:
        """End the fork server, and with it whatever still runs."""
        if self._server is None:
            return
        server, self._server = self._server, None
        if self._held and server.poll() is None:
            _send(server, {"kill": list(self._held)})
        for pipe in (server.stdin, server.stdout):
            if pipe is not None:
                pipe.close()
        try:
            server.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    def _start_what_fits(self) -> None:
        if self._stopping:
            return
        running = [held for held in self._held.values() if held.running]
        ready = [held for held in self._held.values() if not held.running and not any(key in self._of_key for key in held.upstream)]
        ready.sort(key=lambda held: -held.priority)
        in_use = [(held.needs, held.devices) for held in running]
        for held in ready:
            held.needs = replace(held.needs, share=self._share(held))
        for index, devices in fitting([held.needs for held in ready], in_use, self.capacity):
            self._start(ready[index], devices)

    def _share(self, held: _Held) -> int:
        """How many tasks like this one may be on one GPU at the same time."""
        wanted, kind = at_once_of(self.resources(held.node.stage)), (held.node.stage, held.node.method)
        if held.crowded or held.needs.gpus != 1:
            return 1
        if wanted == 0:
            if kind not in self._peaks:
                alike = (node for node in held.graph.nodes.values() if (node.stage, node.method) == kind)
                self._peaks[kind] = measured_peak((self.layout.stage(node.stage, node.key), node.key) for node in alike)
            peak, everything = self._peaks[kind], round(self.capacity.memory_gb * 2**30)
            wanted = fits(peak, Room(everything, self.capacity.gpu_bytes, self.capacity.cpus)) if peak else 1
        return min(wanted, self._most.get(kind, wanted))

    def _start(self, held: _Held, devices: tuple[str, ...]) -> None:
        held.running, held.devices = True, devices
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.capacity.gpus else {}
        description = describe(self.place, held.graph, [held.keys], held.relief, held.gone)
        self._ask(
            {
                "start": held.name,
                "task": description_to_json(replace(description, team=processes_here(self.resources(held.node.stage), held.needs))),
                "index": 0,
                "threads": held.needs.cpus,
                "environment": {**environment, **self.environment},
                "beside": held.needs.share - 1,
                "lag": self.lag_seconds,
                "log": str(held.log),
            }
        )

    def _ask(self, request: Mapping[str, Any]) -> None:
        if self._server is None:
            self._server = self._launch()
        _send(self._server, request)

    def _launch(self) -> subprocess.Popen[bytes]:
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        paths = [str(self.code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with self._server_log.open("ab") as log:
            return subprocess.Popen(
                # -P: workers import from `code`, not from the folder they happen to be started in
                [sys.executable, "-P", "-m", "jobs.local.forkserver", *self.preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **FORKABLE, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which asks for checkpoints
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

    def _take_in(self, event: Mapping[str, Any]) -> Ended | None:
        held = self._held.get(str(event.get("ended", "")))
        if held is None:
            return None
        ended = Ended(held.keys, event["code"], event["signal"], held.log)
        if ended.code not in ENDS_OF_ITS_OWN:
            for key in held.keys:
                self._state_end(held, held.graph.nodes[key], int(event["pid"]), ended)
        self._learn(held, int(event["pid"]), ended)
        if ended.code not in (0, 3):
            for key in held.keys:
                if attempt_of(self.layout.stage(held.graph.nodes[key].stage, key), int(event["pid"])) is None:
                    self._wordless.setdefault(key, []).append(Departure(key, held.name, "", held.submitted, time.time()))
        self._forget(held)
        for key in held.keys:
            if read_result(self.layout.stage(held.graph.nodes[key].stage, key), key) is None:
                self._hand_back_dependants(key)
        return ended

    def _state_end(self, held: _Held, node: Node, pid: int, ended: Ended) -> None:
        """State the end of an attempt whose worker could not do so itself."""
        # On this machine nobody but the kernel, for want of memory, sends SIGKILL unasked.
        failure = class_of_death(ended.signal, stopping=self._stopping, beside=held.needs.share - 1, oom_killed=True)
        folder = self.layout.stage(node.stage, node.key)
        state_end(folder, node, pid, failure, code=ended.code, signal=ended.signal, log=str(ended.log))

    def _learn(self, held: _Held, pid: int, ended: Ended) -> None:
        """From a task that has ended, how many of its kind may share a GPU."""
        kind, folder = (held.node.stage, held.node.method), self.layout.stage(held.node.stage, held.node.key)
        if ended.code == 0 and held.needs.gpus:
            self._peaks[kind] = larger(self._peaks.get(kind), measured_peak([(folder, held.node.key)]))
        elif held.needs.share > 1 and was_crowded(folder):
            self._most[kind] = max(1, held.needs.share // 2)

    def _hand_back_dependants(self, key: str) -> None:
        for name in [name for name, held in self._held.items() if key in held.upstream and not held.running]:
            held = self._held.get(name)
            if held is not None:
                self._forget(held)
                for lost in held.keys:
                    self._hand_back_dependants(lost)

    def _forget(self, held: _Held) -> None:
        del self._held[held.name]
        for key in held.keys:
            del self._of_key[key]


def _in_flight(held: _Held) -> InFlight:
    return InFlight(Phase.running if held.running else Phase.queued, held.name)


def _send(server: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    if server.stdin is None:
        return
    try:
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
    except BrokenPipeError:  # the server is dead: reading its events says so, with its status
        return
