"""Facts that planning is based on: stages in flight, finished or failed, what their next attempt requests, jobs that left the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto

from jobs.experiment.graph import Graph, with_upstream
from jobs.store.failures import FailureClass

OUTSIDE = "-"  # in place of a partition: computed outside of Slurm


class Phase(Enum):
    """Where a stage stands in the queue of an executor."""

    queued = "queued"
    running = "running"


@dataclass(frozen=True)
class InFlight:
    """A stage that is queued or running in an executor."""

    phase: Phase
    job: str  # what other jobs may depend on: Slurm `JOB` or `ARRAY_INDEX`; for the local executor a name of its own


@dataclass(frozen=True)
class Pending:
    """Why a stage in Slurm's queue has no node yet, and since when it is there."""

    reason: str  # as squeue prints it; "": none given
    since: float  # when it was submitted, seconds since the epoch


@dataclass(frozen=True)
class Request:
    """What the next attempt of a stage requests beyond its resources: learnt from failed attempts and from finished siblings."""

    relief: int = 0  # how often memory ran out: the work of one forward pass is halved that many times
    memory_factor: float = 1.0  # multiplies the requested memory
    exclude: tuple[str, ...] = ()  # Slurm nodes, sorted
    minutes: int | None = None  # for one stage of a task, predicted (jobs.control.estimates); None: as configured
    memory_gb: float | None = None  # per node, likewise

    @property
    def identity(self) -> dict[str, object]:
        """The part that distinguishes two requests for the same stages: predictions may change while sbatch is running."""
        return {"relief": self.relief, "memory_factor": self.memory_factor, "exclude": self.exclude}


@dataclass(frozen=True)
class Asked:
    """What an array requested from Slurm for each of its elements, and what it would have requested as configured."""

    minutes: int
    memory_mb: int  # per node
    configured_minutes: int
    configured_mb: int

    @property
    def less_time(self) -> bool:
        return self.minutes < self.configured_minutes

    @property
    def less_memory(self) -> bool:
        return self.memory_mb < self.configured_mb


class Shortage(Flag):
    """What was requested by prediction, less than configured, and was not enough."""

    none = 0
    time = auto()
    memory = auto()


@dataclass(frozen=True, slots=True)
class StageFacts:
    """The state of one stage, by its records and the failure policy."""

    done: bool = False
    failures: int = 0  # attempts since the last launch that count against the budgets (interruptions and lost nodes do not)
    stopped: str = ""  # why it is not retried; "": it may be
    error: str = ""  # of the last attempt, in one line
    failure: FailureClass | None = None  # of the last attempt
    executed_by: str = ""  # the job or process with a live claim, possibly of another launcher
    settling: bool = False  # its last job has left the queue, and Slurm has not reported yet how it ended
    attempts: int = 0  # executions ever started
    ended: int = 0  # of them, those that ended without a result
    seconds: float = 0.0  # of the attempt that ended in the result
    all_seconds: float = 0.0  # of all attempts since the last start without a checkpoint; not done: so far
    memory: int = 0  # bytes of the largest process at its peak, 0: unknown; not done: requested for its node, and not enough
    mapped: int = 0  # of them, pages of files, which the kernel can drop
    on_gpu: bool = False  # computed on a GPU
    processes: int = 0  # of its process group; 0: unknown
    threads: int = 0  # per process; 0: unknown
    partition: str = ""  # Slurm's, or `OUTSIDE`; "": unknown
    node: str = ""  # Slurm's name, or its list of several, of where the result was computed; "": unknown, or outside of Slurm
    finished: float = 0.0  # when the result was written, seconds since the epoch
    ua: float | None = None  # percent, of a result that has one
    diverged: str = ""  # why the run does not count, with or without a result
    cancelled: bool = False  # by the user, and not launched again since
    request: Request = Request()  # of the next attempt
    bad_nodes: tuple[str, ...] = ()  # Slurm nodes that failed under it, one entry per failure
    faulty_nodes: tuple[str, ...] = ()  # those of them with evidence by errors that no other node has (jobs.control.faulty_nodes)
    lost_jobs: tuple[str, ...] = ()  # jobs that left the queue and whose workers recorded no outcome
    short_of: Shortage = Shortage.none  # requested as configured from now on
    not_before: float = 0.0  # earliest time of the next attempt, seconds since the epoch; 0: now

    @property
    def awaited(self) -> bool:
        """An attempt is running, or Slurm has not reported yet how the last one ended: nothing is submitted meanwhile."""
        return bool(self.executed_by) or self.settling


@dataclass(frozen=True)
class Departure:
    """An array element that has left Slurm's queue, as the records of submissions describe it for one of its stages."""

    key: str
    job: str  # `ARRAY_INDEX`
    state: str  # the last one in accounting; "" if there is none; `CANCELLED by UID` if a user cancelled it
    submitted: float  # seconds since the epoch
    gone: float  # when it was first missing from the queue, seconds since the epoch
    withdrawn: bool = False  # cancelled by the program itself
    asked: Asked | None = None  # for the element; None: not recorded
    ended: float | None = None  # end by Slurm's accounting, seconds since the epoch; None: not known
    launch: float = 0.0  # number of the launch that submitted it (jobs.store.launches); 0: not recorded
    node: str = ""  # on which it ended in the state FAILED; "": not recorded, or several


@dataclass(frozen=True)
class Blamed:
    """A node that failed under an attempt, or may have."""

    node: str  # Slurm's name
    started: float  # of the attempt, seconds since the epoch
    launch: float  # number of the last launch before it (jobs.store.launches); 0: not known
    error: str = ""  # in one line, if the node alone may be its cause (jobs.control.faulty_nodes); "": Slurm says that the node failed


def needed_keys(graph: Graph, facts: Mapping[str, StageFacts]) -> tuple[str, ...]:
    """Keys of the runs and of every stage still to be computed for them, upstream first.

    Stages upstream of a finished stage are not needed: they are not computed again even if their results are gone.
    """
    return with_upstream(graph, (run.key for run in graph.runs), lambda key: key not in facts or not facts[key].done)
