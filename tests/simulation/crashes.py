"""Numbered points of a simulated process: before and after each of its effects. At one of them an event is injected.

A process is a call of production code inside `running`. Changes of files (rename, link, unlink) are points by themselves; the simulated
client of Slurm has its own. A point may kill the process: then nothing that it still does, in `finally` for instance, has an effect, as
after SIGKILL. Or another process, the user or the cluster acts while the process is suspended there.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

TALLY: Counter[str] = Counter()  # what the points of this session were, for people


class Killed(BaseException):
    """The simulated process is dead."""


@dataclass
class Process:
    """One process; `act` happens at its point number `at` (from 1; 0: never), among those whose name holds `kind`."""

    name: str
    at: int = 0
    kind: str = ""
    act: Callable[[], None] | None = None
    dead: bool = False
    points: list[str] = field(default_factory=list)

    def reach(self, what: str) -> None:
        """Reach the next point."""
        if self.dead:
            raise Killed
        TALLY["points"] += 1
        if self.kind not in what:
            return
        self.points.append(what)
        if len(self.points) == self.at and self.act is not None:
            TALLY[f"at {what}"] += 1
            with _switched(None):
                try:
                    self.act()
                except Killed:
                    self.dead = True
                    raise


_running: list[Process | None] = []


def current() -> Process | None:
    """The simulated process whose code runs now; None: the test itself, or the simulated cluster."""
    return _running[-1] if _running else None


def reach(what: str) -> None:
    """A point of the running process, if there is one."""
    process = current()
    if process is not None:
        process.reach(what)


def kill() -> None:
    """What happens at a point where the process dies."""
    raise Killed


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """Code in this block belongs to the process."""
    with _switched(process):
        yield process


@contextlib.contextmanager
def instrumented() -> Iterator[None]:
    """Make changes of files points, and skip fsync."""
    with contextlib.ExitStack() as stack:
        for verb in ("replace", "rename", "hardlink_to", "unlink"):
            stack.enter_context(mock.patch.object(Path, verb, _with_points(verb, getattr(Path, verb))))
        stack.enter_context(mock.patch.object(os, "fsync", return_value=None))
        yield


@contextlib.contextmanager
def _switched(process: Process | None) -> Iterator[None]:
    _running.append(process)
    try:
        yield
    finally:
        _running.pop()


def _with_points(verb: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def changed(path: Path, *arguments: Any, **options: Any) -> Any:
        process = current()
        if process is None:
            return original(path, *arguments, **options)
        target = path.name if verb in ("hardlink_to", "unlink") else Path(arguments[0]).name
        if target.startswith("."):  # a temporary file, which nobody reads
            if process.dead:
                raise Killed
            return original(path, *arguments, **options)
        kind = _kind_of(path if verb in ("hardlink_to", "unlink") else Path(arguments[0]))
        process.reach(f"before {verb} {kind}")
        value = original(path, *arguments, **options)
        process.reach(f"after {verb} {kind}")
        return value

    return changed


def _kind_of(path: Path) -> str:
    """The kind of a file, without the names of single stages and submissions."""
    known = ("submissions", "ended", "tasks", "scripts", "attempts")
    return "/".join([*(part for part in path.parts if part in known), path.name if path.parent.name not in known else ""])
