"""The processes that compute a stage together: what a stage needs of them, and the team of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Team(Protocol):
    """As one of its processes sees it."""

    @property
    def rank(self) -> int:
        """From 0, the leader: it alone writes artifacts and checkpoints, and what its stage returns counts."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    @property
    def local_rank(self) -> int:
        """From 0 among those of this machine: which of its GPUs is ours."""

    def share(self, value: str = "") -> str:
        """What the leader gave, in every process; all call it equally often. Raises ConnectionError where one of them is gone."""

    def advance(self, within: float) -> None:
        """Tell that this process has got on, and will again within so many seconds (0: no promise); one that breaks it counts as hung."""


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
