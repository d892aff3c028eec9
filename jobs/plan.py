"""What to do next: desired graph, facts from files and the queue in, actions out. Pure, and the same for every executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from jobs.graph import Graph, Node


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
class NodeFacts:
    """What the files say of one stage."""

    done: bool = False
    failures: int = 0  # attempts that ended in a failure (interruptions do not count)
    refused: bool = False  # the last attempt ended in an error that only the user can mend
    error: str = ""  # first line of the last failure


@dataclass(frozen=True)
class Limits:
    """What a site allows; 0: no limit."""

    array_size: int = 0  # tasks in one array (Slurm's MaxArraySize is a limit on the index: size 1001 allows indices 0 to 1000)
    queue_room: int = 0  # tasks that may be submitted in this pass


@dataclass(frozen=True)
class Task:
    """Stages computed one after another by one process: an array element."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Tasks of one stage and method that are submitted together: one job array."""

    stage: str
    method: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Plan:
    """The outcome of planning; every needed key is in exactly one place."""

    reused: tuple[str, ...]
    waiting: tuple[str, ...]  # in flight
    batches: tuple[Batch, ...]  # in an order where upstream batches come first
    deferred: tuple[str, ...]  # no room in the queue now
    blocked: tuple[str, ...]  # something upstream is given up
    given_up: tuple[str, ...]  # attempts spent, or refused


class Executor(Protocol):
    """Runs tasks somewhere."""

    def limits(self) -> Limits:
        """What may be submitted now."""

    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> where it stands, for every stage this executor holds."""

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Take a batch; a task starts only after the jobs that hold its upstream stages have ended well."""


__all__ = ["Batch", "Executor", "Graph", "InFlight", "Limits", "Node", "NodeFacts", "Phase", "Plan", "Task"]
