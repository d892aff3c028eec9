"""The team: the processes that compute one stage together. The job system implements it; `Alone` is a team of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Team(Protocol):
    """The team as seen by one of its processes."""

    @property
    def rank(self) -> int:
        """Global rank. Rank 0, the leader, alone writes artifacts and checkpoints, and its stage result counts."""

    @property
    def size(self) -> int:
        """World size."""

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node: the index of this process's GPU."""

    def share(self, value: str = "") -> str:
        """Return the leader's `value` in every process; a collective call. Raises ConnectionError if a process of the team has exited."""

    def advance(self, within: float) -> None:
        """Report progress to the watchdog: if the next report does not come `within` seconds, this process counts as hung. 0: no limit."""


@dataclass(frozen=True)
class Alone:
    """A team of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def share(self, value: str = "") -> str:
        return value

    def advance(self, within: float) -> None:
        del within
