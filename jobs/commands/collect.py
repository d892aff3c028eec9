"""`collect`: write an experiment's tables and print them; at the end of an experiment, send the notices too."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.collect_report import HTML, report_text_of, source_of, with_report
from jobs.commands.console import note, say, warn_if_changed
from jobs.commands.status_report import problem_lines, status_of, table_states
from jobs.errors import UsageError
from jobs.store.layout import shared_path
from jobs.store.records import Result, read_result
from jobs.text import counted, listed

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.control.facts import StageFacts
    from jobs.experiment.graph import Graph
    from jobs.report.material import Source
    from jobs.store.layout import Layout
    from jobs.tables.collect import CollectReport
    from jobs.tables.latex import Style
    from jobs.tables.published import Published
    from jobs.tables.several import Part
    from jobs.tables.summary import Summary, Unreplaced


@dataclass(frozen=True)
class Asked:
    """What `collect` is asked to write."""

    formats: Sequence[str] | None = None  # None: all
    out: Path | None = None  # None: the experiment's folder of tables, or that beside the CSV file
    unreplaced: str | None = None  # `--unreplaced`
    style: Style | None = None  # of LaTeX; None: the default
    force: bool = False  # overwrite complete tables with incomplete ones of fewer runs

    def __post_init__(self) -> None:
        """UsageError for an unknown format."""
        if self.formats:
            from jobs.tables.collect import check_formats

            check_formats(self.formats, also=(HTML,))

    @property
    def tables(self) -> tuple[str, ...]:
        """The formats beside the HTML report."""
        from jobs.tables.collect import FORMATS

        return tuple(FORMATS) if self.formats is None else tuple(name for name in self.formats if name != HTML)

    @property
    def to_stdout(self) -> str:
        """The format that is written to standard output; "" if files are written. UsageError if it is not one format."""
        if self.out != STDOUT:
            return ""
        if self.formats is None or len(self.formats) != 1:
            raise UsageError("--out - writes one format to standard output: name it with --format")
        return self.formats[0]


STDOUT = Path("-")
EVERYTHING = Asked()


def write_tables(session: Session, report: Report, asked: Asked = EVERYTHING, *, announce: bool = False) -> bool:
    """Write and print the tables. Returns whether every run has a result.

    `announce`: this is the end of the experiment: notices are sent, and better tables are kept with a line on stderr. Otherwise UsageError
    is raised for them.
    """
    warn_if_changed(session)
    if asked.to_stdout:
        part = part_of(session, report)
        summary = _summary(part, asked)
        _print_text(asked, summary, session.published, [source_of(session, part)])
        return summary.complete
    written = collect_tables(session, report, asked)
    if written.kept and not announce:
        raise UsageError(_kept_line(session, written))
    _print_tables(written, session.published)
    if written.kept:
        note(_kept_line(session, written))
    elif any(_is_matrix(path) for path in written.paths):
        say(f"{(session.launched.layout.folder if asked.out is None else asked.out) / 'confusion'}: one matrix per run and method")
    if announce:
        for line in send_notices(session, report, written):
            note(line)
    return written.complete


def write_joint_tables(sessions: Sequence[Session], asked: Asked) -> bool:
    """Write and print one table of several experiments. Returns whether every run has a result. UsageError without a folder."""
    from jobs.tables.collect import collect_several
    from jobs.tables.latex import PLAIN
    from jobs.tables.several import joint_published, joint_summary, names_of

    names = [session.name for session in sessions]
    if len(set(names)) != len(names):
        raise UsageError(f"collect {' '.join(names)}: name each experiment once")
    if asked.out is None:
        raise UsageError(f"collect {' '.join(names)}: name the folder of the joint table: --out DIR")
    parts = []
    for session in sessions:
        warn_if_changed(session)
        parts.append(part_of(session, session.look(ask_slurm=False)))
    summary, labels = joint_summary(parts, unreplaced_of(asked.unreplaced))
    published = joint_published([session.published for session in sessions], labels)
    sources = [source_of(session, part, names_of(part, parts)) for session, part in zip(sessions, parts, strict=True)]
    if asked.to_stdout:
        _print_text(asked, summary, published, sources)
        return summary.complete
    written = collect_several(summary, published, asked.out, asked.tables, asked.style or PLAIN)
    written = with_report(written, asked.formats, asked.out, published, sources)
    _print_tables(written, published)
    return written.complete


def write_csv_tables(source: Path, rule: str | None, published_file: Path, asked: Asked = EVERYTHING) -> bool:
    """Write and print tables of the runs in a CSV file. Returns whether every run has a result."""
    from jobs.experiment.config import Policy
    from jobs.tables.collect import collect_csv, csv_folder, summary_of_csv
    from jobs.tables.latex import PLAIN
    from jobs.tables.published import load_published

    policy, published = Policy(), load_published(published_file, None)
    chosen, unreplaced = rule or policy.outliers, unreplaced_of(asked.unreplaced)
    if asked.to_stdout:
        summary, _ = summary_of_csv(source, rule=chosen, sigmas=policy.sigmas, rounds=policy.rounds, unreplaced=unreplaced)
        _print_text(asked, summary, published)
        return summary.complete
    written = collect_csv(
        source,
        published,
        rule=chosen,
        sigmas=policy.sigmas,
        rounds=policy.rounds,
        unreplaced=unreplaced,
        style=asked.style or PLAIN,
        formats=asked.tables,
        out=asked.out,
    )
    written = with_report(written, asked.formats, asked.out or csv_folder(source), published)
    _print_tables(written, published)
    for line in written.notes:
        note(line)
    return written.complete


def _print_text(asked: Asked, summary: Summary, published: Published, sources: Sequence[Source] = ()) -> None:
    """One format on standard output, and nothing else there."""
    from jobs.tables.collect import text_of
    from jobs.tables.latex import PLAIN

    html = asked.to_stdout == HTML
    sys.stdout.write(
        report_text_of(summary, published, sources) if html else text_of(asked.to_stdout, summary, published, asked.style or PLAIN)
    )
    if not summary.complete:
        note(f"incomplete: {counted(len(summary.missing), 'run')} missing")


def unreplaced_of(text: str | None) -> Unreplaced:
    """The value of `--unreplaced`, by default keep. UsageError for an unknown one."""
    from jobs.tables.summary import Unreplaced

    if text is not None and text not in Unreplaced.__members__:
        raise UsageError(f"--unreplaced {text!r}: keep or drop the outliers that no other run replaces")
    return Unreplaced[text] if text is not None else Unreplaced.keep


def write_and_notify(session: Session, report: Report, message: str = "") -> list[str]:
    """Write the tables and send the notices; one line per notice. `message`: why the controller stopped before the end."""
    return send_notices(session, report, collect_tables(session, report), message)


def notify_of_stuck_jobs(session: Session, lines: Sequence[str], report: Report) -> list[str]:
    """Send the notice that jobs will never start, which `lines` describe; one line per notice."""
    return send_notices(session, report, collect_tables(session, report), "; ".join(lines), "stuck")


def collect_tables(session: Session, report: Report, asked: Asked = EVERYTHING) -> CollectReport:
    """Write the tables of what has a result."""
    from jobs.tables.collect import collect
    from jobs.tables.latex import PLAIN

    part, layout = part_of(session, report), session.launched.layout
    written = collect(
        layout,
        part.graph,
        part.results,
        part.states,
        session.published,
        formats=asked.tables,
        out=asked.out,
        outlier_rule=part.outlier_rule,
        judgements=part.judgements,
        recipes=part.recipes,
        unreplaced=unreplaced_of(asked.unreplaced),
        corpus_caption=part.corpus_caption,
        style=asked.style or PLAIN,
        force=asked.force,
    )
    return with_report(written, asked.formats, asked.out or layout.tables, session.published, [source_of(session, part)])


def _summary(part: Part, asked: Asked) -> Summary:
    """The numbers of what has a result."""
    from jobs.tables.collect import summary_of

    unreplaced = unreplaced_of(asked.unreplaced)
    return summary_of(
        part.name,
        part.graph,
        part.results,
        part.states,
        part.outlier_rule,
        part.judgements,
        part.recipes,
        unreplaced,
        part.corpus_caption,
    )


def part_of(session: Session, report: Report) -> Part:
    """What tables are made of: the graph of an experiment with its results, states, judgements and recipes."""
    from jobs.control.outliers import rule_in_words
    from jobs.tables.several import Part

    policy = session.launched.experiment.policy
    return Part(
        session.name,
        report.graph,
        read_results(report.graph, session.launched.layout, report.facts),
        table_states(status_of(session.name, report)),
        rule_in_words(policy.outliers, policy.sigmas, policy.rounds),
        report.judgements,
        session.recipes,
        session.published.labels,
        session.launched.corpus.caption,
    )


def send_notices(session: Session, report: Report, written: CollectReport, message: str = "", outcome: str = "stopped") -> list[str]:
    """Send what the policy asks for at the end of an experiment, once for each launch and outcome. Returns one line per notice.

    `message`: what has happened instead of an end, with its `outcome`.
    """
    policy = session.launched.experiment.policy
    if policy.mail is None and policy.webhook is None:
        return []
    from jobs.commands.notify import Ending, notice_line, notify

    ending = Ending(
        experiment=session.name,
        launched=session.launched.since,
        outcome=outcome if message else "complete" if written.complete else "incomplete",
        runs=written.summary.finished,
        all_runs=len(report.graph.runs),
        ua={f"{method.corpus} {method.method}": method.mean_ua for method in written.summary.methods},
        problems=(*filter(None, [message, _kept_line(session, written)]), *problem_lines(status_of(session.name, report))),
        tables=str(shared_path(session.launched.layout.tables)),
        score=written.summary.score,
    )
    return [notice_line(notice) for notice in notify(policy, session.launched.layout, ending)]


def read_results(graph: Graph, layout: Layout, facts: Mapping[str, StageFacts]) -> dict[str, Result]:
    """Key -> result of every finished stage of a graph, those of dropped runs included."""
    found: dict[str, Result] = {}
    for key, node in graph.nodes.items():
        if key in facts and facts[key].done and (result := read_result(layout.stage(node.stage, key), key)):
            found[key] = result
    return found


def _kept_line(session: Session, written: CollectReport) -> str:
    """Why the tables were not written and how to write them; "" if they were."""
    how = f"`python launch.py collect {session.name} --force` overwrites them, `--out DIR` writes elsewhere"
    return f"{written.kept}; {how}" if written.kept else ""


def _is_matrix(path: Path) -> bool:
    return "confusion" in (path.parent.name, path.parent.parent.name)


def _print_tables(written: CollectReport, published: Published) -> None:
    """The tables, the files they were written to, a warning where the order depends on the dropped runs, and the missing runs."""
    from jobs.tables.display import print_tables
    from jobs.tables.order import order_sentences

    print_tables(written.summary, published)
    for path in written.paths:
        if not _is_matrix(path):
            say(str(path))
    for line in (
        *(f"warning: {line}" for line in written.summary.arithmetic.warnings),
        *written.gaps,
        *(f"{corpus}: {sentence}" for corpus, sentence in order_sentences(written.summary, published.labels).items()),
    ):
        note(line)
    if not written.complete:
        missing = written.missing
        note(f"incomplete: {counted(len(missing), 'run')} missing: {listed(missing)}")
