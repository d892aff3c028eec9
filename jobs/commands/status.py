"""`status`: print where an experiment stands. It makes no pass and submits nothing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.commands.activity import read_activity
from jobs.commands.console import note, print_lines, say
from jobs.commands.status_report import (
    Status,
    closing_lines,
    judged_lines,
    now_lines,
    problem_lines,
    status_lines,
    status_of,
    status_table,
    status_to_json,
)
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.signals import Interrupts
from jobs.store.records import damaged_records, read_json

if TYPE_CHECKING:
    from rich.console import Group

    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.slurm.chain import ChainState

WATCH_SECONDS = 5.0  # between two looks of --watch, at most


def show_status(session: Session, *, as_json: bool = False, watch: bool = False) -> None:
    """Print where an experiment stands; with `watch` repeatedly until it has ended. UsageError if it is launched again meanwhile."""
    if limits := session.limits_of_look():
        note(limits)
    if watch:
        _watch(session, min(WATCH_SECONDS, session.launched.experiment.policy.poll_seconds))
        return
    status = look(session)
    if as_json:
        say(json.dumps(status_to_json(status), indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_rendered(status))
    else:
        say("\n".join(status_lines(status)))


def look(session: Session) -> Status:
    """The status now, with what runs and waits."""
    report = session.look()
    return replace(read_status(session, report), activity=read_activity(session, report))


def read_status(session: Session, report: Report) -> Status:
    """The status of a report, with the state of the controller chain, jobs that will never start, notices and tables."""
    chain = chain_state(session)
    watched = chain is not None and bool(chain.running or chain.waiting)
    known = session.on_slurm and not (session.queue_unknown or session.other_user) and (chain is None or chain.known)
    tables = complete_tables(session) if report.complete else ""
    return replace(
        status_of(session.name, report, hints=session.hints, watched=watched, cancelled=session.cancelled, tables=tables, queue_read=known),
        controller="" if chain is None or (report.settled and not watched) else chain.sentence,
        stuck=Counter(session.arrays.stuck().values() if session.on_slurm else ()),
        notices=_notice_lines(session),
        damaged=damaged_records(*session.launched.layout.records),
    )


def chain_state(session: Session) -> ChainState | None:
    """State of the controller chain; None where the experiment has none."""
    if not session.on_slurm or not session.launched.experiment.policy.controller:
        return None
    from jobs.slurm import chain

    layout = session.launched.layout
    try:
        unknown = session.queue_unknown or session.other_user
        queue = None if unknown else session.client.queue(name=chain.link_name(layout), patient=False)
    except (SlurmUnavailableError, UsageError):
        queue = None
    return chain.chain_state(layout, queue)


def complete_tables(session: Session) -> str:
    """Folder of the tables, if they were written since the last launch and contain every run; else ""."""
    file = session.launched.layout.tables / "summary.json"
    try:
        current = file.stat().st_mtime >= session.launched.since
    except OSError:
        return ""
    return str(file.parent) if current and (read_json(file) or {}).get("complete") is True else ""


def _notice_lines(session: Session) -> tuple[str, ...]:
    policy = session.launched.experiment.policy
    if policy.mail is None and policy.webhook is None:
        return ()
    from jobs.commands.notify import notice_line, read_notices

    return tuple(notice_line(notice) for notice in read_notices(session.launched.layout, session.launched.since))


def _watch(session: Session, pause: float) -> None:
    """Show the status every `pause` seconds until nothing is left to do, or Ctrl-C: a live table on a terminal, else plain lines."""
    if sys.stdout.isatty():
        from rich.live import Live

        live: Live | None = Live(auto_refresh=False)  # no higher than the terminal
    else:
        live = None
    with live or nullcontext(), Interrupts() as interrupts:
        while not interrupts.count:
            session.require_last_launch()
            session.look_again()
            status = look(session)
            if live is None:
                print_lines([*status_lines(status), ""])
            else:
                live.update(_rendered(status), refresh=True)
            if status.settled:
                return
            interrupts.pause(pause)


def _rendered(status: Status) -> Group:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [status_table(status)]
    parts.extend(Text(line, style="cyan" if line.startswith("running") else "") for line in now_lines(status))
    parts.extend(Text(line, style="yellow") for line in judged_lines(status))
    parts.extend(Text(line, style="red") for line in problem_lines(status))
    parts.extend(Text(line) for line in closing_lines(status))
    return Group(*parts)
