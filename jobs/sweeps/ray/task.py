"""What a worker of Ray does with one stage: it lets a fork server compute it, with exactly the cores and GPUs that Ray has given.

The server is kept for the next stage, so that the heavy packages are imported once a worker and not once a stage. The stage itself runs in
a child of its own: what it takes on a GPU is free again when it ends, and what kills it does not kill the worker. Where the worker dies,
the server sees its end of the pipe close and has the stage write a checkpoint (jobs.local.forkserver).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.control.executor_protocol import Batch, Task
from jobs.control.facts import Request
from jobs.errors import InternalError
from jobs.experiment.config import Resources
from jobs.experiment.graph import Graph, Node
from jobs.local.executor import Ended, LocalExecutor
from jobs.signals import Interrupts
from jobs.store.attempts import JOB_VARIABLE
from jobs.store.layout import Layout
from jobs.worker.machine import Capacity, Needs
from jobs.worker.stage import LAG_SECONDS
from jobs.worker.task import Workplace

SLICE_SECONDS = 0.2  # how soon a request to stop is heard: it does not wake what waits


@dataclass(frozen=True)
class Order:
    """One stage to compute, and all that a worker has to know for it."""

    job: str  # names this task, and no other, in the claim that its stage makes
    place: Workplace
    layout: Layout
    code: Path
    preload: tuple[str, ...]
    node: Node
    parents: tuple[Node, ...]
    resources: Resources  # of the stage, as configured
    needs: Needs  # what Ray was asked for
    relief: int
    gone: tuple[str, ...]  # jobs that held the stage and are known to be gone
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
    """How the worker of a stage ended."""

    code: int | None
    signal: int | None = None
    wordless: bool = False  # it had claimed nothing: no file says that it ever was


STOPPED = Answer(3)  # before it began


class _Kept:
    """The executor of this process, with its fork server, for as long as orders come from the same place."""

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
    """Compute the stage of an order. Interrupted once, by `ray.cancel`, it asks for a checkpoint; interrupted again, it waits no longer."""
    from ray import get_gpu_ids

    executor = _KEPT.get(order)
    devices = in_order(get_gpu_ids())
    executor.capacity = capacity_given(order.needs, devices)
    executor.lag_seconds = LAG_SECONDS  # what it reads may have been computed on another node
    executor.resources = lambda stage: replace(order.resources, at_once=order.needs.share)
    # Always: the server was started with what Ray had given then, and a stage without a GPU must not see one.
    executor.environment = {JOB_VARIABLE: order.job, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    ended: list[Ended] = []
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
            _KEPT.drop()  # one that was stopped starts nothing any more
    if not ended:
        return STOPPED
    wordless = bool(executor.departures([order.node.key]).get(order.node.key))
    return Answer(ended[-1].code, ended[-1].signal, wordless)


def capacity_given(needs: Needs, devices: Sequence[str]) -> Capacity:
    """What Ray has given, for one stage that asked for all of it. Pure."""
    if len(devices) != needs.gpus:
        raise InternalError(f"Ray gave GPUs {', '.join(devices) or 'none'} where {needs.gpus} were asked for")
    return Capacity(needs.cpus, tuple(devices), needs.memory_gb)


def in_order(devices: Sequence[int | str]) -> tuple[str, ...]:
    """GPUs as CUDA_VISIBLE_DEVICES names them, in the order of the machine: Ray gives a set. Pure."""
    names = [str(device) for device in devices]
    return tuple(sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))
