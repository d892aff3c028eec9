"""What an executor is to the controller: the batches it is given, its limits, and the calls it answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jobs.control.facts import Departure, InFlight, Request
from jobs.experiment.graph import Graph


@runtime_checkable
class NotesDepartures(Protocol):
    """An executor that knows what has left it."""

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Key -> its elements that have left the queue, oldest first."""


@runtime_checkable
class SeesQueue(NotesDepartures, Protocol):
    """An executor that can name every job in the queue, and what has left it."""

    def live_jobs(self) -> frozenset[str] | None:
        """`JOB` or `ARRAY_INDEX` of all jobs that run or wait, whoever submitted them; None if that is not known now."""

    def settling(self) -> frozenset[str]:
        """Keys of elements that have left the queue a short while ago, and it is not known yet how they ended."""


class Ended(Protocol):
    """A task that is over."""

    @property
    def keys(self) -> tuple[str, ...]: ...


class Executor(Protocol):
    """Runs tasks somewhere."""

    def limits(self) -> Limits:
        """What may be submitted now."""

    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> where it stands, for every stage this executor holds."""

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Take a batch; a task starts only after the jobs that hold its upstream stages have ended well.

        Returns the keys it took: those of a batch that was not taken, or only in part, are planned again in the next pass.
        """

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Withdraw what is queued, not running, of these keys; returns the keys that were withdrawn."""


class NearbyExecutor(Executor, Protocol):
    """An executor that this process waits for, and whose tasks it can ask to leave."""

    @property
    def idle(self) -> bool:
        """Nothing waits or runs there."""

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Wait for a task to end, at most `seconds`; returns the tasks that have ended."""

    def stop(self, *, grace: float, hurry: Callable[[], bool]) -> Sequence[Ended]:
        """Ask all tasks to write a checkpoint and leave; end what is left after `grace` seconds, or as soon as `hurry` says so."""


@dataclass(frozen=True)
class Limits:
    """What a site allows; 0: no limit."""

    array_size: int = 0  # tasks in one array (Slurm's MaxArraySize is a limit on the index: size 1001 allows indices 0 to 1000)
    queue_room: int = 0  # tasks that may be submitted in this pass; negative: the queue is full, none


@dataclass(frozen=True)
class Task:
    """Stages computed by one array element, one after another or several at once (jobs.worker.packing); by one process, or a team."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Tasks of one stage and method that are submitted together: one job array."""

    stage: str
    method: str
    tasks: tuple[Task, ...]
    request: Request = Request()  # noqa: RUF009 - frozen, and holds only immutable values
    gone: tuple[str, ...] = ()  # jobs known to be gone that once held one of its stages: their workers need not be waited for

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all tasks."""
        return tuple(key for task in self.tasks for key in task.keys)
