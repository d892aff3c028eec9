"""Passes of the controller as commands make them: one on Slurm, all on this machine, or those of a controller job inside Slurm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from jobs.commands.collect import notify_of_stuck_jobs, write_and_notify
from jobs.commands.console import note, print_lines, say
from jobs.commands.progress import stage_progress
from jobs.control.controller import Report, desired_of, reconcile
from jobs.errors import UsageError
from jobs.experiment.config import resources_of
from jobs.store.clock import file_time, measure
from jobs.text import counted, duration, one_line

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.slurm.chain_link import LinkEnd

# Of the last report, and why the controller stopped before the end or "": writes the results, and returns lines for the log
End = Callable[[Report, str], list[str]]


def one_pass(session: Session) -> Report:
    """One pass of the controller on Slurm. UsageError where none may be made: other code, another user, a newer launch."""
    session.require_same_code()
    session.require_own()
    session.require_last_launch()
    measure(session.launched.layout.root)
    report = reconcile(desired_of(session.launched), session.arrays)
    session.queue_unknown, session.launched = False, replace(session.launched, graph=report.graph)  # with the runs that fill the slots now
    return report


def run_here(session: Session, *, stop_count: Callable[[], int] | None = None) -> Report:
    """Compute every stage on this machine; shows progress and prints each event. `stop_count`: as for `run_local`."""
    from jobs.control.controller import Event, run_local
    from jobs.local.executor import LocalExecutor
    from jobs.store.snapshot import code_facts
    from jobs.worker.machine import capacity_here

    measure(session.launched.layout.root)
    executor = LocalExecutor(
        place=replace(session.place, code=code_facts(session.root)),
        layout=session.launched.layout,
        resources=lambda stage: resources_of(session.launched.experiment, stage),
        capacity=capacity_here(),
        preload=session.preload,
        code=session.root,
    )
    with executor, stage_progress(session.name) as progress:

        def on_event(event: Event) -> None:
            progress.event(event)
            print_lines(session.news())

        return run_local(
            desired_of(session.launched),
            executor,
            on_event=on_event,
            on_stop=_print_stopping,
            stop_count=stop_count,
        )


def wait_on_slurm(session: Session) -> Report:
    """Passes until nothing is left to do; shows progress and prints each event."""
    from jobs.control.controller import wait_for

    measure(session.launched.layout.root)
    with stage_progress(session.name) as progress:

        def after_pass(report: Report) -> None:
            session.require_last_launch()
            if report.refused and not report.in_flight:
                raise UsageError(report.refused[0])
            progress.look(report)
            print_lines(session.news())

        return wait_for(
            desired_of(session.launched),
            session.arrays,
            poll_seconds=session.launched.experiment.policy.poll_seconds,
            on_event=progress.event,
            on_pass=after_pass,
            on_outage=lambda error, pause: note(f"{one_line(error)}; nothing is lost, the next try is in {duration(pause)}"),
        )


def run_controller(session: Session, end: End | None = None) -> bool:
    """What the controller job in Slurm executes; False if the next pass must be made by the same job, because no other could be submitted.

    `end`: what to do when nothing is left to do; None: tables and notices of a grid. All controller jobs of an experiment share one log:
    each line has its time and job.
    """
    from jobs.slurm.chain_link import LinkEnd
    from jobs.store.attempts import own_slurm_job
    from jobs.worker.main import print_line

    job = f"{session.name}: controller {own_slurm_job()}".rstrip()

    def log(text: str) -> None:
        print_line(f"{job} {text}")

    ended = run_link(session, end, log=log)
    if ended is not LinkEnd.handed_over:
        log(f"exits: {ended.value}")
    return ended is not LinkEnd.alone


def run_link(session: Session, end: End | None = None, *, log: Callable[[str], None] = say) -> LinkEnd:
    """One pass; if nothing is left to do, tables and notices."""
    from jobs.slurm import chain_link

    session.require_own()
    policy, finish = session.launched.experiment.policy, end or partial(write_and_notify, session)
    if not (session.on_slurm and policy.controller):  # this job is of an earlier launch: the last launch wants no controller
        session.chain.withdraw_successors()
        return chain_link.LinkEnd.stopped

    def logged_pass() -> Report:
        report = one_pass(session)
        if report.submitted:
            log(f"submitted {counted(len(report.submitted), 'stage')}")
        for line in session.news():
            log(line)
        return report

    measure(session.launched.layout.root)
    return chain_link.run_link(
        logged_pass,
        session.chain,
        deadline=session.launched.since + 24 * 3600 * policy.controller_days,
        launched=session.launched.since,
        on_end=lambda report: print_lines(finish(report, "")),
        on_stuck=lambda report: print_lines(stuck_lines(report) if end else notify_of_stuck_jobs(session, stuck_lines(report), report)),
        on_stop=lambda message: print_lines(finish(session.look(ask_slurm=False), message)),
        clock=partial(file_time, session.launched.layout.root),
    )


def stuck_lines(report: Report) -> list[str]:
    """One line for each reason why queued jobs will never start."""
    reasons = Counter(report.stuck.values())
    return [f"{counted(count, 'stage')} in the queue will not start: {reason}" for reason, count in reasons.items()]


def _print_stopping(running: int) -> None:
    note(f"stopping: waiting for {counted(running, 'stage')} to write a checkpoint (Ctrl-C again to stop at once)")
