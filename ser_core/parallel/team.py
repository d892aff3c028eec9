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

    @property
    def address(self) -> str:
        """IPv4 address of this machine on the network that connects the team; a loopback address if the leader is reached by one."""

    def post(self, key: str, value: str) -> None:
        """Make a value known to all processes under a key that no process has used in this stage."""

    def find(self, key: str, seconds: float) -> str:
        """Return the value that some process has posted. Raises ConnectionError if none arrives in time, or a process has exited."""

    def advance(self, within: float) -> None:
        """Report progress to the watchdog: if the next report does not come `within` seconds, this process counts as hung. 0: no limit."""


@dataclass(frozen=True)
class Alone:
    """A team of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    address: str = "127.0.0.1"

    def share(self, value: str = "") -> str:
        return value

    def post(self, key: str, value: str) -> None:
        del key, value

    def find(self, key: str, seconds: float) -> str:
        raise ConnectionError(f"nothing was posted under {key!r}: a team of one needs no rendezvous ({seconds:g} s)")

    def advance(self, within: float) -> None:
        del within
