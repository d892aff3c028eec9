"""Facts about a stage that planning is based on: its phase in the queue, its attempts, and the jobs that have left the queue."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

OUTSIDE = "-"  # in place of a partition: computed outside of Slurm


class Phase(Enum):
    """Where a stage stands in somebody's queue."""

    queued = "queued"
    running = "running"


@dataclass(frozen=True)
class InFlight:
    """A stage that an executor holds now."""

    phase: Phase
    job: str  # what others may depend on: Slurm `JOB` or `ARRAY_INDEX`; for the local executor its own name


@dataclass(frozen=True)
class Request:
    """What the next attempt of a stage asks for beside its resources: learnt from attempts that failed, and from finished siblings."""

    relief: int = 0  # how often memory ran out: the work of one forward pass is halved that many times
    memory_factor: float = 1.0  # on the memory asked for
    exclude: tuple[str, ...] = ()  # nodes, sorted
    minutes: int | None = None  # for one stage of a task, predicted (jobs.control.estimates); None: as configured
    memory_gb: float | None = None  # per node, likewise

    @property
    def identity(self) -> dict[str, object]:
        """What tells two requests for the same stages apart: what is predicted may change while sbatch is on its way."""
        return {"relief": self.relief, "memory_factor": self.memory_factor, "exclude": self.exclude}


@dataclass(frozen=True)
class Asked:
    """What an array asked of Slurm for each of its elements, and what it would have asked as configured."""

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


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the files say of one stage."""

    done: bool = False
    failures: int = 0  # attempts since the last launch that cost (interruptions and lost nodes do not)
    stopped: str = ""  # why it is not tried again by itself; "": it may be
    error: str = ""  # what ended the last attempt, in one line
    failure: str = ""  # its class, a name of jobs.store.failures.FailureClass
    held: str = ""  # who executes it now, known from a live claim; its holder may be another launcher
    attempts: int = 0  # executions ever begun
    ended: int = 0  # of them, those that are over and left no result
    seconds: float = 0.0  # of the attempt that ended in the result
    all_seconds: float = 0.0  # of all attempts since it was last begun anew; not done: so far
    memory: int = 0  # bytes that a process took at its peak, 0: not known; not done: what was asked for its node, and not enough
    mapped: int = 0  # of them, pages of files, which the kernel can drop
    on_gpu: bool = False  # computed there
    processes: int = 0  # of its team; 0: not known
    threads: int = 0  # of each; 0: not known
    partition: str = ""  # of Slurm that it was computed in, or `OUTSIDE`; "": not known
    finished: float = 0.0  # when the result was written, seconds since the epoch
    ua: float | None = None  # percent, of a result that has one
    diverged: str = ""  # why the run does not count, with or without a result
    cancelled: bool = False  # by the user, and not launched again since
    request: Request = Request()  # of the next attempt
    bad_nodes: tuple[str, ...] = ()  # that failed under it, one entry for each time
    gone: tuple[str, ...] = ()  # jobs that have left the queue and whose worker said nothing
    short_of_time: bool = False  # a predicted time limit was not enough: as configured from now on
    short_of_memory: bool = False  # likewise


@dataclass(frozen=True)
class Departure:
    """An element that has left Slurm's queue, as the records of submissions tell it of one of its stages."""

    key: str
    job: str  # `ARRAY_INDEX`
    state: str  # the last that accounting gave; "" where it does not say; `CANCELLED by UID` of a cancellation by hand
    submitted: float  # seconds since the epoch
    gone: float  # when it was first seen missing
    ours: bool = False  # the program itself cancelled it
    asked: Asked | None = None  # for the element; None: not on record
