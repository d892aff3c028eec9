"""`status` without a name: all experiments of the results folder, a line each. Slurm's queue is asked once for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commands.activity import Activity, ago, read_activity
from jobs.commands.console import say
from jobs.errors import UsageError
from jobs.store.scores import UNWEIGHTED, Score
from jobs.text import duration, moment, one_line

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report

SCHEMA = 1


@dataclass(frozen=True)
class ExperimentRow:
    """Where one experiment stands."""

    experiment: str
    state: str  # complete, running, queued, cancelled, held, failed, stopped; unreadable: see `problem`
    place: str = ""  # local or slurm
    runs: int = 0
    runs_done: int = 0
    running: int = 0  # stages
    waiting: int = 0  # stages in the queue, or left for a later pass
    failed: int = 0  # stages that are given up
    newest_ua: float | None = None  # score of the run that was finished last
    newest: float | None = None  # when, seconds since the epoch
    seconds_left: float | None = None  # None: not known
    at_most: bool = False  # `seconds_left` counts requested times
    problem: str = ""  # why it cannot be shown, or not the whole of it
    newest_score: str = ""  # `newest_ua` with the label of the score
    score: Score = UNWEIGHTED


def show_list(results: Path, reopen: Callable[[str], Session], *, as_json: bool = False) -> None:
    """Print a line for each experiment that was launched with this results folder. `reopen`: from its name to its session."""
    rows = read_rows(results, reopen)
    if as_json:
        say(json.dumps(list_to_json(rows, time.time()), indent=1))
    elif rows:
        say("\n".join(list_lines(rows, time.time())))
    else:
        say(f"nothing was launched in {results}; `python launch.py grid demo` needs no data")


def read_rows(results: Path, reopen: Callable[[str], Session]) -> tuple[ExperimentRow, ...]:
    """A row for each experiment below a results folder, by name."""
    from jobs.slurm.client import LookClient

    client, rows = LookClient(), []
    for name in sorted(path.parent.name for path in results.glob("*/experiment.json")):
        try:
            session = reopen(name)
            session.client = client
            rows.append(_row(session, session.look()))
        except (UsageError, OSError) as error:
            rows.append(ExperimentRow(name, "unreadable", problem=one_line(error)))
    return tuple(rows)


def list_lines(rows: Sequence[ExperimentRow], now: float) -> list[str]:
    """Aligned columns with a header, then the time of the look."""
    cells = [_HEADER, *(_cells(row, now) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADER))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [*lines, f"looked at {moment(now)}; `python launch.py status EXPERIMENT` shows one of them"]


def list_to_json(rows: Sequence[ExperimentRow], now: float) -> dict[str, Any]:
    """Stable, versioned JSON value: keys are only ever added. `newest_ua` has the name of the score where it is another one."""
    return {"schema": SCHEMA, "looked": now, "experiments": [row.score.renamed(asdict(row)) for row in rows]}


def _row(session: Session, report: Report) -> ExperimentRow:
    activity = read_activity(session, report, logs=False)
    newest = activity.newest
    unknown = "Slurm does not answer: by the files alone" if session.queue_unknown else session.limits_of_look()
    return ExperimentRow(
        session.name,
        _state(report, activity, cancelled=session.cancelled),
        session.launched.experiment.cluster.name,
        activity.runs,
        activity.runs_done,
        len(activity.running),
        sum(row.stages for row in activity.waiting),
        len(report.plan.given_up),
        newest.ua if newest else None,
        newest.finished if newest else None,
        activity.remaining.seconds,
        activity.remaining.at_most,
        unknown,
        newest.score if newest else "",
        report.graph.score,
    )


def _state(report: Report, activity: Activity, *, cancelled: bool) -> str:
    plan = report.plan
    if plan.complete:
        return "complete"
    if activity.running:
        return "running"
    if cancelled:
        return "cancelled"
    if plan.waiting or plan.deferred:
        return "queued"
    if plan.batches:
        return "stopped"
    return "failed" if plan.given_up else "held"


_HEADER = ("experiment", "state", "runs", "running", "waiting", "failed", "newest", "ends in", "")


def _cells(row: ExperimentRow, now: float) -> tuple[str, ...]:
    newest = f"{row.newest_score}, {ago(now - row.newest)}" if row.newest_score and row.newest else ""
    left = f"{'at most ' if row.at_most else ''}{duration(row.seconds_left)}" if row.seconds_left else ""
    counts = [str(count or "") for count in (row.running, row.waiting, row.failed)]
    return (row.experiment, row.state, f"{row.runs_done}/{row.runs}" if row.runs else "", *counts, newest, left, row.problem)
