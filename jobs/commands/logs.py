"""`logs`: print the log of an attempt: its file, the lines of it that belong to the attempt, and new lines while the attempt runs.

On this machine all attempts of a stage append to one file; on Slurm every array element has a file, for all stages of its task. A worker
starts each attempt with a line that names it, so the lines of one attempt can be selected.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.console import note, print_lines, warn_if_changed
from jobs.commands.explain import next_step
from jobs.errors import UsageError
from jobs.experiment.graph import Node
from jobs.experiment.lookup import find_target, stages_of
from jobs.store.attempts import claim_alive, modified_at
from jobs.store.clock import file_time
from jobs.store.layout import Layout
from jobs.store.records import attempt_numbers, read_claim, read_outcome, read_result

if TYPE_CHECKING:
    from jobs.commands.session import Session

POLL_SECONDS = 0.5  # between two reads of a growing log
MISSING_SECONDS = 10.0  # for which the log of a running attempt may be missing: shared file systems lag
# jobs.experiment.graph.Node.name, with or without a date before it.
_NAMED = re.compile(r"(?:[0-9-]{10} [0-9:]{8} )?\w+ \w+ fold .+? seed [0-9]+ \[([0-9a-f]{8})\]:")


@dataclass(frozen=True)
class Log:
    """The output of one attempt."""

    node: Node
    attempt: int
    file: Path


def print_log(session: Session, run: str, *, stage: str | None, attempt: int | None, lines: int | None, follow: bool) -> bool:
    """Print the log of an attempt, by default the newest of the run's last stage that was started. Returns False if there is no log yet."""
    warn_if_changed(session)
    layout, report = session.launched.layout, session.look()
    node = choose_stage(layout, stages_of(report.graph, find_target(report.graph, run).node), stage)
    log = find_log(layout, node, attempt)
    if log is None:
        following = next_step(node.key, report.facts[node.key], report.in_flight, report.plan, session.submitter)
        note(f"{node.name}: no log yet, it was never started: {following}")
        return False
    if not follow:
        print_lines(deque(read_log(log), lines))
        return True
    try:
        print_lines(follow_log(log, lambda: attempt_over(layout, log), lines=lines))
    except KeyboardInterrupt:
        return True
    note(f"{node.name}: attempt {log.attempt} {attempt_over(layout, log)}")
    return True


def choose_stage(layout: Layout, nodes: Sequence[Node], stage: str | None) -> Node:
    """Of a run's stages, upstream first: the one named, else the last that was started, else the last of all."""
    chosen = [node for node in nodes if stage in (None, node.stage)]
    if not chosen:
        raise UsageError(f"--stage {stage}: this run has {', '.join(dict.fromkeys(node.stage for node in nodes))}")
    started = [node for node in chosen if attempt_numbers(layout.stage(node.stage, node.key))]
    return (started or chosen)[-1]


def find_log(layout: Layout, node: Node, attempt: int | None = None) -> Log | None:
    """The log of an attempt of a stage, by default the newest; None if there was none. UsageError for a number without an attempt."""
    folder = layout.stage(node.stage, node.key)
    numbers = [number for number in attempt_numbers(folder) if read_claim(folder.attempt(number)) is not None]
    if attempt is not None and attempt not in numbers:
        there = ", ".join(map(str, numbers)) or "none"
        raise UsageError(f"--attempt {attempt}: {node.name} has had {there}")
    if not numbers:
        return None
    number = numbers[-1] if attempt is None else attempt
    claim = read_claim(folder.attempt(number))
    named = Path(claim.log) if claim is not None and claim.log else layout.log_of(node.stage, node.key)
    return Log(node, number, named)


def section(lines: Sequence[str], key: str, attempt: int) -> tuple[str, ...]:
    """The lines of one attempt in a log; all lines if none marks the start of the attempt.

    The first attempt in a log includes what precedes its first line: how the job was started. Lines of other stages, computed in the
    same array element before, after or at the same time, are left out.
    """
    begins = {place: number for place, line in enumerate(lines) if (number := _attempt_started_by(line, key))}
    if attempt not in begins.values():
        return tuple(lines)
    first = max(place for place, number in begins.items() if number == attempt)
    after = min((place for place in begins if place > first), default=len(lines))
    part = lines[0 if first == min(begins) else first : after]
    return tuple(line for line in part if not _of_another(line, key))


def attempt_over(layout: Layout, log: Log) -> str:
    """How an attempt ended, in one line; "" while it runs."""
    folder = layout.stage(log.node.stage, log.node.key)
    attempt = folder.attempt(log.attempt)
    result = read_result(folder, log.node.key)
    if result is not None and result.attempt == log.attempt:
        return "done"
    outcome = read_outcome(attempt)
    if outcome is not None:
        return f"{outcome.ending.value}: {outcome.error}: {outcome.message}"
    claim, heartbeat = read_claim(attempt), modified_at(attempt.claim)
    alive = claim is not None and heartbeat > 0 and claim_alive(claim, heartbeat, live_jobs=None, now=file_time(layout.root))
    return "" if alive else "ended without a record of how"


def read_log(log: Log) -> tuple[str, ...]:
    """The lines of an attempt's log. UsageError if there is no file."""
    try:
        text = log.file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise _no_file(log) from error
    return section(text.splitlines(), log.node.key, log.attempt)


def follow_log(
    log: Log, over: Callable[[], str], *, lines: int | None = None, pause: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """The lines of an attempt's log as they are written, until it is over; `lines`: of those there already, only so many.

    `over` returns how the attempt ended, "" while it runs. UsageError if there is no file `MISSING_SECONDS` after the call.
    """
    waited = 0.0
    while not log.file.exists():
        if over() or waited >= MISSING_SECONDS:
            raise _no_file(log)
        pause(POLL_SECONDS)
        waited += POLL_SECONDS
    with log.file.open(encoding="utf-8", errors="replace") as file:
        *present, partial = file.read().split("\n")
        yield from deque(section(present, log.node.key, log.attempt), lines)
        ended = False
        while True:
            last, ended = ended, bool(over())  # one more read after the end: the worker's last line follows its record
            *new, partial = (partial + file.read()).split("\n")
            yield from (line for line in new if not _of_another(line, log.node.key))
            if last:
                break
            pause(POLL_SECONDS)
        if partial:
            yield partial


def _no_file(log: Log) -> UsageError:
    return UsageError(f"{log.node.name}: attempt {log.attempt} has no log at {log.file}")


def _of_another(line: str, key: str) -> bool:
    """Whether a line begins with the name of another stage."""
    named = _NAMED.match(line)
    return named is not None and named[1] != key[:8]


def _attempt_started_by(line: str, key: str) -> int:
    """Number of the attempt of a stage whose log starts with this line; 0 if it is another line."""
    _, found, rest = line.partition(f"[{key[:8]}]: attempt ")
    number = rest.partition(" on ")[0]
    return int(number) if found and number.isdigit() else 0
