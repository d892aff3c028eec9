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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError

from jobs.control.executor_protocol import EndedTask, Task
from jobs.experiment.config import Resources, at_once_of
from jobs.experiment.graph import Node
from jobs.local.executor import REPOSITORY
from jobs.local.stage_tasks import EXIT_SECONDS, StageExecutor, StageTask
from jobs.store.layout import Layout
from jobs.store.records import attempt_numbers, read_claim
from jobs.sweeps.ray.task import STOPPED, Answer, Order, compute
from jobs.worker.machine import Capacity, Needs, needs_here
from jobs.worker.memory import was_crowded

GRACE_SECONDS = 60.0  # for a checkpoint
MACHINES_SECONDS = 5.0  # the list of Ray's machines is cached for so long


@dataclass
class _RayTask(StageTask):
    """A stage that waits or runs as a task of Ray."""

    needs: Needs | None = None  # requested from Ray
    reference: Any = None  # ObjectRef, once it was submitted to Ray
    running: bool = False  # it has a claim of this task


@dataclass
class RayStages(StageExecutor[_RayTask]):
    """Computes stages of one experiment as Ray tasks.

    Use it in a driver or an actor of Ray. The arguments are those of LocalExecutor.
    """

    # The first interrupt asks for a checkpoint, the second kills the stage, the third kills the Ray worker.
    kill_seconds = (EXIT_SECONDS, EXIT_SECONDS)

    code: Path = REPOSITORY
    preload: Sequence[str] = ()
    grace: float = GRACE_SECONDS
    _prefix: str = field(default_factory=lambda: f"ray-{uuid.uuid4().hex[:12]}", init=False)
    _machines: tuple[float, tuple[Capacity, ...]] = (0.0, ())
    _remote: Any = None

    def wait(self, seconds: float) -> tuple[EndedTask, ...]:
        """Submit ready stages to Ray, then wait at most `seconds` for a task to end; returns the ended tasks."""
        if not self._stopping:
            self._submit_ready()
        tasks = {task.reference: task for task in self._tasks.values() if task.started}
        if not tasks:
            if self._tasks:
                time.sleep(seconds)
            return ()
        if not ray.wait(list(tasks), num_returns=1, timeout=seconds)[0]:
            return ()
        ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        return tuple(self._collect(tasks[reference]) for reference in ended)

    def close(self) -> None:
        """End all running tasks."""
        if self._tasks and ray.is_initialized():
            self.stop(grace=EXIT_SECONDS)
        self._tasks.clear()

    def _task(self, task: StageTask) -> _RayTask:
        return _RayTask(**vars(task))

    def _request_end(self, step: int) -> None:
        for task in self._tasks.values():
            ray.cancel(task.reference, force=step == 2, recursive=False)

    def _runs(self, task: _RayTask) -> bool:
        task.running = task.running or (task.started and _claimed_by(task.name, self.layout, task.node))
        return task.running

    # ---- to Ray

    def _submit_ready(self) -> None:
        machines = self._live_machines()
        for task in self._tasks.values():  # one that fits on no machine any more would wait in Ray's queue forever
            if task.started and task.needs is not None and not any(fits(task.needs, each) for each in machines) and machines:
                self._withdraw(task)
                task.reference, task.started, task.running, task.name = None, False, False, self._new_name()
        for task in self._ready() if machines else ():
            self._begin(task, machines)

    def _begin(self, task: _RayTask, machines: Iterable[Capacity]) -> None:
        configured = self.resources(task.node.stage)
        wanted = replace(configured, memory_gb=configured.memory_gb * task.batch.request.memory_factor)
        crowded = was_crowded(self.layout.stage(task.node.stage, task.node.key))
        task.needs = needs_of(wanted, machines, alone=crowded)
        nodes = {key: task.graph.nodes[key] for key in (*task.node.upstream.values(), task.node.key)}
        order = Order(
            job=task.name,
            place=self.place,
            layout=self.layout,
            code=self.code,
            preload=tuple(self.preload),
            batch=replace(task.batch, tasks=(Task((task.node.key,)),)),
            graph=replace(task.graph, nodes=nodes, runs=(), children=dict.fromkeys(nodes, ()), superseded=()),
            resources=configured,
            needs=task.needs,
            grace=self.grace,
        )
        if self._remote is None:
            # Ray workers are reused, also those with GPUs: stages run in child processes, so no GPU memory stays allocated.
            self._remote = ray.remote(max_calls=0, max_retries=0)(compute)
        task.started, task.reference = True, self._remote.options(**options_of(task.needs), name=task.node.name).remote(order)

    def _withdraw(self, task: _RayTask) -> None:
        if task.started:
            ray.cancel(task.reference, force=False, recursive=False)

    def _live_machines(self) -> tuple[Capacity, ...]:
        if time.monotonic() - self._machines[0] > MACHINES_SECONDS or not self._machines[1]:
            self._machines = (time.monotonic(), machines_of(ray.nodes()))
        return self._machines[1]

    # ---- from Ray

    def _collect(self, task: _RayTask) -> EndedTask:
        try:
            answer: Answer = ray.get(task.reference)
        except TaskCancelledError:
            answer = STOPPED
        except RayError as error:
            answer = Answer(None, unclaimed=True)
            _note(self._log(task), f"{task.node.name}: task {task.name} of Ray ended: {type(error).__name__}: {error}")
        return self._end(task, answer.code, answer.signal, unclaimed=answer.unclaimed)


def needs_of(resources: Resources, machines: Iterable[Capacity], *, alone: bool = False) -> Needs:
    """The resources that a stage requests from Ray: as configured, limited to the largest machine. Pure.

    `alone`: without sharing a GPU, as it ran out of memory on a shared one.
    """
    needs = max((needs_here(resources, machine) for machine in machines), key=lambda each: (each.gpus, each.cpus, each.memory_gb))
    share = max(1, at_once_of(resources)) if needs.gpus == 1 and not alone else 1
    return replace(needs, share=share)


def options_of(needs: Needs) -> dict[str, Any]:
    """The same as options of a Ray task. `SPREAD`: evenly over the machines, outside the placement group of the trial. Pure."""
    return {
        "num_cpus": needs.cpus,
        "num_gpus": needs.gpus / needs.share,
        "memory": int(needs.memory_gb * 2**30),
        "scheduling_strategy": "SPREAD",
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
