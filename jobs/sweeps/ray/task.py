"""The Ray task of one stage: computes it with a fork server, on the CPUs and GPUs that Ray has assigned.

The fork server is kept for the next stage, so that heavy packages are imported once per Ray worker. The stage runs in its own child
process: its GPU memory is freed when it ends, and killing it does not kill the worker. If the worker dies, the server's pipe is closed, and
the stage writes a checkpoint (jobs.local.forkserver).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.control.executor_protocol import Batch, EndedTask, Task
from jobs.control.facts import Request
from jobs.errors import InternalError
from jobs.experiment.config import Resources
from jobs.experiment.graph import Graph, Node
from jobs.local.executor import LocalExecutor
from jobs.signals import Interrupts
from jobs.store.attempts import JOB_VARIABLE
from jobs.store.layout import Layout
from jobs.worker.machine import Capacity, Needs
from jobs.worker.stage import LAG_SECONDS
from jobs.worker.task import Workplace

SLICE_SECONDS = 0.2  # delay of a request to stop, which does not interrupt a wait


@dataclass(frozen=True)
class Order:
    """One stage to compute, with everything that the worker needs."""

    job: str  # unique name of this task, recorded in the claim of the stage
    place: Workplace
    layout: Layout
    code: Path
    preload: tuple[str, ...]
    node: Node
    parents: tuple[Node, ...]
    resources: Resources  # of the stage, as configured
    needs: Needs  # requested from Ray
    relief: int
    gone: tuple[str, ...]  # jobs with claims of the stage that are known to have ended
    grace: float  # seconds for a checkpoint

    @property
    def graph(self) -> Graph:
        nodes = {each.key: each for each in (*self.parents, self.node)}
        return Graph(nodes, (), self.place.corpus, self.place.corpus_digest, dict.fromkeys(nodes, ()))

    @property
    def batch(self) -> Batch:
        return Batch(self.node.stage, self.node.method, (Task((self.node.key,)),), Request(self.relief), self.gone)


@dataclass(frozen=True)
class Answer:
    """How the process of a stage ended."""

    code: int | None
    signal: int | None = None
    unclaimed: bool = False  # it ended before it claimed an attempt, so there is no record of it


STOPPED = Answer(3)  # before it started


class _Kept:
    """The executor of this process with its fork server, kept while orders have the same workplace and code."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._executor: LocalExecutor | None = None

    def get(self, order: Order) -> LocalExecutor:
        of = (order.place, order.layout, order.code, order.preload)
        if self._executor is None or self._of != of:
            self.drop()
            self._of = of
            self._executor = LocalExecutor(
                order.place, order.layout, lambda stage: order.resources, Capacity(0, (), 0.0), order.preload, order.code
            )
        return self._executor

    def drop(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()


_KEPT = _Kept()


def compute(order: Order) -> Answer:
    """Compute the stage of an order. The first interrupt by `ray.cancel` asks for a checkpoint, the second kills the stage."""
    from ray import get_gpu_ids

    executor = _KEPT.get(order)
    devices = in_order(get_gpu_ids())
    executor.capacity = capacity_given(order.needs, devices)
    executor.lag_seconds = LAG_SECONDS  # its inputs may have been written on another node
    executor.resources = lambda stage: replace(order.resources, at_once=order.needs.share)
    # Set for every stage: the server was started with the GPUs of an earlier one, and a stage without GPUs must not see any.
    executor.environment = {JOB_VARIABLE: order.job, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    ended: list[EndedTask] = []
    with Interrupts() as interrupts:
        try:
            executor.submit(order.batch, order.graph, {})
            while not executor.idle:
                ended.extend(executor.wait(SLICE_SECONDS))
                if interrupts.count and not executor.idle:
                    ended.extend(executor.stop(grace=order.grace, hurry=lambda: interrupts.count > 1))
                    break
        except BaseException:
            _KEPT.drop()
            raise
        if interrupts.count:
            _KEPT.drop()  # a stopped executor starts no more stages
    if not ended:
        return STOPPED
    unclaimed = bool(executor.departures([order.node.key]).get(order.node.key))
    return Answer(ended[-1].code, ended[-1].signal, unclaimed)


def capacity_given(needs: Needs, devices: Sequence[str]) -> Capacity:
    """The assigned resources of one stage. InternalError if the number of GPUs differs from the request. Pure."""
    if len(devices) != needs.gpus:
        raise InternalError(f"Ray assigned GPUs {', '.join(devices) or 'none'}, but {needs.gpus} were requested")
    return Capacity(needs.cpus, tuple(devices), needs.memory_gb)


def in_order(devices: Sequence[int | str]) -> tuple[str, ...]:
    """GPU ids for CUDA_VISIBLE_DEVICES in ascending order: Ray gives a set. Pure."""
    names = [str(device) for device in devices]
    return tuple(sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))
