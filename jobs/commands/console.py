"""What the commands show: rich on a terminal, plain lines into a pipe. What they do is in jobs.commands.session.

Functions that return whether all went well leave the exit code to the command.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from jobs.commands.status_report import Status, closing_lines, judged_lines, problem_lines, status_lines, status_table, status_to_json
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.store.records import damaged_records

if TYPE_CHECKING:
    from rich.console import Group

    from jobs.commands.session import Cancellation, Launcher
    from jobs.control.controller import Event, Report
    from jobs.control.estimates import Forecast
    from jobs.slurm.chain import ChainState
    from jobs.tables.collect import CollectReport
    from jobs.tables.published import Published


Found = TypeVar("Found")
SHOWN = 5  # runs named in one line
WATCH_SECONDS = 5.0  # between looks, at the most


def say(line: str) -> None:
    """One line on stdout."""
    typer.echo(line)


def note(line: str) -> None:
    """One line on stderr."""
    typer.echo(line, err=True)


def tell(event: Event) -> None:
    """What happened to a stage, as it happens."""
    typer.echo(event.line)


def stopping(running: int) -> None:
    """That workers were asked to stop."""
    note(f"stopping: {running} running stages write a checkpoint (Ctrl-C again to stop at once)")


# ---- status


def show_status(launcher: Launcher, *, look_only: bool, as_json: bool = False, watch: bool = False) -> None:
    """Where an experiment stands, on Slurm after a pass if one may be made here; with `watch` again and again."""
    why = launcher.why_only_look()
    if why and (launcher.launched.changed or (launcher.on_slurm and not look_only)):
        note(why)
    look_only = look_only or bool(why)
    if watch:
        pause = min(WATCH_SECONDS, launcher.launched.experiment.policy.poll_seconds)
        _watch(lambda: _standing(launcher, look_only), pause)
        return
    now = _standing(launcher, look_only)
    if as_json:
        say(json.dumps(status_to_json(now), indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_shown(now))
    else:
        say("\n".join(status_lines(now)))


def _standing(launcher: Launcher, look_only: bool) -> Status:
    if not launcher.on_slurm or look_only or launcher.cancelled:
        return launcher.status(launcher.look())
    try:
        return launcher.status(launcher.one_pass())
    except (SlurmUnavailableError, UsageError) as error:
        report = launcher.look()
        if not launcher.blind:  # else that was said
            note(str(error))
        return launcher.status(report)


def _watch(look: Callable[[], Status], pause: float) -> None:
    """Until nothing is left to do, or Ctrl-C."""
    if sys.stdout.isatty():
        from rich.live import Live

        live: Live | None = Live(auto_refresh=False)
    else:
        live = None
    try:
        with live or nullcontext():
            while True:
                now = look()
                if live is None:
                    print_lines([time.strftime("%Y-%m-%d %H:%M:%S"), *status_lines(now)])
                else:
                    live.update(_shown(now), refresh=True)
                if now.settled:
                    return
                time.sleep(pause)
    except KeyboardInterrupt:
        return


def _shown(now: Status) -> Group:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [status_table(now)]
    parts.extend(Text(line, style="yellow") for line in judged_lines(now))
    parts.extend(Text(line, style="red") for line in problem_lines(now))
    parts.extend(Text(line) for line in closing_lines(now))
    return Group(*parts)


def show_requests(launcher: Launcher, *, as_json: bool = False) -> None:
    """How often what was predicted of time and memory was enough."""
    from jobs.commands.requests import requests_lines, requests_to_json

    _warn_of_other_code(launcher)
    rows = launcher.requests()
    say(json.dumps(requests_to_json(launcher.name, rows), indent=1) if as_json else "\n".join(requests_lines(launcher.name, rows)))


# ---- single runs


def print_explanation(launcher: Launcher, run: str) -> None:
    """The whole story of a run or a stage."""
    from jobs.commands.explain import explain_lines, find_target, read_stories, stages_of

    _warn_of_other_code(launcher)
    report = launcher.look()
    target = find_target(report.graph, run)
    stories = read_stories(stages_of(report.graph, target.node), launcher.launched.layout, launcher.sight())
    print_lines(explain_lines(target, report, stories, launcher.launched.experiment.policy, acts=launcher.acts))
    print_lines(f"damaged record, counts as missing: {each}" for each in damaged_records(launcher.launched.layout.folder))


def print_log(launcher: Launcher, run: str, *, stage: str | None, attempt: int | None, lines: int | None, follow: bool) -> bool:
    """The log of an attempt; False, and a line that says why, where there is none yet."""
    from jobs.commands.explain import find_target, next_words, stages_of
    from jobs.commands.logs import attempt_over, choose_stage, find_log, follow_log, read_log

    _warn_of_other_code(launcher)
    layout, report = launcher.launched.layout, launcher.look()
    node = choose_stage(layout, stages_of(report.graph, find_target(report.graph, run).node), stage)
    log = find_log(layout, node, attempt)
    if log is None:
        following = next_words(node.key, report.facts[node.key], report.in_flight, report.plan, launcher.acts)
        note(f"{node.name}: no log yet, it was never begun: {following}")
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


def print_cancellation(done: Cancellation, launcher: Launcher, *, whole: bool) -> None:
    """What a `cancel` has done."""
    if not whole and not done.stages:
        say(f"{launcher.name}: nothing to cancel, what was named has its result")
        return
    if not (done.stages or done.withdrawn or done.links):
        say(f"{launcher.name}: nothing to cancel, every stage has its result")
        return
    stages = f"{done.stages} stage{'' if done.stages == 1 else 's'}"
    what = f"everything cancelled ({stages} had no result)" if whole else f"{stages} cancelled"
    say(f"{launcher.name}: {what}{f'; {done.withdrawn} withdrawn from Slurm' if launcher.on_slurm else ''}")
    if done.links:
        say(f"controller ended (jobs {', '.join(done.links)})")
    if done.running:
        more = ", ..." if len(done.running) > SHOWN else ""
        say(f"still computed, and kept: what {', '.join(done.running[:SHOWN])}{more} works on; nothing new is begun")
    say(f"`{launcher.command}` with the same settings goes on")


# ---- passes, plans and tables


def make_pass(launcher: Launcher) -> bool:
    """One pass, and a controller that goes on; False where nothing is left to do and not every run is in."""
    report = launcher.one_pass()
    chain = None if report.settled else launcher.ensure_chain()
    _print_pass(report, chain, launcher.name)
    if report.settled and not report.complete:
        print_lines(status_lines(launcher.status(report)))
        return False
    return True


def _print_pass(report: Report, chain: ChainState | None, name: str) -> None:
    """What one pass has done, and who goes on."""
    plan = report.plan
    for batch in plan.batches:
        job = next((report.in_flight[key].job for key in batch.keys if key in report.in_flight), "not taken by Slurm now")
        say(f"{batch.stage} {batch.method}: {len(batch.tasks)} task{'' if len(batch.tasks) == 1 else 's'}, array {job.partition('_')[0]}")
    counts: tuple[tuple[str, int], ...] = (
        *(("stages there", len(plan.reused)), ("submitted", len(report.submitted)), ("under way", len(plan.waiting))),
        *(("deferred", len(plan.deferred)), ("given up", len(plan.given_up)), ("blocked", len(plan.blocked))),
        *((("held or cancelled", len(plan.stayed)),) if plan.stayed else ()),
    )
    say(", ".join(f"{count} {what}" for what, count in counts))
    if chain is not None and not plan.settled:
        say(chain.sentence)
    if plan.complete:
        say(f"complete: `python launch.py collect {name}` writes the tables")
    elif not plan.settled:
        after = "it goes on by itself until the tables are there" if chain is not None and not chain.problem else ""
        more = after or f"`python launch.py reconcile {name}`, or any `status`, submits what failed or was deferred"
        say(f"look with `python launch.py status {name} --watch`; {more}")


def serve_as_link(launcher: Launcher) -> None:
    """Be one link of the chain; what it does is the log of all links, so each line has its time and its job."""
    from jobs.store.attempts import own_slurm_job

    who = f"{launcher.name}: controller {own_slurm_job()}".rstrip()

    def log(text: str) -> None:
        print_lines([f"{time.strftime('%Y-%m-%d %H:%M:%S')} {who} {text}"])

    def told(report: Report) -> None:
        if report.submitted:
            log(f"submitted {len(report.submitted)} stage{'' if len(report.submitted) == 1 else 's'}")

    log("begins")
    log(f"leaves: {launcher.control(tell=told).value}")


def print_plan(launcher: Launcher) -> None:
    """What a launch would do: reuse, tasks, hours, scripts."""
    from jobs.control.estimates import forecast, forecast_lines
    from jobs.experiment.config import resources_of

    report = launcher.look(room=True)
    expected: Forecast = forecast(
        report.graph,
        report.facts,
        report.plan,
        lambda stage: resources_of(launcher.launched.experiment, stage),
        launcher.request_words(report) if launcher.on_slurm else lambda batch: "",
    )
    say(f"{launcher.name}: {len(report.graph.runs)} runs, {len(report.graph.nodes)} stages; reused {expected.reused}")
    say("\n".join(forecast_lines(expected)))
    if not launcher.on_slurm:
        return
    for preview in launcher.arrays.previews(report.plan.batches, report.graph, report.in_flight):
        say(f"\n# ---- {preview.name}\n{preview.script}")
        for call in preview.refinements:
            say(f"# then: {call}")
    if launcher.launched.experiment.policy.controller:
        say(f"\n# ---- {launcher.chain.name}, which looks after all of these\n{launcher.chain.script()}")


def finish(launcher: Launcher, report: Report) -> bool:
    """Tables and notices of an experiment that has ended here, or why there are none; whether every run is in."""
    if report.interrupted:
        note(f"stopped; nothing is lost: `{launcher.command}` with the same settings goes on")
        return False
    now = launcher.status(report)
    for line in (*judged_lines(now), *problem_lines(now)):
        note(line)
    complete = write_tables(launcher, report, announce=True)
    if not complete:
        for line in (*now.steps, f"not complete; logs are in {launcher.launched.layout.logs}"):
            note(line)
    return complete


def write_tables(
    launcher: Launcher, report: Report, formats: Sequence[str] | None = None, out: Path | None = None, *, announce: bool = False
) -> bool:
    """Write and print the tables; with `announce`, send the notices of an end. Returns whether every run is in."""
    _warn_of_other_code(launcher)
    written = launcher.tables(report, formats, out)
    _print_tables(written, launcher.published)
    say(f"{(launcher.launched.layout.folder if out is None else out) / 'confusion'}: one matrix per run and method")
    if announce:
        from jobs.commands.notify import notice_line

        for notice in launcher.notify(report, written):
            note(notice_line(notice))
    return written.complete


def write_foreign_tables(
    source: Path, rule: str | None, published_file: Path, formats: Sequence[str] | None = None, out: Path | None = None
) -> bool:
    """The same tables of runs from elsewhere; returns whether all of them are in."""
    from jobs.experiment.config import Policy
    from jobs.tables.collect import FORMATS, collect_foreign
    from jobs.tables.published import load_published

    policy, published = Policy(), load_published(published_file, None)
    written = collect_foreign(
        source,
        published,
        rule=rule or policy.outliers,
        sigmas=policy.sigmas,
        rounds=policy.rounds,
        formats=formats or tuple(FORMATS),
        out=out,
    )
    _print_tables(written, published)
    for line in written.notes:
        note(line)
    return written.complete


def _print_tables(written: CollectReport, published: Published) -> None:
    """The tables, where they were written, and what is missing."""
    from jobs.tables.display import print_tables

    print_tables(written.summary, published)
    for path in written.paths:
        if "confusion" not in (path.parent.name, path.parent.parent.name):
            say(str(path))
    if not written.complete:
        missing = written.missing
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        note(f"incomplete: {len(missing)} {'run is' if len(missing) == 1 else 'runs are'} missing: {', '.join(missing[:SHOWN])}{more}")


# ---- anything


def _warn_of_other_code(launcher: Launcher) -> None:
    if launcher.launched.changed:
        note(launcher.why_only_look())


def print_lines(lines: Iterable[str]) -> None:
    """Lines as they come, each at once: a pipe reads a log while it grows."""
    for line in lines:
        say(line)
        sys.stdout.flush()


def with_progress(what: str, work: Callable[[Callable[[int, int], None]], Found]) -> Found:
    """Run `work` with a callback that shows progress: a bar on a terminal, a line every ten percent elsewhere."""
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
