"""Values that the processes of a team post for one another while they compute a stage: the addresses at which their libraries connect.

A process posts a value under a key; the leader forwards it to all others over the team's authenticated connections, as JSON. A process may
post for a stage before another has been told of it: values are kept by the number of the stage's request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jobs.worker.team_channel import TeamError

POLL_SECONDS = 0.2  # between two looks at whether a process of the team was lost


@dataclass
class Board:
    """What has been posted, as one process knows it. Any thread may use it."""

    _posted: dict[int, dict[str, str]] = field(default_factory=dict)  # number of the request -> key -> value
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def clear_before(self, number: int) -> None:
        """Remove what was posted for earlier requests."""
        with self._changed:
            self._posted = {each: values for each, values in self._posted.items() if each >= number}

    def put(self, number: int, key: str, value: str) -> None:
        """Keep a value, and wake up those who wait for it."""
        with self._changed:
            self._posted.setdefault(number, {})[key] = value
            self._changed.notify_all()

    def find(self, number: int, key: str, seconds: float, check: Callable[[], None] = lambda: None) -> str:
        """The value of a key. TeamError if there is none in time; `check` is called while waiting, and raises if waiting cannot help."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while key not in self._posted.get(number, {}):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TeamError(f"no process of the team has posted {key!r} for {seconds:g} s")
                check()
                self._changed.wait(min(left, POLL_SECONDS))
            return self._posted[number][key]
