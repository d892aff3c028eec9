"""`sweep`: run or submit a sweep, print its plan, state and report. jobs.sweeps.session does the work.

Functions that return bool return whether the command succeeded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.console import note, print_lines, say
from jobs.sweeps.records import TrialRecord, TrialState, load_sweep, read_trials, running_means
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.sweeps.report.write import SweepReport
    from jobs.sweeps.session import SweepLauncher


COLUMNS = ("point", "UA", "± sd", "95 %", "folds", "runs", "to the best", "p", "")


def print_preview(launcher: SweepLauncher) -> None:
    """What a launch would do; on Slurm with the batch script."""
    from jobs.sweeps import allocation, preflight

    print_lines(preflight.preview_lines(launcher.sweep, preflight.preview(launcher.sweep, launcher.registry)))
    if launcher.on_slurm:
        say(f"\n# ---- the job that computes all of it\n{allocation.preview(launcher.sweep, launcher.root)}")


def run_here(launcher: SweepLauncher) -> bool:
    """Run a sweep on this machine and print its report. Returns whether it completed without a failed trial."""
    if launcher.nothing_left():
        return _nothing_left(launcher)
    before = {record.trial: record for record in read_trials(launcher.sweep.folder)}
    if before:
        say(f"{launcher.name}: resumes sweep {launcher.sweep.digest}, {counted(len(before), 'trial')} started before")
    if not launcher.run_here(tell=lambda line: print_lines([line])):
        note(f"stopped; nothing is lost: `{launcher.command}` with the same settings resumes")
        return False
    return _print_report(launcher)


def run_on_slurm(launcher: SweepLauncher, *, wait: bool) -> bool:
    """Submit the allocation; with `wait`, print progress until it has ended."""
    if launcher.nothing_left():
        return _nothing_left(launcher)
    from jobs.sweeps.allocation import log_file

    job, new = launcher.submit()
    before = "" if new else ", submitted before"
    say(f"{launcher.name}: sweep {launcher.sweep.digest} is job {job}{before}; its log: {log_file(launcher.sweep)}")
    look = f"`python launch.py sweep {launcher.name} --show`"
    if not wait:
        say(f"watch with {look}; the job writes the report at the end")
        return True
    seen: dict[str, TrialRecord] = {}

    def tell(records: Sequence[TrialRecord]) -> None:
        print_lines(trial_lines(seen, records, len(launcher.sweep.folds)))
        seen.update({record.trial: record for record in records})

    ended = launcher.wait(on_trials=tell, on_state=lambda sentence: print_lines([f"{launcher.name}: {sentence}"]))
    if ended is None:
        note(f"job {job} keeps running: {look} shows its state, `python launch.py sweep {launcher.name} --cancel` ends it")
        return False
    found = _print_report(launcher)
    if not ended:
        note(launcher.status().sentence)
    return found and ended


def drive(folder: Path) -> bool:
    """Run a sweep's driver inside the Ray cluster of its allocation; log lines have a time. Returns False if it was interrupted."""
    from jobs.sweeps.session import drive as run
    from jobs.worker.main import print_line

    sweep = load_sweep(folder)
    print_line(f"{sweep.layout.experiment}: sweep {sweep.digest} begins")
    ended = run(sweep, tell=print_line)
    print_line("every trial has ended" if ended else "interrupted")
    return ended


def show(launcher: SweepLauncher, *, as_json: bool) -> None:
    """Print the report so far and the state of the sweep."""
    from jobs.sweeps.report.write import write_report

    status = launcher.status()
    report = write_report(launcher.sweep)
    if as_json:
        from jobs.sweeps.report.as_json import to_json

        value = {**to_json(report.summary, report.choice), "standing": status.state, "job": status.job}
        say(json.dumps(value, indent=1))
        return
    _print(report)
    say(status.sentence)


def cancel(launcher: SweepLauncher) -> None:
    """Cancel a sweep until it is launched again."""
    print_lines(launcher.cancel())
    if launcher.status().state != "complete":
        say(f"`{launcher.command}` with the same settings resumes")


def trial_lines(before: Mapping[str, TrialRecord], now: Sequence[TrialRecord], folds: int) -> list[str]:
    """Lines on folds computed and trials ended between two reads of the records. Pure."""
    lines = []
    for record in now:
        former = before.get(record.trial)
        means = running_means(record.folds)
        for number in range(0 if former is None else len(former.folds), len(record.folds)):
            fold = record.folds[number]
            lines.append(
                f"{record.point.label}: fold {fold.fold} ({number + 1} of {folds}) validation UA {fold.ua:.1f}, mean {means[number]:.1f}"
            )
        if record.state is not TrialState.running and (former is None or former.state is not record.state):
            lines.append(f"{record.point.label}: {record.state.text}{record.error and f': {record.error}'}")
    return lines


def _nothing_left(launcher: SweepLauncher) -> bool:
    say(f"{launcher.name}: sweep {launcher.sweep.digest}: every trial has ended, nothing is left to compute")
    return _print_report(launcher)


def _print_report(launcher: SweepLauncher) -> bool:
    """Write and print the report. Returns False if no point is complete, or one failed."""
    from jobs.sweeps.report.write import write_report

    report = write_report(launcher.sweep)
    _print(report)
    failed = sum(record.state is TrialState.failed for record in read_trials(launcher.sweep.folder))
    if failed:
        note(f"{counted(failed, 'trial')} failed: `{launcher.command}` with the same settings tries again")
    return report.summary.best is not None and not failed


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
