"""What the controller needs from an executor: the calls it answers, its limits, and the batches it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.control.facts import Departure, InFlight, Request
from jobs.experiment.graph import Graph
from jobs.store.attempts import own_cluster


class Executor(ABC):
    """Executes batches of tasks: job arrays of Slurm, or processes of this machine."""

    @abstractmethod
    def limits(self) -> Limits:
        """What may be submitted now."""

    @abstractmethod
    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> phase and job of every stage that is queued or running here."""

    @abstractmethod
    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Accept a batch; a task starts only after the jobs of its upstream stages have ended well.

        Returns the accepted keys: those that were not accepted now are planned again in the next pass. Raises RequestRefusedError if
        the request itself is rejected.
        """

    @abstractmethod
    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Withdraw what is queued, not running, of these keys; returns the keys that were withdrawn."""

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Key -> its jobs that have left the queue, oldest first, as far as this executor records them."""
        return {}

    def refusals(self, keys: Collection[str]) -> Mapping[str, tuple[tuple[float, str], ...]]:
        """Key -> (time, message) of each rejection of its request since its last submission that was accepted, oldest first."""
        return {}

    def stuck(self) -> Mapping[str, str]:
        """Key -> why its queued job will never start without intervention."""
        return {}

    def live_jobs(self) -> frozenset[str] | None:
        """`JOB` or `ARRAY_INDEX` of all jobs of this user in the queue, of every experiment; None if the queue cannot be read."""
        return None

    def cluster(self) -> str:
        """Slurm's name of the cluster with that queue; "" if not known."""
        return own_cluster()

    def nodes(self) -> int:
        """How many Slurm nodes there are for its jobs, in whatever state; 0: not known."""
        return 0

    def settling(self) -> frozenset[str]:
        """Keys of jobs that have recently left the queue and whose end is not known yet."""
        return frozenset()


@dataclass(frozen=True)
class EndedTask:
    """A task that has ended, successfully or not. Exit code and signal: at least one of the two is None."""

    keys: tuple[str, ...]
    code: int | None
    signal: int | None
    log: Path


class NearbyExecutor(Executor):
    """An executor whose tasks are children of this process: it can wait for them and stop them."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Nothing is queued or running."""

    @abstractmethod
    def wait(self, seconds: float) -> tuple[EndedTask, ...]:
        """Wait at most `seconds` for a task to end; returns the tasks that have ended."""

    @abstractmethod
    def stop(self, *, grace: float, hurry: Callable[[], bool]) -> tuple[EndedTask, ...]:
        """Ask all tasks to write a checkpoint and exit; kill the rest after `grace` seconds, or as soon as `hurry` returns True."""


@dataclass(frozen=True)
class Limits:
    """Limits of a site; 0: no limit."""

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
    gone: tuple[str, ...] = ()  # jobs that executed one of its stages and have left the queue: workers need not wait for them

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all tasks."""
        return tuple(key for task in self.tasks for key in task.keys)
