"""Stages of a sweep as tasks of Ray: an executor like jobs.local.executor.LocalExecutor whose machines are those of a Ray.

Each stage is one task that asks Ray for the cores, GPUs and memory of `resources.STAGE`, and Ray finds it a machine. It is handed to Ray
only when nothing upstream of it is held here any more, so that nothing occupies cores while it waits. Who computes a stage is told by its
claim, as everywhere: any number of executors, in any number of trials, may ask for the same stage, and one of them computes it.

What kills a task of Ray, its worker or its machine, does not fail the stage: its claim ends, and the plan has it computed again from its
checkpoint. Ray itself tries nothing again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError

from jobs.control.executor_protocol import Batch, Limits, NearbyExecutor
from jobs.control.facts import Departure, InFlight, Phase
from jobs.control.plan import critical_minutes
from jobs.experiment.config import Resources, at_once_of
from jobs.experiment.graph import Graph, Node
from jobs.local.executor import EXIT_SECONDS, REPOSITORY, Ended
from jobs.store.layout import Layout
from jobs.store.records import attempt_numbers, read_claim, read_result
from jobs.sweeps.ray.task import STOPPED, Answer, Order, compute
from jobs.worker.machine import Capacity, Needs, needs_here
from jobs.worker.memory import was_crowded
from jobs.worker.task import Workplace

GRACE_SECONDS = 60.0  # for a checkpoint
MACHINES_SECONDS = 5.0  # how long what Ray said of its machines counts
PAUSE_SECONDS = 0.1  # between looks while stopping


@dataclass
class _Held:
    """A stage this executor has taken."""

    job: str
    node: Node
    graph: Graph
    priority: float
    batch: Batch
    submitted: float  # seconds since the epoch
    needs: Needs | None = None  # what Ray was asked for
    task: Any = None  # its ObjectRef, once it is Ray's
    running: bool = False  # as far as is known


@dataclass
class RayStages(NearbyExecutor):
    """Holds stages of one experiment and has Ray compute them.

    Inside a Ray, in a driver or an actor.

    The arguments are as for LocalExecutor. Use it in a `with` block: nothing that it has begun goes on behind it.
    """

    place: Workplace
    layout: Layout
    resources: Callable[[str], Resources]
    code: Path = REPOSITORY
    preload: Sequence[str] = ()
    grace: float = GRACE_SECONDS
    _name: str = field(default_factory=lambda: f"ray-{uuid.uuid4().hex[:12]}")
    _held: dict[str, _Held] = field(default_factory=dict)  # by key
    _taken: int = 0
    _stopping: bool = False
    _departures: dict[str, list[Departure]] = field(default_factory=dict)
    _critical: tuple[Graph | None, dict[str, float]] = (None, {})
    _machines: tuple[float, tuple[Capacity, ...]] = (0.0, ())
    _remote: Any = None

    def __enter__(self) -> RayStages:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def limits(self) -> Limits:
        """None: what does not fit now waits in Ray's queue."""
        return Limits()

    def in_flight(self) -> Mapping[str, InFlight]:
        """Every stage that waits or runs by this executor."""
        return {key: self._flight(held) for key, held in self._held.items()}

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Take all stages of a batch, each as a task of its own."""
        if self._critical[0] is not graph:
            self._critical = (graph, critical_minutes(graph, lambda stage: float(self.resources(stage).minutes)))
        for key in batch.keys:
            held = _Held("", graph.nodes[key], graph, self._critical[1][key], batch, time.time())
            held.job = self._new_job()
            self._held[key] = held
        return {key: self._flight(self._held[key]) for key in batch.keys}

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Hand back what waits of these keys. One that begins at this moment leaves a checkpoint."""
        waiting = [key for key in keys if key in self._held and self._flight(self._held[key]).phase is Phase.queued]
        for key in waiting:
            self._withdraw(self._held.pop(key))
        return tuple(waiting)

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Tasks that ended without a word of their own: killed, their machine gone, or failed before they had claimed an attempt."""
        return {key: tuple(self._departures[key]) for key in keys if key in self._departures}

    @property
    def idle(self) -> bool:
        """Nothing waits or runs by this executor."""
        return not self._held

    def wait(self, seconds: float) -> tuple[Ended, ...]:
        """Hand to Ray what can begin, then wait for a task to end, at most `seconds`; returns the tasks that have ended."""
        if not self._stopping:
            self._hand_over()
        tasks = {held.task: held for held in self._held.values() if held.task is not None}
        if not tasks:
            if self._held:
                time.sleep(seconds)
            return ()
        if not ray.wait(list(tasks), num_returns=1, timeout=seconds)[0]:
            return ()
        ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        return tuple(self._take_in(tasks[task]) for task in ended)

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> tuple[Ended, ...]:
        """Ask all workers to write a checkpoint and leave; kill what is left after `grace` seconds, or as soon as `hurry` says so."""
        self._stopping = True
        for key in [key for key, held in self._held.items() if held.task is None]:
            del self._held[key]
        ended: list[Ended] = []
        # Interrupted once, a worker of Ray asks for a checkpoint; a second time it kills; the third time it is killed itself.
        for attempt, patience in enumerate((grace, EXIT_SECONDS, EXIT_SECONDS)):
            for held in self._held.values():
                ray.cancel(held.task, force=attempt == 2, recursive=False)
            deadline = time.monotonic() + patience
            while self._held and time.monotonic() < deadline and not (attempt == 0 and hurry()):
                ended.extend(self.wait(PAUSE_SECONDS))
        return tuple(ended)

    def close(self) -> None:
        """End what still runs."""
        if self._held and ray.is_initialized():
            self.stop(grace=EXIT_SECONDS)
        self._held.clear()

    def _new_job(self) -> str:
        self._taken += 1
        return f"{self._name}-{self._taken}"

    def _flight(self, held: _Held) -> InFlight:
        if not held.running and held.task is not None:
            held.running = _claimed_by(held.job, self.layout, held.node)
        return InFlight(Phase.running if held.running else Phase.queued, held.job)

    # ---- towards Ray

    def _hand_over(self) -> None:
        machines = self._alive()
        for held in self._held.values():  # what no machine can compute any more waits in Ray's queue for ever
            if held.task is not None and held.needs is not None and not any(fits(held.needs, each) for each in machines) and machines:
                self._withdraw(held)
                held.task, held.running, held.job = None, False, self._new_job()
        waiting = [held for held in self._held.values() if held.task is None]
        ready = [held for held in waiting if not any(key in self._held for key in held.node.upstream.values())]
        for held in sorted(ready, key=lambda held: -held.priority) if machines else ():
            self._begin(held, machines)

    def _begin(self, held: _Held, machines: Iterable[Capacity]) -> None:
        configured, request = self.resources(held.node.stage), held.batch.request
        wanted = replace(configured, memory_gb=configured.memory_gb * request.memory_factor)
        crowded = was_crowded(self.layout.stage(held.node.stage, held.node.key))
        held.needs = needs_of(wanted, machines, alone=crowded)
        order = Order(
            job=held.job,
            place=self.place,
            layout=self.layout,
            code=self.code,
            preload=tuple(self.preload),
            node=held.node,
            parents=tuple(held.graph.nodes[key] for key in dict.fromkeys(held.node.upstream.values())),
            resources=configured,
            needs=held.needs,
            relief=request.relief,
            gone=held.batch.gone,
            grace=self.grace,
        )
        if self._remote is None:
            # A worker of Ray is used again, also one that had a GPU: it computes nothing itself, so that nothing stays on the GPU.
            self._remote = ray.remote(max_calls=0, max_retries=0)(compute)
        held.task = self._remote.options(**options_of(held.needs), name=held.node.name).remote(order)

    def _withdraw(self, held: _Held) -> None:
        if held.task is not None:
            ray.cancel(held.task, force=False, recursive=False)

    def _alive(self) -> tuple[Capacity, ...]:
        if time.monotonic() - self._machines[0] > MACHINES_SECONDS or not self._machines[1]:
            self._machines = (time.monotonic(), machines_of(ray.nodes()))
        return self._machines[1]

    # ---- from Ray

    def _take_in(self, held: _Held) -> Ended:
        key, log = held.node.key, self.layout.log_of(held.node.stage, held.node.key)
        try:
            answer: Answer = ray.get(held.task)
        except TaskCancelledError:
            answer = STOPPED
        except RayError as error:
            answer = Answer(None, wordless=True)
            _note(log, f"{held.node.name}: task {held.job} of Ray ended: {type(error).__name__}: {error}")
        if answer.wordless:
            self._departures.setdefault(key, []).append(Departure(key, held.job, "", held.submitted, time.time()))
        del self._held[key]
        if read_result(self.layout.stage(held.node.stage, key), key) is None:
            self._hand_back_dependants(key)
        return Ended((key,), answer.code, answer.signal, log)

    def _hand_back_dependants(self, key: str) -> None:
        for lost in [lost for lost, held in self._held.items() if key in held.node.upstream.values() and held.task is None]:
            if self._held.pop(lost, None) is not None:
                self._hand_back_dependants(lost)


def needs_of(resources: Resources, machines: Iterable[Capacity], *, alone: bool = False) -> Needs:
    """What a stage asks Ray for: as configured, cut to the machine that can give most of it. Pure.

    `alone`: it has run out of memory on a GPU that it shared.
    """
    needs = max((needs_here(resources, machine) for machine in machines), key=lambda each: (each.gpus, each.cpus, each.memory_gb))
    share = max(1, at_once_of(resources)) if needs.gpus == 1 and not alone else 1
    return replace(needs, share=share)


def options_of(needs: Needs) -> dict[str, Any]:
    """The same in Ray's words. `DEFAULT`: anywhere, also where it is asked for by a trial that has a place of its own. Pure."""
    return {
        "num_cpus": needs.cpus,
        "num_gpus": needs.gpus / needs.share,
        "memory": int(needs.memory_gb * 2**30),
        "scheduling_strategy": "DEFAULT",
    }


def machines_of(nodes: Iterable[Mapping[str, Any]]) -> tuple[Capacity, ...]:
    """What the machines of a Ray have that are alive, from what `ray.nodes()` says; GPUs are counted, not named. Pure."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    return tuple(
        Capacity(int(each["CPU"]), tuple(str(index) for index in range(int(each.get("GPU", 0)))), each.get("memory", 0.0) / 2**30)
        for each in resources
        if each.get("CPU", 0) >= 1
    )


def fits(needs: Needs, machine: Capacity) -> bool:
    """Whether a machine, when nothing else runs on it, has what a task asks for. Pure."""
    return needs.cpus <= machine.cpus and needs.gpus <= len(machine.gpus) and needs.memory_gb <= machine.memory_gb


def _claimed_by(job: str, layout: Layout, node: Node) -> bool:
    folder = layout.stage(node.stage, node.key)
    claims = (read_claim(folder.attempt(number)) for number in attempt_numbers(folder)[-1:])
    return any(claim is not None and claim.slurm_job == job for claim in claims)


def _note(log: Path, line: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line.strip()}\n")
