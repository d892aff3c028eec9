"""`grid` and `reconcile`: launch an experiment, or submit what is missing of one; `--dry-run` prints the plan instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commands.collect import write_tables
from jobs.commands.console import note, print_lines, say
from jobs.commands.passes import one_pass, run_here, wait_on_slurm
from jobs.commands.progress import opening_line
from jobs.commands.relaunch import OldStages, difference_lines, new_lines, settle_old_stages, unneeded_now
from jobs.commands.startable import impossible_lines, require_startable
from jobs.commands.status import read_status
from jobs.commands.status_report import judged_lines, problem_lines, status_lines
from jobs.control.controller import desired_of, experience_of
from jobs.errors import UsageError
from jobs.experiment.config import resources_of
from jobs.experiment.launched import store
from jobs.experiment.recipes import recipe_sentences
from jobs.store.access import check_store
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.commands.hints import Hints
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.control.executor_protocol import Batch
    from jobs.slurm.chain import ChainState


def run_grid(session: Session, *, wait: bool, old: OldStages = OldStages.ask) -> bool:
    """Launch an experiment. Returns whether every run has a result or, where Slurm computes the rest in the background, may get one.

    `old`: what becomes of queued and running stages that this launch does not need.
    """
    session.require_nothing_in_slurm()
    if session.on_slurm:
        seen = session.look(ask_slurm=False)
        session.require_slurm(seen.plan.batches)
        require_startable(session, seen)
    check_store(session.launched.layout, [(node.stage, key) for key, node in session.launched.graph.nodes.items()])
    settle_old_stages(session, old)
    store(session.launched)
    print_lines([opening_line(session.name, session.look(ask_slurm=False))])
    if not session.on_slurm:
        return finish(session, run_here(session))
    session.chain.point_to_code()  # also without a controller: `reconcile`, cron and `grid --wait` submit this launch's code
    return finish(session, wait_on_slurm(session)) if wait else make_pass(session)


def reconcile(session: Session) -> bool:
    """One pass on Slurm for an experiment launched before. UsageError if it was launched on this machine, or is cancelled."""
    if not session.on_slurm:
        raise UsageError(f"{session.name} was launched on this machine: {session.resume_command} resumes it")
    if session.cancelled:
        raise UsageError(f"{session.name} is cancelled: {session.resume_command} resumes it")
    return make_pass(session)


def make_pass(session: Session) -> bool:
    """One pass, and a controller job for the next ones. Returns False where nothing is left to do and a run has no result."""
    report = one_pass(session)
    if report.refused and not report.in_flight:
        raise UsageError(report.refused[0])
    supervised = session.launched.experiment.policy.controller and not report.settled
    chain = session.chain.ensure(renew=session.new) if supervised else None
    _print_pass(report, chain, session.hints)
    if report.refused:
        raise UsageError(report.refused[0])
    if report.settled and not report.complete:
        print_lines(status_lines(read_status(session, report)))
        return False
    return True


def finish(session: Session, report: Report) -> bool:
    """Tables and notices of an experiment that ended, or why there are none. Returns whether every run has a result."""
    if report.interrupted:
        note(f"stopped; nothing is lost: {session.resume_command} resumes")
        return False
    status = read_status(session, report)
    for line in (*judged_lines(status), *problem_lines(status)):
        note(line)
    complete = write_tables(session, report, announce=True)
    if not complete:
        for line in (*status.steps, f"not complete; logs are in {session.launched.layout.logs}"):
            note(line)
    return complete


def print_plan(session: Session, cost_notes: Callable[[Path, Sequence[Any]], Sequence[str]], *, scripts: bool = False) -> None:
    """What a launch would do: stages reused, recipes, tasks, estimated hours; the totals are the last line.

    `scripts`: on Slurm first the batch scripts. `cost_notes`: from the corpus folder and the stages to be computed (with `stage`,
    `settings`, `fold`) to lines on what makes them slow.
    """
    from jobs.control.estimates import forecast, forecast_lines

    report = session.look(with_limits=True)
    if session.on_slurm:
        session.arrays.check_options(report.plan.batches)
    if scripts:
        print_scripts(session, report)
    print_lines(difference_lines(session))
    expected = forecast(
        report.graph,
        report.facts,
        report.plan,
        lambda stage: resources_of(session.launched.experiment, stage),
        _request_text(session, report) if session.on_slurm else lambda batch: "",
    )
    runs, stages = counted(len(report.graph.runs), "run"), counted(len(report.graph.nodes), "stage")
    say(f"{session.name}: {runs}, {stages}; reused {len(expected.plan.reused)}")
    print_lines(recipe_sentences(session.recipes, session.published.labels))
    reused = set(expected.plan.reused)
    print_lines(cost_notes(Path(session.launched.corpus.folder), [node for key, node in report.graph.nodes.items() if key not in reused]))
    print_lines(new_lines(session, report))
    old = unneeded_now(session)
    if old.queued or old.running:
        say(f"would withdraw {old}, which the experiment does not need with these settings; --keep-old keeps them")
    if session.on_slurm:
        print_lines(impossible_lines(session, report))
    print_lines(forecast_lines(expected))


def print_scripts(session: Session, report: Report) -> None:
    """Print the batch scripts of a plan and of the controller. UsageError for an experiment on this machine."""
    if not session.on_slurm:
        raise UsageError(f"--scripts: {session.name} computes on this machine, without batch scripts; --cluster slurm has some")
    for preview in session.arrays.previews(report.plan.batches, report.graph, report.in_flight):
        say(f"# ---- {preview.name}\n{preview.script}")
        for call in preview.refinements:
            say(f"# then: {call}")
        say("")
    if session.launched.experiment.policy.controller:
        say(f"# ---- {session.chain.name}, the controller of all of these\n{session.chain.script()}\n")


def _request_text(session: Session, report: Report) -> Callable[[Batch], str]:
    """Function from a batch of the report's plan to the time and memory it requests from Slurm, with the source of the figures."""
    from jobs.control.estimates import CONFIGURED, asks_in_words, shape_in_words

    predict = experience_of(desired_of(session.launched), report)

    def text(batch: Batch) -> str:
        asked = asks_in_words(session.arrays.asked(batch), predict(batch.stage, batch.method) if predict else CONFIGURED)
        return asked + shape_in_words(resources_of(session.launched.experiment, batch.stage), max(len(task.keys) for task in batch.tasks))

    return text


def _print_pass(report: Report, chain: ChainState | None, hints: Hints) -> None:
    """What one pass submitted, the state of the rest, and what makes the next pass."""
    plan = report.plan
    for batch in plan.batches:
        job = next((report.in_flight[key].job for key in batch.keys if key in report.in_flight), "not accepted by Slurm now")
        say(f"{batch.stage} {batch.method}: {counted(len(batch.tasks), 'task')}, array {job.partition('_')[0]}")
    counts: tuple[tuple[str, int], ...] = (
        *(("stages done", len(plan.reused)), ("submitted", len(report.submitted)), ("in the queue or running", len(plan.waiting))),
        *(("deferred", len(plan.deferred)), ("given up", len(plan.given_up)), ("blocked", len(plan.blocked))),
        *((("held or cancelled", len(plan.held_or_cancelled)),) if plan.held_or_cancelled else ()),
    )
    say(", ".join(f"{count} {what}" for what, count in counts))
    if chain is not None and not plan.settled:
        say(chain.sentence)
    if plan.complete:
        say(f"complete: {hints.of('collect')} writes the tables")
    elif not plan.settled:
        supervised = chain is not None and not chain.problem
        by_hand = f"{hints.of('reconcile')} submits what failed or was deferred"
        more = "the controller submits the rest and writes the tables" if supervised else by_hand
        say(f"watch with {hints.of('status', '--watch')}; {more}")
