"""Progress of a launch in the foreground: first what is reused and what is computed, then a bar on a terminal, or lines elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.commands.console import say
from jobs.control.facts import Phase, needed_keys
from jobs.text import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from jobs.control.controller import Event, Report


def opening_line(name: str, report: Report) -> str:
    """How many stages have a result and are reused, and how many of each kind have none and are needed."""
    graph, plan = report.graph, report.plan
    impossible = {*plan.given_up, *plan.blocked, *plan.held_or_cancelled}
    missing = [key for key in needed_keys(graph, report.facts) if not report.facts[key].done]
    kinds = Counter(graph.nodes[key].stage for key in missing if key not in impossible)
    wanted = ", ".join(f"{count} {stage}" for stage, count in kinds.items())
    without = sum(key in impossible for key in missing)
    parts = [f"{len(plan.reused)} reused", f"{kinds.total()} to compute{f' ({wanted})' if wanted else ''}"]
    parts.extend([f"{without} not possible (given up, held or cancelled)"] if without else [])
    return f"{name}: {counted(len(graph.runs), 'run')}, {counted(len(graph.nodes), 'stage')}: {', '.join(parts)}"


class StageProgress:
    """Shows how many stages are done. Without a bar, lines that differ from the last one are printed."""

    def __init__(self, name: str, bar: Progress | None = None) -> None:
        self._name, self._bar, self._last = name, bar, ""
        self._task: TaskID | None = bar.add_task(name, total=None) if bar else None

    def event(self, event: Event) -> None:
        """Print an event; above the bar, if there is one."""
        say(event.line)
        sys.stdout.flush()
        self._update(event.done, event.total)

    def look(self, report: Report) -> None:
        """Show how many stages are done, running and waiting after a pass."""
        done = sum(fact.done for fact in report.facts.values())
        flights = [report.in_flight[key] for key in report.plan.waiting if key in report.in_flight]  # not those whose result is there
        running = sum(flight.phase is Phase.running for flight in flights)
        counts = f"{running} running, {len(report.plan.waiting) - running} in the queue"
        line = f"{self._name}: {done} of {counted(len(report.graph.nodes), 'stage')} done, {counts}"
        if self._bar is None and line != self._last:
            say(line)
            sys.stdout.flush()
        self._last = line
        self._update(done, len(report.graph.nodes), f"{self._name}: {counts}")

    def _update(self, done: int, total: int, what: str | None = None) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=what or self._name)


@contextmanager
def stage_progress(name: str, console: Console | None = None) -> Iterator[StageProgress]:
    """A bar at the bottom of the terminal while the block runs; printed lines stay above it. Not a terminal: no bar.

    `console`: of rich, for the bar; default: stdout.
    """
    if console is None and not sys.stdout.isatty():
        yield StageProgress(name)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("stages"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield StageProgress(name, bar)
