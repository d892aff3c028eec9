"""One training in several processes: what they tell each other, in a group that a stage of one process uses in the same way.

Every process holds the whole model and the whole state of the optimiser. A step's parts are shared out, their gradients are summed, and
each process takes the same step. What is agreed upon by the way (whether to stop, who has a gradient at all) are small numbers on the CPU,
so that no step waits for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ser_core.errors import Interrupted
from ser_core.parallel.rendezvous import interface_for_gloo, rendezvous
from ser_core.parallel.team import Team

BUCKET = 8 << 20  # float32 numbers in one message: 32 MiB
ABORT_SECONDS = 10.0  # for NCCL to let go of what it waits for; it may itself wait for a process that is gone
# NCCL's own watch would kill this process as soon as another is lost, before anybody has said why. That is the job system's to do.
NCCL_WATCHDOG_OFF = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Group:
    """A group of one: nothing to agree upon. `DistributedGroup` is one of several."""

    rank = 0
    size = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process writes what the stage leaves behind."""
        return self.rank == 0

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over the processes into each tensor, in float32. All must give the same shapes in the same order."""

    def all_reduce(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the processes of a few numbers. Where one process alone has a number and the others 0, it arrives to the bit."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return bool(self.all_reduce(np.array([float(flag)]))[0])

    def broadcast_object(self, value: Any) -> Any:
        """The leader's value."""
        return value

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Put the leader's numbers into each tensor."""

    def gather(self, own: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """In the leader: the tensors (rows[rank], ...) float32 of all processes, on the CPU. Elsewhere: nothing."""
        del rows
        return [own.cpu()]

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def expect_progress(self) -> None:
        """Promise the job system to get on: it ends a process that has gone silent."""

    def suspend_watchdog(self) -> None:
        """Promise nothing: what follows may take any time, and talks to nobody."""


class DistributedGroup(Group):
    """Several processes, of which each has called `process_group`.

    Every wait ends after the group's timeout; where a process is gone or silent, ConnectionError is raised in the others.
    """

    def __init__(self, team: Team, seconds: float) -> None:
        self.rank = team.rank
        self.size = team.size
        self._team = team
        self._seconds = seconds

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        sent = []
        with self._communication_errors():
            for bucket in buckets([tensor.numel() for tensor in tensors], BUCKET):
                flat = torch.cat([tensors[index].detach().reshape(-1).float() for index in bucket])
                sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            with self._communication_errors():
                work.wait()
            parts = torch.split(flat, [tensors[index].numel() for index in bucket])
            for index, part in zip(bucket, parts, strict=True):
                tensors[index].detach().copy_(part.view_as(tensors[index]))

    def all_reduce(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = torch.from_numpy(np.array(values, dtype=np.float64))
        with self._communication_errors():
            dist.all_reduce(summed)
        result: NDArray[np.float64] = summed.numpy()
        return result

    def broadcast_object(self, value: Any) -> Any:
        shared = [value if self.is_leader else None]
        with self._communication_errors():
            dist.broadcast_object_list(shared, 0, device=torch.device("cpu"))
        return shared[0]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        with self._communication_errors():
            for tensor in tensors:
                own = tensor.detach()
                sent = own.contiguous()
                if sent.numel():
                    dist.broadcast(sent, 0)
                if not self.is_leader:
                    own.copy_(sent)

    def gather(self, own: Tensor, rows: Sequence[int]) -> list[Tensor]:
        own = own.detach().to("cpu", torch.float32).contiguous()
        if not self.is_leader:
            with self._communication_errors():
                if len(own):
                    dist.send(own, 0)
            return []
        found = [own]
        for rank in range(1, self.size):
            received = own.new_empty((rows[rank], *own.shape[1:]))
            with self._communication_errors():
                if len(received):
                    dist.recv(received, rank)
            found.append(received)
        return found

    def barrier(self) -> None:
        self.any(False)

    def expect_progress(self) -> None:
        # Twice: as long as this process may wait for another, and as long as that may be at work.
        self._team.advance(2 * self._seconds)

    def suspend_watchdog(self) -> None:
        self._team.advance(0)

    @contextlib.contextmanager
    def _communication_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ConnectionError(f"process {self.rank} of {self.size} cannot reach the others: {said[0]}") from error


@contextlib.contextmanager
def process_group(team: Team, device: torch.device, seconds: float) -> Iterator[Group]:
    """The group of a team, and no more of it afterwards. Nobody waits longer than `seconds` for another.

    CPU tensors travel by gloo, those of a GPU by NCCL.
    """
    if team.size == 1:
        yield Group()
        return
    if dist.is_initialized():
        raise ConnectionError(f"process {team.rank} of {team.size}: the group of the stage before could not be ended")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for name, value in NCCL_WATCHDOG_OFF.items():
            os.environ.setdefault(name, value)
    store, address = rendezvous(team, seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with interface_for_gloo(address):
            dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.size, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        raise ConnectionError(f"process {team.rank} of {team.size}: no group: {str(error).splitlines()[0]}") from error
    group = DistributedGroup(team, seconds)
    try:
        yield group
    except BaseException:
        if device.type == "cuda":
            abort()
        else:
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        with contextlib.suppress(ConnectionError):  # one that is lost now must not hide how this process ended
            group.suspend_watchdog()


def abort() -> None:
    """End the group without the others: to destroy one of NCCL's waits for all of them, and then nobody would learn what happened here."""
    thread = threading.Thread(target=dist.distributed_c10d._abort_process_group, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_SECONDS)


def require_equal(group: Group, what: str, own: str) -> None:
    """Raise ConnectionError where this process has something else than the leader: the job is then tried again on other machines."""
    leaders = group.broadcast_object(own)
    if leaders != own:
        who = f"process {group.rank} of {group.size}"
        raise ConnectionError(f"{who} has {what} {own}, process 0 has {leaders}: ask for machines that are alike")


def sum_gradients(group: Group, parameters: Sequence[nn.Parameter], shown: Tensor, told: Sequence[float]) -> tuple[Tensor, Sequence[float]]:
    """Sum the gradients over the processes, and with them `shown` (on the device) and `told` (on the CPU), whose sums are returned.

    A parameter that no part of the step has used (layer drop) keeps no gradient, as in one process: the optimiser passes it over.
    """
    if group.size == 1:
        return shown, told
    present = [parameter.grad is not None for parameter in parameters]
    sums = group.all_reduce(np.array([*told, *present], dtype=np.float64)).tolist()
    used = [parameter for parameter, processes in zip(parameters, sums[len(told) :], strict=True) if processes]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    total = shown.clone()
    group.all_reduce_([*(parameter.grad for parameter in used if parameter.grad is not None), total])
    return total, sums[: len(told)]


def buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Positions of neighbours whose sizes add up to `limit` at most; one that is larger is alone."""
    found: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not found or filled + size > limit:
            found.append([])
            filled = 0
        found[-1].append(index)
        filled += size
    return found


@contextlib.contextmanager
def stop_together(group: Group) -> Iterator[None]:
    """Around work of each process by itself: where one was asked to stop in it, Interrupted is raised in all when they are done."""
    stopped: Interrupted | None = None
    group.suspend_watchdog()
    try:
        yield
    except Interrupted as ending:
        stopped = ending
    if group.any(stopped is not None):
        raise stopped or Interrupted("another process was asked to stop")


def broadcast_tensors(group: Group, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The leader's groups of CPU tensors, in every process."""
    shapes = group.broadcast_object(
        {name: [(key, each.shape, each.dtype) for key, each in named.items()] for name, named in tensors.items()}
    )
    if not group.is_leader:
        tensors = {name: {key: torch.empty(shape, dtype=dtype) for key, shape, dtype in keys} for name, keys in shapes.items()}
    group.broadcast_(each for named in tensors.values() for each in named.values())
    return {name: dict(named) for name, named in tensors.items()}
