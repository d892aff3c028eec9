"""What happens in an experiment now: running stages with node and progress, why others wait, the newest result, and the time left.

`read_activity` reads claims and the ends of logs; the rest is pure.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.facts import Pending, Phase
from jobs.control.remaining import Hours, Pace, Remaining, devices_of, remaining
from jobs.experiment.config import resources_of
from jobs.store.layout import Layout
from jobs.store.records import attempt_numbers, read_claim
from jobs.text import counted, duration, moment

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.experiment.graph import Graph

TAIL_BYTES = 16_384  # read from the end of a log
LOGS_READ = 64  # at most in one look: each costs milliseconds on a shared file system
RUNNING_SHOWN = 10
_PROGRESS = re.compile(r"([A-Za-z]\w*) (\d+/\d+)(?![\w/])")
_TO_GO = re.compile(r"\b(\d+) s to go\b")


@dataclass(frozen=True)
class RunningRow:
    """A stage that is computed now. Times in seconds; `started` since the epoch."""

    key: str
    name: str  # as in logs
    node: str  # "": no claim is seen yet
    job: str  # of Slurm; "": none
    started: float  # of its attempt; 0: no claim is seen yet
    attempt: int = 0
    progress: str = ""  # the last that its log states: `step 340/1000, epoch 3/10`
    to_go: float | None = None  # likewise
    ended: int = 0  # attempts that have ended, where none runs: the job ends, or was requeued


@dataclass(frozen=True)
class WaitingRow:
    """Stages that wait for the same reason."""

    reason: str
    stages: int
    since: float | None = None  # of the first of them, seconds since the epoch; None: not known


@dataclass(frozen=True)
class NewestResult:
    """The run that was finished last."""

    run: str  # METHOD/FOLD/SLOT
    seed: int
    ua: float  # its score
    finished: float  # seconds since the epoch
    score: str  # with its label: `UA 71.2`


@dataclass(frozen=True)
class Activity:
    """What happens in an experiment at one point in time."""

    looked: float  # seconds since the epoch
    runs: int
    runs_done: int
    running: tuple[RunningRow, ...] = ()
    waiting: tuple[WaitingRow, ...] = ()
    newest: NewestResult | None = None
    remaining: Remaining = field(default_factory=lambda: Remaining(0, Hours(), Hours(), 0.0, ""))


def read_activity(session: Session, report: Report, *, logs: bool = True) -> Activity:
    """The activity by a report and, for running stages, their claims and (with `logs`) the ends of their logs."""
    looked = time.time()
    pending = session.arrays.pending() if session.on_slurm else {}
    stuck = session.arrays.stuck() if session.on_slurm else {}
    running = read_running(report, session.launched.layout, logs=logs)
    paces = {row.key: Pace(max(0.0, looked - row.started) if row.started else 0.0, row.to_go) for row in running}
    experiment, gpus_used = session.launched.experiment, session.on_slurm or _gpus_used(report)
    return Activity(
        looked,
        len(report.graph.runs),
        runs_done(report),
        running,
        tuple(waiting_rows(report, pending, looked, stuck)),
        newest_result(report.graph, {key: (fact.finished, fact.ua) for key, fact in report.facts.items() if fact.done}),
        remaining(
            report.graph,
            report.facts,
            report.plan,
            paces,
            lambda stage: resources_of(experiment, stage).minutes * 60.0,
            lambda stage: devices_of(resources_of(experiment, stage), packed=session.on_slurm, gpus_used=gpus_used),
        ),
    )


def runs_done(report: Report) -> int:
    """Number of slots whose run has a result that counts."""
    given_up = frozenset(report.plan.given_up)
    return sum(report.facts[run.key].done and run.key not in given_up for run in report.graph.runs)


def read_running(report: Report, layout: Layout, *, logs: bool = True) -> tuple[RunningRow, ...]:
    """The stages that are computed now, in the order of the graph."""
    rows: list[RunningRow] = []
    waiting = frozenset(report.plan.waiting)
    for node in (node for key, node in report.graph.nodes.items() if key in waiting):
        fact, flight = report.facts[node.key], report.in_flight.get(node.key)
        if not (fact.executed_by or (flight is not None and flight.phase is Phase.running)):
            continue
        folder = layout.stage(node.stage, node.key)
        number = max(attempt_numbers(folder), default=0)
        claim = read_claim(folder.attempt(number)) if number and fact.executed_by else None
        if claim is None:
            rows.append(RunningRow(node.key, node.name, "", flight.job if flight else "", 0.0, ended=fact.ended))
            continue
        log = Path(claim.log) if claim.log else layout.log_of(node.stage, node.key)
        progress, to_go = last_progress(_tail(log), node.key) if logs and len(rows) < LOGS_READ else ("", None)
        where = claim.node or claim.host
        rows.append(RunningRow(node.key, node.name, where, claim.slurm_job, claim.started, number, progress, to_go))
    return tuple(rows)


def last_progress(text: str, key: str) -> tuple[str, float | None]:
    """The last progress of a stage's present attempt in the text of a log, and the seconds to go; ("", None) if there is none.

    Progress is each `WHAT DONE/TOTAL` of a line that names the stage; seconds are the number before `s to go`.
    """
    mark = f"[{key[:8]}]: "
    for line in reversed(text.splitlines()):
        _, named, rest = line.partition(mark)
        if not named:
            continue
        if rest.startswith("attempt "):
            break
        found, to_go = _PROGRESS.findall(rest), _TO_GO.search(rest)
        if found:
            return ", ".join(f"{what} {count}" for what, count in found), float(to_go[1]) if to_go else None
    return "", None


def waiting_rows(report: Report, pending: Mapping[str, Pending], now: float, stuck: Iterable[str] = ()) -> list[WaitingRow]:
    """Why stages wait that are in the queue or left for a later pass. Not those that will never start (`stuck`), nor those that follow."""
    groups: dict[str, list[float]] = {}
    never = frozenset(stuck)
    for key in report.plan.waiting:
        fact, flight = report.facts[key], report.in_flight.get(key)
        if fact.executed_by or key in never or (flight is not None and flight.phase is Phase.running):
            continue
        if fact.settling and flight is None:
            groups.setdefault("Slurm has not reported yet how the last job ended", []).append(0.0)
        elif key in pending:
            reason = pending[key].reason
            groups.setdefault(f"pending in Slurm ({reason})" if reason else "pending in Slurm", []).append(pending[key].since)
        else:
            groups.setdefault("submitted, not found in Slurm's queue yet", []).append(0.0)
    for key in report.plan.deferred:
        upstream_done = all(report.facts[parent].done for parent in report.graph.nodes[key].upstream.values())
        paused = report.facts[key].not_before > now
        later = "no room in Slurm's queue" if upstream_done else "upstream stages are not done"
        why = "paused after an error of the file system" if paused else later
        groups.setdefault(why, []).append(0.0)
    return [WaitingRow(why, len(times), min(filter(None, times), default=None)) for why, times in groups.items()]


def newest_result(graph: Graph, finished: Mapping[str, tuple[float, float | None]]) -> NewestResult | None:
    """The run that was finished last. `finished`: key -> time and score of each stage that is done."""
    known = [(*finished[run.key], run) for run in graph.runs if run.key in finished]
    scored = [(when, ua, run) for when, ua, run in known if ua is not None]
    if not scored:
        return None
    when, ua, run = max(scored, key=lambda each: each[0])
    return NewestResult(run.name, run.seed, ua, when, graph.score.text(ua))


def activity_lines(activity: Activity) -> list[str]:
    """Progress, what runs and where, what waits and why, and the time left; the time of the look comes last."""
    now = activity.looked
    newest = activity.newest
    last = f"; newest: {newest.run} seed {newest.seed}, {newest.score}, {ago(now - newest.finished)}" if newest else ""
    lines = [f"{activity.runs_done} of {counted(activity.runs, 'run')} done{last}"]
    lines.extend(f"running: {running_text(row, now)}" for row in activity.running[:RUNNING_SHOWN])
    if len(activity.running) > RUNNING_SHOWN:
        lines.append(f"running: {len(activity.running) - RUNNING_SHOWN} more")
    lines.extend(f"waiting: {counted(row.stages, 'stage')}, {row.reason}{_since(row.since, now)}" for row in activity.waiting)
    return [*lines, *remaining_lines(activity), f"looked at {moment(now)}"]


def remaining_lines(activity: Activity) -> list[str]:
    """Device-hours used and left, and when the last stage will have ended, with what that is based on."""
    rest = activity.remaining
    if not rest.stages:
        return [f"used {rest.used}"]
    about = "at most" if rest.at_most else "about"
    left = f"used {rest.used}; left {about} {rest.left} for {counted(rest.stages, 'stage')}"
    if rest.seconds is None:
        return [f"{left}; end not known: {rest.basis}"]
    return [f"{left}; ends in {about} {duration(rest.seconds)}, {moment(activity.looked + rest.seconds)} ({rest.basis})"]


def running_text(row: RunningRow, now: float) -> str:
    """One running stage in a line."""
    no_claim = f"attempt {row.ended} has ended, its job is still in the queue" if row.ended else "its worker is starting"
    parts = [f"{row.name}: {f'on {row.node}' if row.node else no_claim}"]
    parts.extend([f"job {row.job}"] if row.job[:1].isdigit() else [])
    parts.extend([f"attempt {row.attempt}"] if row.attempt > 1 else [])
    parts.extend([f"for {duration(max(0.0, now - row.started))}"] if row.started else [])
    return ", ".join([*parts, *filter(None, [row.progress])])


def ago(seconds: float) -> str:
    """`3 min 20 s ago`."""
    return f"{duration(max(0.0, seconds))} ago"


def _since(when: float | None, now: float) -> str:
    return f", since {moment(when)} ({duration(max(0.0, now - when))})" if when else ""


def _gpus_used(report: Report) -> bool:
    """Whether finished stages were computed on a GPU; True where none is finished."""
    done = [fact.on_gpu for fact in report.facts.values() if fact.done]
    return any(done) or not done


def _tail(file: Path) -> str:
    """The last `TAIL_BYTES` of a log; "" if it cannot be read."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
