"""Executor that runs the stages of a sweep as Ray tasks, like jobs.local.executor.LocalExecutor on the machines of a Ray cluster.

Each stage is one task that requests the CPUs, GPUs and memory of `resources.STAGE`. It is submitted to Ray once no upstream stage is
pending here, so that no task waits on allocated resources. Claims in the store ensure that a stage is computed once, although several
trials may submit it.

A task that is killed, with its worker or its machine, does not fail its stage: the claim expires, and the plan repeats the stage from its
checkpoint. Ray does not retry tasks.
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
MACHINES_SECONDS = 5.0  # the list of Ray's machines is cached for so long
PAUSE_SECONDS = 0.1  # between polls while stopping


@dataclass
class _StageTask:
    """A stage that was submitted to this executor and has not ended."""

    job: str
    node: Node
    graph: Graph
    priority: float
    batch: Batch
    submitted: float  # seconds since the epoch
    needs: Needs | None = None  # requested from Ray
    task: Any = None  # ObjectRef, once it was submitted to Ray
    running: bool = False  # it has a claim of this task


@dataclass
class RayStages(NearbyExecutor):
    """Computes stages of one experiment as Ray tasks.

    Use it in a driver or an actor of Ray, in a `with` block, which ends its tasks. The arguments are those of LocalExecutor.
    """

    place: Workplace
    layout: Layout
    resources: Callable[[str], Resources]
    code: Path = REPOSITORY
    preload: Sequence[str] = ()
    grace: float = GRACE_SECONDS
    _name: str = field(default_factory=lambda: f"ray-{uuid.uuid4().hex[:12]}")
    _stages: dict[str, _StageTask] = field(default_factory=dict)  # by key
    _jobs: int = 0
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
        """No limits: Ray queues tasks that do not fit."""
        return Limits()

    def in_flight(self) -> Mapping[str, InFlight]:
        """Every stage that waits or runs in this executor."""
        return {key: self._flight(entry) for key, entry in self._stages.items()}

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Accept all stages of a batch, each as its own task."""
        if self._critical[0] is not graph:
            self._critical = (graph, critical_minutes(graph, lambda stage: float(self.resources(stage).minutes)))
        for key in batch.keys:
            entry = _StageTask("", graph.nodes[key], graph, self._critical[1][key], batch, time.time())
            entry.job = self._new_job()
            self._stages[key] = entry
        return {key: self._flight(self._stages[key]) for key in batch.keys}

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Cancel the waiting stages of these keys and return their keys. A stage that is just starting writes a checkpoint."""
        waiting = [key for key in keys if key in self._stages and self._flight(self._stages[key]).phase is Phase.queued]
        for key in waiting:
            self._withdraw(self._stages.pop(key))
        return tuple(waiting)

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Tasks that ended without a record: killed, lost with their machine, or failed before they claimed an attempt."""
        return {key: tuple(self._departures[key]) for key in keys if key in self._departures}

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs in this executor."""
        return not self._stages

    def wait(self, seconds: float) -> tuple[Ended, ...]:
        """Submit ready stages to Ray, then wait at most `seconds` for a task to end; returns the ended tasks."""
        if not self._stopping:
            self._submit_ready()
        tasks = {entry.task: entry for entry in self._stages.values() if entry.task is not None}
        if not tasks:
            if self._stages:
                time.sleep(seconds)
            return ()
        if not ray.wait(list(tasks), num_returns=1, timeout=seconds)[0]:
            return ()
        ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        return tuple(self._collect(tasks[task]) for task in ended)

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> tuple[Ended, ...]:
        """Ask all workers to write a checkpoint and exit; kill those left after `grace` seconds, or once `hurry()` is true."""
        self._stopping = True
        for key in [key for key, entry in self._stages.items() if entry.task is None]:
            del self._stages[key]
        ended: list[Ended] = []
        # The first interrupt asks for a checkpoint, the second kills the stage, the third kills the Ray worker.
        for attempt, patience in enumerate((grace, EXIT_SECONDS, EXIT_SECONDS)):
            for entry in self._stages.values():
                ray.cancel(entry.task, force=attempt == 2, recursive=False)
            deadline = time.monotonic() + patience
            while self._stages and time.monotonic() < deadline and not (attempt == 0 and hurry()):
                ended.extend(self.wait(PAUSE_SECONDS))
        return tuple(ended)

    def close(self) -> None:
        """End all running tasks."""
        if self._stages and ray.is_initialized():
            self.stop(grace=EXIT_SECONDS)
        self._stages.clear()

    def _new_job(self) -> str:
        self._jobs += 1
        return f"{self._name}-{self._jobs}"

    def _flight(self, entry: _StageTask) -> InFlight:
        if not entry.running and entry.task is not None:
            entry.running = _claimed_by(entry.job, self.layout, entry.node)
        return InFlight(Phase.running if entry.running else Phase.queued, entry.job)

    # ---- to Ray

    def _submit_ready(self) -> None:
        machines = self._live_machines()
        for entry in self._stages.values():  # a task that fits on no machine any more would wait in Ray's queue forever
            if entry.task is not None and entry.needs is not None and not any(fits(entry.needs, each) for each in machines) and machines:
                self._withdraw(entry)
                entry.task, entry.running, entry.job = None, False, self._new_job()
        waiting = [entry for entry in self._stages.values() if entry.task is None]
        ready = [entry for entry in waiting if not any(key in self._stages for key in entry.node.upstream.values())]
        for entry in sorted(ready, key=lambda entry: -entry.priority) if machines else ():
            self._begin(entry, machines)

    def _begin(self, entry: _StageTask, machines: Iterable[Capacity]) -> None:
        configured, request = self.resources(entry.node.stage), entry.batch.request
        wanted = replace(configured, memory_gb=configured.memory_gb * request.memory_factor)
        crowded = was_crowded(self.layout.stage(entry.node.stage, entry.node.key))
        entry.needs = needs_of(wanted, machines, alone=crowded)
        order = Order(
            job=entry.job,
            place=self.place,
            layout=self.layout,
            code=self.code,
            preload=tuple(self.preload),
            node=entry.node,
            parents=tuple(entry.graph.nodes[key] for key in dict.fromkeys(entry.node.upstream.values())),
            resources=configured,
            needs=entry.needs,
            relief=request.relief,
            gone=entry.batch.gone,
            grace=self.grace,
        )
        if self._remote is None:
            # Ray workers are reused, also those with GPUs: stages run in child processes, so no GPU memory stays allocated.
            self._remote = ray.remote(max_calls=0, max_retries=0)(compute)
        entry.task = self._remote.options(**options_of(entry.needs), name=entry.node.name).remote(order)

    def _withdraw(self, entry: _StageTask) -> None:
        if entry.task is not None:
            ray.cancel(entry.task, force=False, recursive=False)

    def _live_machines(self) -> tuple[Capacity, ...]:
        if time.monotonic() - self._machines[0] > MACHINES_SECONDS or not self._machines[1]:
            self._machines = (time.monotonic(), machines_of(ray.nodes()))
        return self._machines[1]

    # ---- from Ray

    def _collect(self, entry: _StageTask) -> Ended:
        key, log = entry.node.key, self.layout.log_of(entry.node.stage, entry.node.key)
        try:
            answer: Answer = ray.get(entry.task)
        except TaskCancelledError:
            answer = STOPPED
        except RayError as error:
            answer = Answer(None, unclaimed=True)
            _note(log, f"{entry.node.name}: task {entry.job} of Ray ended: {type(error).__name__}: {error}")
        if answer.unclaimed:
            self._departures.setdefault(key, []).append(Departure(key, entry.job, "", entry.submitted, time.time()))
        del self._stages[key]
        if read_result(self.layout.stage(entry.node.stage, key), key) is None:
            self._drop_dependants(key)
        return Ended((key,), answer.code, answer.signal, log)

    def _drop_dependants(self, key: str) -> None:
        for lost in [lost for lost, entry in self._stages.items() if key in entry.node.upstream.values() and entry.task is None]:
            if self._stages.pop(lost, None) is not None:
                self._drop_dependants(lost)


def needs_of(resources: Resources, machines: Iterable[Capacity], *, alone: bool = False) -> Needs:
    """The resources that a stage requests from Ray: as configured, limited to the largest machine. Pure.

    `alone`: without sharing a GPU, as it ran out of memory on a shared one.
    """
    needs = max((needs_here(resources, machine) for machine in machines), key=lambda each: (each.gpus, each.cpus, each.memory_gb))
    share = max(1, at_once_of(resources)) if needs.gpus == 1 and not alone else 1
    return replace(needs, share=share)


def options_of(needs: Needs) -> dict[str, Any]:
    """The same as options of a Ray task. `DEFAULT`: on any machine, outside the placement group of the trial. Pure."""
    return {
        "num_cpus": needs.cpus,
        "num_gpus": needs.gpus / needs.share,
        "memory": int(needs.memory_gb * 2**30),
        "scheduling_strategy": "DEFAULT",
    }


def machines_of(nodes: Iterable[Mapping[str, Any]]) -> tuple[Capacity, ...]:
    """Resources of the live machines, from `ray.nodes()`; GPU ids are numbered from 0, as Ray only counts them. Pure."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    return tuple(
        Capacity(int(each["CPU"]), tuple(str(index) for index in range(int(each.get("GPU", 0)))), each.get("memory", 0.0) / 2**30)
        for each in resources
        if each.get("CPU", 0) >= 1
    )


def fits(needs: Needs, machine: Capacity) -> bool:
    """Whether an idle machine has the resources of a task. Pure."""
    return needs.cpus <= machine.cpus and needs.gpus <= len(machine.gpus) and needs.memory_gb <= machine.memory_gb


def _claimed_by(job: str, layout: Layout, node: Node) -> bool:
    folder = layout.stage(node.stage, node.key)
    claims = (read_claim(folder.attempt(number)) for number in attempt_numbers(folder)[-1:])
    return any(claim is not None and claim.slurm_job == job for claim in claims)


def _note(log: Path, line: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line.strip()}\n")
