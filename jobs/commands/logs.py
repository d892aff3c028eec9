"""Logs of attempts: which file, which part of it, and how to follow it while the attempt lasts.

On this machine the attempts of a stage write one file, one after another; on Slurm an array element has one of its own, for all stages of
its task. The worker begins each attempt with a line that names it, so that its part can be cut out.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import UsageError
from jobs.experiment.graph import Node
from jobs.store.attempts import claim_alive
from jobs.store.layout import AttemptFolder, Layout, StageFolder
from jobs.store.records import attempt_numbers, read_claim, read_outcome, read_result

POLL_SECONDS = 0.5  # between looks at a log that grows
_NAMED = re.compile(
    r"(?:[0-9-]{10} [0-9:]{8} )?\w+ \w+ fold .+? seed [0-9]+ \[([0-9a-f]{8})\]:"
)  # jobs.experiment.graph.Node.name, perhaps dated
SILENT_SECONDS = 10.0  # how long the log of an attempt that runs may not be there: shared folders lag


@dataclass(frozen=True)
class Log:
    """The output of one attempt."""

    node: Node
    attempt: int
    file: Path


def choose_stage(layout: Layout, nodes: Sequence[Node], stage: str | None) -> Node:
    """Of a run's stages, upstream first: the one named, else the last that was begun, else the last of all."""
    if stage is not None:
        chosen = [node for node in nodes if node.stage == stage]
        if not chosen:
            raise UsageError(f"--stage {stage}: this run has {', '.join(dict.fromkeys(node.stage for node in nodes))}")
        return chosen[-1] if len(chosen) == 1 else _last_begun(layout, chosen)
    return _last_begun(layout, nodes)


def find_log(layout: Layout, node: Node, attempt: int | None = None) -> Log | None:
    """The log of an attempt of a stage, by default the newest; None if it was never begun. UsageError for an attempt there is not."""
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
    """The lines of one attempt in a log; all of them where the log does not say where it begins.

    The first attempt that a log holds begins with the log: what comes before it is how it was started. Lines of other stages, computed
    in the same array element before, after or at the same time, are left out.
    """
    begins = {place: number for place, line in enumerate(lines) if (number := _begun(line, key))}
    if attempt not in begins.values():
        return tuple(lines)
    first = max(place for place, number in begins.items() if number == attempt)
    after = min((place for place in begins if place > first), default=len(lines))
    part = lines[0 if first == min(begins) else first : after]
    return tuple(line for line in part if not _of_another(line, key))


def attempt_over(layout: Layout, log: Log, *, live_jobs: Collection[str] | None = None) -> str:
    """How an attempt ended, in words; "" while it lasts."""
    folder = layout.stage(log.node.stage, log.node.key)
    attempt = folder.attempt(log.attempt)
    result = read_result(folder, log.node.key)
    if result is not None and result.attempt == log.attempt:
        return "done"
    outcome = read_outcome(attempt)
    if outcome is not None:
        return f"{outcome.ending.value}: {outcome.error}: {outcome.message}"
    return "" if _alive(folder, attempt, live_jobs) else "ended without a word"


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

    `over` says how the attempt ended, "" while it lasts. Whoever reads may stop at any time. UsageError if there is no file although the
    attempt was begun a while ago.
    """
    waited = 0.0
    while not log.file.exists():
        if over() or waited >= SILENT_SECONDS:
            raise _no_file(log)
        pause(POLL_SECONDS)
        waited += POLL_SECONDS
    with log.file.open(encoding="utf-8", errors="replace") as file:
        *begun, partial = file.read().split("\n")
        yield from deque(section(begun, log.node.key, log.attempt), lines)
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
    return UsageError(f"{log.node.name}: attempt {log.attempt} has left no log at {log.file}")


def _of_another(line: str, key: str) -> bool:
    """Whether a line begins with the name of another stage."""
    named = _NAMED.match(line)
    return named is not None and named[1] != key[:8]


def _begun(line: str, key: str) -> int:
    """Number of the attempt of a stage that begins with this line; 0 if none does."""
    _, found, rest = line.partition(f"[{key[:8]}]: attempt ")
    number = rest.partition(" on ")[0]
    return int(number) if found and number.isdigit() else 0


def _last_begun(layout: Layout, nodes: Sequence[Node]) -> Node:
    begun = [node for node in nodes if attempt_numbers(layout.stage(node.stage, node.key))]
    return (begun or list(nodes))[-1]


def _alive(folder: StageFolder, attempt: AttemptFolder, live_jobs: Collection[str] | None) -> bool:
    claim = read_claim(attempt)
    try:
        heartbeat = attempt.claim.stat().st_mtime
    except OSError:
        return False
    return claim is not None and claim_alive(claim, heartbeat, live_jobs=live_jobs, now=time.time())
