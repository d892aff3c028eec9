"""`sweep`: launch or resume a sweep, print its plan, state and report. A sweep is computed by the passes and executors of a grid.

Functions that return bool return whether the command succeeded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.cancel import cancel as cancel_stages
from jobs.commands.console import note, print_lines, say
from jobs.commands.grid import print_scripts
from jobs.commands.passes import one_pass, run_here, wait_on_slurm
from jobs.commands.session import Session
from jobs.commands.startable import require_startable
from jobs.commands.status import chain_state
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import OutlierRule
from jobs.experiment.launched import Launched
from jobs.signals import Interrupts
from jobs.store.access import check_store
from jobs.store.cancellations import read_cancellations
from jobs.store.launches import next_launch
from jobs.sweeps.decisions import Decisions, Trial, TrialState
from jobs.sweeps.driver_lock import driver_of, driving, in_words, refusal
from jobs.sweeps.records import Sweep, began, store_latest, store_sweep
from jobs.sweeps.space import space_of
from jobs.sweeps.stages import sweep_digest
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.control.controller import Report
    from jobs.experiment.config import Experiment
    from jobs.experiment.launched import Corpus
    from jobs.experiment.registry import SweepRegistry
    from jobs.store.layout import Layout
    from jobs.sweeps.report.write import SweepReport
    from jobs.worker.task import Workplace

COLUMNS = ("point", "UA", "± sd", "95 %", "folds", "runs", "to the best", "p", "")
CANCELLED_SECONDS = 1.0  # between two looks at whether the sweep was cancelled


@dataclass
class SweepSession(Session):
    """A session whose experiment is a sweep: its graph grows by the decisions on its trials."""

    sweep: Sweep = field(kw_only=True)
    decisions: Decisions = field(kw_only=True)
    _told: dict[str, Trial] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        return self.sweep.layout.experiment

    @property
    def resume_command(self) -> str:
        return self.hints.launch  # launching a sweep again resumes it

    @property
    def _launch_words(self) -> tuple[str, ...]:
        return ("sweep", *super()._launch_words[1:])

    def news(self) -> list[str]:
        lines = trial_lines(self._told, self.decisions.trials, self.sweep.folds)
        self._told = {trial.point.name: trial for trial in self.decisions.trials}
        return lines

    def end(self, report: Report, message: str = "") -> list[str]:
        """Write the report and send the notices; lines for the log. `message`: why the controller stopped before the end."""
        return [*map(str, write(self, report).paths), *send_notices(self, report, message)]


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep, with a sentence for the user."""

    state: str  # running, waiting, complete, interrupted; unknown: Slurm does not answer
    sentence: str
    job: str = ""  # of its controller in Slurm


def new_sweep(
    experiment: Experiment, file: str, corpus: Corpus, layout: Layout, registry: SweepRegistry, *, code: Path, typed: tuple[str, ...]
) -> Sweep:
    """A sweep that is launched now. `file`, `typed`, `code`: as in `Sweep`. UsageError if the corpus does not allow it."""
    from jobs.sweeps.preflight import check_sweep

    since = time.time()
    validation = check_sweep(experiment, space_of(experiment), registry, corpus)
    digest = sweep_digest(experiment, corpus, validation, registry)
    return Sweep(
        experiment=experiment,
        file=file,
        typed=typed,
        corpus=corpus,
        layout=layout,
        validation=validation,
        launched=since,
        began=began(layout, digest) or since,
        digest=digest,
        registry=registry,
        code=code,
    )


def session_of(
    sweep: Sweep,
    place: Workplace,
    root: Path,
    *,
    preload: Sequence[str] = (),
    new: bool = False,
    patient: bool = True,
    read_only: bool = False,
) -> SweepSession:
    """A session for a sweep. `new`: this command launches it. `read_only`: the points that Optuna proposes are not recorded."""
    if new:  # clocks of two machines differ, and a launch lifts every cancellation before it
        sweep = replace(sweep, launched=next_launch(sweep.own_layout))
    decisions = Decisions(sweep, read_only=read_only)
    # low runs of a bad point are not outliers, and a point that diverges is a result of the search
    policy = replace(sweep.experiment.policy, outliers=OutlierRule.none, hold_diverging=False)
    launched = Launched(
        replace(sweep.experiment, policy=policy),
        sweep.corpus,
        decisions.refill({}),
        sweep.own_layout,
        sweep.launched,
        decisions.refill,
        changed=not new and sweep.digest != sweep_digest(sweep.experiment, sweep.corpus, sweep.validation, sweep.registry),
        user=sweep.user,
        config=sweep.file,
        typed=sweep.typed,
        extend=decisions.extend,
    )
    place = replace(place, experiment=sweep.own_layout.experiment, launched=sweep.launched)
    return SweepSession(launched, place, root, root, preload, new=new, patient=patient, sweep=sweep, decisions=decisions)


def print_preview(session: SweepSession, *, scripts: bool = False) -> None:
    """What a launch would do; `scripts`: on Slurm first the batch scripts of the first pass and of the controller."""
    from jobs.sweeps.preflight import preview, preview_lines

    if scripts:
        print_scripts(session, session.look(ask_slurm=False))
    print_lines(preview_lines(session.sweep, preview(session.sweep)))


def launch(session: SweepSession, *, wait: bool) -> bool:
    """Launch or resume a sweep: on this machine, or in Slurm, and with `wait` stay until it has ended."""
    report, resumes = session.look(ask_slurm=False), session.sweep.own_layout.experiment_file.is_file()
    if report.complete:
        (store_latest if resumes else store_sweep)(session.sweep)
        say(f"{session.name}: sweep {session.sweep.digest}: every trial has ended, nothing is left to compute")
        return _finish(session, report, announce=False)
    check_store(session.sweep.layout, [(node.stage, key) for key, node in report.graph.nodes.items()])
    if resumes:
        done = sum(fact.done for fact in report.facts.values())
        say(f"{session.name}: resumes sweep {session.sweep.digest}, {done} of {counted(len(report.facts), 'stage')} done")
    session.news()  # what is known already is not printed again
    if session.on_slurm and not wait:
        if (holder := driver_of(session.sweep.folder)) is not None:
            raise UsageError(refusal(session.sweep.folder, in_words(holder)))
        return _submit(session, report)
    if job := _controller(session):
        raise UsageError(refusal(session.sweep.folder, f"job {job}"))
    with driving(session.sweep.folder):
        if session.on_slurm:
            session.require_slurm(report.plan.batches)
            require_startable(session, report)
        store_sweep(session.sweep)
        if session.on_slurm:
            session.chain.point_to_code()
            report = wait_on_slurm(session)
        else:
            with Interrupts() as interrupts:
                cancelled = _cancellation_poll(session)
                report = run_here(session, stop_count=lambda: max(interrupts.count, cancelled()))
    return _finish(session, report)


def show(session: SweepSession, *, as_json: bool) -> None:
    """Print the report so far and the state of the sweep."""
    report = session.look(ask_slurm=False)
    found = status(session)
    written = write(session, report, driven=found.state not in ("complete", "interrupted"))
    if as_json:
        from jobs.sweeps.report.as_json import to_json

        say(json.dumps({**to_json(written.summary, written.choice), "standing": found.state, "job": found.job}, indent=1))
        return
    _print(written)
    say(found.sentence)


def cancel(session: SweepSession) -> None:
    """Cancel a sweep until it is launched again: its stages write checkpoints, its controller ends."""
    session.look(ask_slurm=False)
    holder = driver_of(session.sweep.folder)
    if status(session).state == "complete":
        say(f"{session.name}: nothing to cancel, every trial has ended")
        return
    done = cancel_stages(session, [])
    if holder is not None:
        say(f"{session.name}: {in_words(holder)} is asked to stop; stages under way write a checkpoint")
    for what, jobs in (
        (f"{counted(done.withdrawn, 'stage')} withdrawn from Slurm", done.withdrawn),
        ("controller ended", done.controllers),
    ):
        if jobs:
            say(f"{session.name}: {what}")
    if not (holder or done.withdrawn or done.controllers):
        say(f"{session.name}: nothing to cancel, it is not running")
    say(f"{session.resume_command} resumes")


def status(session: SweepSession) -> SweepStatus:
    """The state of a sweep; `session` has looked at the results before."""
    if (holder := driver_of(session.sweep.folder)) is not None:
        return SweepStatus("running", f"{session.name}: under way in {in_words(holder)}")
    if not any(trial.state is TrialState.running for trial in session.decisions.trials):
        return SweepStatus("complete", f"{session.name}: every trial has ended")
    chain = chain_state(session)
    if chain is not None and (chain.running or chain.waiting):
        state = "running" if chain.running else "waiting"
        return SweepStatus(state, f"{session.name}: {chain.sentence}", chain.running or chain.waiting)
    if chain is not None and chain.phase.value == "unknown":  # Phase is not imported: it would bring in submissions
        return SweepStatus("unknown", f"{session.name}: {chain.sentence}")
    why = f" ({chain.sentence})" if chain is not None else ""
    return SweepStatus("interrupted", f"{session.name}: interrupted, no driver is running{why}: {session.resume_command} resumes")


def write(session: SweepSession, report: Report, *, driven: bool = False) -> SweepReport:
    """Write the report of a sweep. `driven`: something computes the folds that are missing."""
    from jobs.sweeps.report.write import write_report

    trials = session.decisions.trials
    if not driven:
        trials = tuple(replace(each, state=TrialState.interrupted) if each.state is TrialState.running else each for each in trials)
    return write_report(session.sweep, report.graph, trials)


def send_notices(session: SweepSession, report: Report, message: str = "") -> list[str]:
    """Send what the policy asks for at the end of a sweep. Returns a line for each notice. `message`: why it stopped before the end."""
    policy, trials = session.launched.experiment.policy, session.decisions.trials
    if policy.mail is None and policy.webhook is None:
        return []
    from jobs.commands.notify import Ending, notice_line, notify

    ended = [trial for trial in trials if trial.state in (TrialState.complete, TrialState.stopped)]
    ending = Ending(
        experiment=f"{session.name}, sweep {session.sweep.digest}",
        launched=session.launched.since,
        outcome="stopped" if message else "complete" if report.complete else "incomplete",
        runs=sum(report.facts[run.key].done for run in report.graph.runs),
        all_runs=len(report.graph.runs),
        ua={trial.point.label: trial.means[-1] for trial in ended},
        problems=(*filter(None, [message]), *(f"{trial.point.label}: {trial.error}" for trial in trials if trial.error)),
        tables=str(session.sweep.layout.sweep),
    )
    return [notice_line(notice) for notice in notify(policy, session.launched.layout, ending)]


def trial_lines(before: Mapping[str, Trial], now: Sequence[Trial], folds: Sequence[str]) -> list[str]:
    """Lines on folds computed and trials ended between two looks. Pure."""
    lines = []
    for trial in now:
        former = before.get(trial.point.name)
        for fold, ua in trial.scores.items():
            if former is None or fold not in former.scores:
                mean = sum(trial.scores.values()) / len(trial.scores)
                lines.append(f"{trial.point.label}: fold {fold} validation UA {ua:.1f}, mean of {len(trial.scores)} {mean:.1f}")
        if trial.state is not TrialState.running and (former is None or former.state is not trial.state):
            after = f" after {trial.wanted} of {counted(len(folds), 'fold')}" if trial.state is TrialState.stopped else ""
            lines.append(f"{trial.point.label}: {trial.state.text}{after}{trial.error and f': {trial.error}'}")
    return lines


def _submit(session: SweepSession, seen: Report) -> bool:
    """Submit the stages that can be computed now, and a controller that submits the rest. `seen`: the state before."""
    session.require_slurm(seen.plan.batches)
    require_startable(session, seen)
    store_sweep(session.sweep)
    session.chain.point_to_code()
    report = one_pass(session)
    print_lines(session.news())
    if report.settled:
        return _finish(session, report)
    submitted = f"{counted(len(report.submitted), 'stage')} submitted, {len(report.in_flight)} in Slurm"
    say(f"{session.name}: sweep {session.sweep.digest}: {submitted}")
    if session.launched.experiment.policy.controller:
        say(f"{session.chain.ensure(renew=True).sentence}; it submits the rest and writes the report at the end")
    else:
        say(f"no controller (policy.controller=false): {session.resume_command} submits what follows")
    say(f"watch with {session.hints.of('sweep', '--show')}")
    return True


def _controller(session: SweepSession) -> str:
    """Job of the controller in Slurm that drives the sweep, from an earlier launch; "" if there is none, or Slurm does not answer."""
    from jobs.slurm.chain import chain_jobs, link_name, read_record

    name = link_name(session.launched.layout)
    if read_record(session.launched.layout) is None:
        return ""
    try:
        running, waiting = chain_jobs(name, session.client.queue(name=name, patient=False))
    except (SlurmUnavailableError, UsageError):
        return ""
    return next(iter((*running, *waiting)), "")


def _cancellation_poll(session: SweepSession) -> Callable[[], int]:
    """Function that returns 1 once the sweep was cancelled; it reads the record at most every `CANCELLED_SECONDS`."""
    looked, found = 0.0, 0

    def cancelled() -> int:
        nonlocal looked, found
        if not found and time.monotonic() - looked > CANCELLED_SECONDS:
            looked, found = time.monotonic(), int(read_cancellations(session.launched.layout, session.launched.since).everything)
        return found

    return cancelled


def _finish(session: SweepSession, report: Report, *, announce: bool = True) -> bool:
    """Write and print the report. Returns False if trials are missing, no point is complete, or one failed."""
    if report.interrupted:
        note(f"stopped; nothing is lost: {session.resume_command} resumes")
        return False
    written = write(session, report)
    _print(written)
    for line in send_notices(session, report) if announce else ():
        note(line)
    states = [trial.state for trial in session.decisions.trials]
    if failed := states.count(TrialState.failed):
        note(f"{counted(failed, 'trial')} failed: {session.resume_command} tries again")
    missing = states.count(TrialState.running)
    if missing:
        for reason in dict.fromkeys(report.plan.reasons.values()):
            note(reason)
        note(f"{counted(missing, 'trial')} not finished: {session.resume_command} resumes")
    return written.summary.best is not None and not failed and not missing


def _print(report: SweepReport) -> None:
    from jobs.sweeps.report.tables import tables_of

    tables = tables_of(report.summary, report.choice)
    say(f"{tables.title}. {' '.join(tables.lead)}")
    rows = [
        (each.label, each.ua, each.sd and f"± {each.sd}", each.interval, each.folds, each.runs, each.difference, each.p, each.remark)
        for each in tables.rows
    ]
    _print_rows(COLUMNS, rows, bold=[each.best for each in tables.rows])
    for failure in tables.failures:
        say(f"failed: {failure}")
    _print_rows(tables.cost.headings, tables.cost.rows)
    print_lines(report.choice_lines)
    print_lines(str(path) for path in report.paths)


def _print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Sequence[bool] = ()) -> None:
    """A table: on a terminal with borders and the best in bold, otherwise as aligned columns."""
    if not rows:
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="left" if number in (0, len(headings) - 1) else "right")
        for number, row in enumerate(rows):
            table.add_row(*map(Text, row), style="bold" if number < len(bold) and bold[number] else "")
        Console(highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
