"""Data-parallel training: collective operations of a process group; a stage in one process uses the same interface without communication.

Every process holds the whole model and optimiser state. The micro-batches of a step are distributed, their gradients summed, and each
process takes the same optimiser step. Flags (whether to stop, which parameters have a gradient) are exchanged as small CPU tensors, so that
no step waits for a GPU.
"""

from __future__ import annotations

import contextlib
import json
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

from ser_core.errors import Interrupted, first_line
from ser_core.parallel.rendezvous import interface_for_gloo, rendezvous
from ser_core.parallel.team import Team

BUCKET = 8 << 20  # float32 elements per all-reduce: 32 MiB
ABORT_SECONDS = 10.0  # for NCCL to abort its pending operations; it may itself wait for a process that has exited
CUDA_BACKEND = "cpu:gloo,cuda:nccl"
# NCCL's watchdog would kill this process as soon as another is lost, before the cause is recorded. The job system ends the processes.
NCCL_WATCHDOG_OFF = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Group:
    """A group of one process: collectives return their input. `DistributedGroup` is a group of several processes."""

    rank = 0
    size = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process has rank 0, which alone writes artifacts and checkpoints."""
        return self.rank == 0

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, computed in float32. Shapes and order must be the same in all processes."""

    def all_reduce(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums over the processes of a few float64 numbers; one that is 0 in all processes but one is transferred exactly."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.all_reduce(np.array([float(flag)]))[0])

    def broadcast_json(self, value: Any) -> Any:
        """Return the leader's value, a JSON value: in a team of several processes tuples become lists."""
        return value

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the leader's."""

    def gather(self, own: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """Return the tensors (rows[rank], ...) float32 of all processes on the CPU in the leader, an empty list in the others."""
        del rows
        return [own.cpu()]

    def barrier(self) -> None:
        """Wait until all processes have called it."""

    def expect_progress(self) -> None:
        """Report progress to the job system's watchdog, which ends a process that misses its next report."""

    def suspend_watchdog(self) -> None:
        """Suspend the watchdog: the work that follows may take any time and does not communicate."""


class DistributedGroup(Group):
    """Several processes, each of which has called `process_group`.

    Every collective ends within the group's timeout; if a process has exited or does not answer, the others raise ConnectionError.
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

    def broadcast_json(self, value: Any) -> Any:
        return json.loads(self._team.share(json.dumps(value) if self.is_leader else ""))

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
        # Twice the timeout: this process may wait that long for another, which may itself compute that long.
        self._team.advance(2 * self._seconds)

    def suspend_watchdog(self) -> None:
        self._team.advance(0)

    @contextlib.contextmanager
    def _communication_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(f"process {self.rank} of {self.size} cannot reach the others: {first_line(error)}") from error


@contextlib.contextmanager
def process_group(team: Team, device: torch.device, seconds: float) -> Iterator[Group]:
    """Context with the process group of a team, destroyed on leaving. `seconds` is the timeout of its collectives.

    gloo for CPU tensors, NCCL for CUDA tensors. Raises ConnectionError if the group cannot be formed.
    """
    if team.size == 1:
        yield Group()
        return
    if dist.is_initialized():
        raise ConnectionError(f"process {team.rank} of {team.size}: the process group of the previous stage could not be destroyed")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for name, value in NCCL_WATCHDOG_OFF.items():
            os.environ.setdefault(name, value)
    store, address = rendezvous(team, seconds)
    backend = CUDA_BACKEND if device.type == "cuda" else "gloo"
    try:
        with interface_for_gloo(address):
            dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.size, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ConnectionError) as error:
        raise ConnectionError(f"process {team.rank} of {team.size}: no process group: {first_line(error)}") from error
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
        with contextlib.suppress(ConnectionError):  # an error here must not hide the outcome of the stage
            group.suspend_watchdog()


def abort() -> None:
    """Abort the process group without waiting for the other processes: destroying an NCCL group waits for all of them."""
    thread = threading.Thread(target=dist.distributed_c10d._abort_process_group, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_SECONDS)


def require_equal(group: Group, what: str, own: str) -> None:
    """Raise ConnectionError if `own` differs from the leader's: the job is then retried on other nodes."""
    leaders = group.broadcast_json(own)
    if leaders != own:
        who = f"process {group.rank} of {group.size}"
        raise ConnectionError(f"{who} has {what} {own}, process 0 has {leaders}: ask for machines that are alike")


def sum_gradients(
    group: Group, parameters: Sequence[nn.Parameter], logged: Tensor, values: Sequence[float]
) -> tuple[Tensor, Sequence[float]]:
    """Sum the gradients over the processes in place; return the sums of `logged` (a device tensor) and `values` (numbers on the CPU).

    A parameter that no micro-batch of the step has used (layer drop) keeps no gradient, as in one process: the optimiser skips it.
    """
    if group.size == 1:
        return logged, values
    present = [parameter.grad is not None for parameter in parameters]
    sums = group.all_reduce(np.array([*values, *present], dtype=np.float64)).tolist()
    used = [parameter for parameter, processes in zip(parameters, sums[len(values) :], strict=True) if processes]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    total = logged.clone()
    group.all_reduce_([*(parameter.grad for parameter in used if parameter.grad is not None), total])
    return total, sums[: len(values)]


def buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Group consecutive positions so that the sizes of a group add up to at most `limit`; a larger one is a group of its own."""
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
    """Context for work without communication: if it raises Interrupted in one process, all raise it when all have left the context."""
    stopped: Interrupted | None = None
    group.suspend_watchdog()
    try:
        yield
    except Interrupted as ending:
        stopped = ending
    if group.any(stopped is not None):
        raise stopped or Interrupted("another process was asked to stop")


def broadcast_tensors(group: Group, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the leader's CPU tensors, group name -> tensor name -> tensor, in every process."""
    shapes = group.broadcast_json(
        {name: [(key, list(each.shape), str(each.dtype)) for key, each in named.items()] for name, named in tensors.items()}
    )
    if not group.is_leader:
        tensors = {
            name: {key: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch."))) for key, shape, dtype in keys}
            for name, keys in shapes.items()
        }
    group.broadcast_(each for named in tensors.values() for each in named.values())
    return {name: dict(named) for name, named in tensors.items()}
