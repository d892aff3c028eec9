"""Output of the commands: lines on stdout and stderr, and progress of long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from jobs.commands.session import Session

ResultT = TypeVar("ResultT")
COMMAND = "python launch.py"  # in messages
_spoken = {COMMAND: COMMAND}


def name_command(command: str) -> None:
    """Let messages name another command in the place of COMMAND, such as that of an installed package."""
    _spoken[COMMAND] = command


def say(line: str) -> None:
    """One line on stdout."""
    typer.echo(line.replace(COMMAND, _spoken[COMMAND]))


def note(line: str) -> None:
    """One line on stderr."""
    typer.echo(line.replace(COMMAND, _spoken[COMMAND]), err=True)


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout as they come, each flushed, so that a pipe gets the lines of a growing log at once."""
    for line in lines:
        say(line)
        sys.stdout.flush()


def warn_if_changed(session: Session) -> None:
    """A line on stderr if the code defines other stages now than at the launch."""
    if session.launched.changed:
        note(session.limits_of_look())


def with_progress(what: str, work: Callable[[Callable[[int, int], None]], ResultT]) -> ResultT:
    """Run `work` with a callback (done, total) that shows progress: a bar on a terminal, a line every ten percent elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=None)
            return work(lambda done, total: progress.update(task, completed=done, total=total))
    shown = -1

    def line(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if tenth != shown:
            shown = tenth
            note(f"{what}: {done} of {total}")

    return work(line)
