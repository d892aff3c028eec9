"""`bundle`: one zip of an experiment for reviewers; `verify`: the tables rendered again from it, compared byte for byte."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.collect import read_results, unreplaced_of
from jobs.commands.console import note, print_lines, say, warn_if_changed
from jobs.commands.disk import in_units
from jobs.commands.status_report import status_of, table_states
from jobs.errors import UsageError
from jobs.experiment.config import SECRETS
from jobs.experiment.stored_config import resolved_values
from jobs.store.records import file_digest
from jobs.store.snapshot import plan_snapshot
from jobs.store.usage import size_of
from jobs.text import counted, listed

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.report.bundle.contents import Bundle, Origin
    from jobs.tables.latex import Style

ENVIRONMENT_FILES = (".env", ".env.*")  # beside the code; their values must not be in a bundle


def write_bundle(session: Session, out: Path | None, unreplaced: str | None, style: Style) -> bool:
    """Write the bundle of an experiment. Returns whether every run has a result. UsageError without any result."""
    from jobs.report.bundle.archive import pack
    from jobs.report.bundle.contents import fill

    target = session.launched.layout.bundle if out is None else out
    if target.is_dir():
        raise UsageError(f"--out {out}: a folder; name the file, for example {target / session.launched.layout.bundle.name}")
    warn_if_changed(session)
    origin = _origin(session, unreplaced, style)
    if not origin.results:
        raise UsageError(f"{session.name}: no stage has a result yet; {session.hints.of('status')} shows where it stands")
    with _workspace() as folder:
        bundle = fill(folder, origin)
        others = _other_tables(origin, bundle)
        pack(folder, target)
    print_lines(_lines(target, bundle, len(origin.results)))
    for line in bundle.left_out:
        note(f"left out: {line}")
    if others:
        why = "written with other options, by another version of the program, or before the last result"
        note(f"{listed(others)} in {session.launched.layout.tables} differ from those in the bundle: {why}")
    if not bundle.complete:
        note(f"incomplete: {session.hints.of('collect')} lists the missing runs")
    return bundle.complete


def verify_bundle(file: Path, out: Path | None, code: Path) -> bool:
    """Verify a bundle and print what was found. Returns whether it is what it states, and its tables are rendered byte for byte.

    `out`: an empty folder for the rendered tables; `code`: folder of the program that runs. UsageError if `file` is no bundle.
    """
    from jobs.report.bundle.archive import unpack
    from jobs.report.bundle.verify import report_lines, verify

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: not an empty folder; name a new one")
    with _workspace() as folder:
        bundled, rendered = folder / "bundle", folder / "rendered" if out is None else out
        unpack(file, bundled)
        try:
            found = verify(bundled, rendered, code)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
    print_lines(report_lines(found, str(file)))
    for line in found.notes:
        note(line)
    if out is not None:
        say(f"{out}: the tables as they were rendered here")
    return found.equal


@contextmanager
def _workspace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ser-grid-bundle-") as folder:
        yield Path(folder)


def _origin(session: Session, unreplaced: str | None, style: Style) -> Origin:
    from jobs.report.bundle import scrub
    from jobs.report.bundle.contents import MANIFEST, Origin
    from jobs.report.bundle.inputs import Inputs, stages_of
    from jobs.tables.summary import Status

    chosen = unreplaced_of(unreplaced)
    report = session.look(ask_slurm=False)
    layout, experiment, graph = session.launched.layout, session.launched.experiment, report.graph
    results = read_results(graph, layout, report.facts)
    states = table_states(status_of(session.name, report))
    inputs = Inputs(
        experiment=session.name,
        corpus=graph.corpus,
        corpus_digest=graph.corpus_digest,
        stages=stages_of(graph),
        runs=graph.runs,
        superseded=graph.superseded,
        states={key: Status(state) for key, state in states.items() if key not in results},
        rule=experiment.policy.outliers,
        sigmas=experiment.policy.sigmas,
        rounds=experiment.policy.rounds,
        max_seeds=experiment.policy.max_seeds,
        recipes=session.recipes,
        published=session.published,
        unreplaced=chosen,
        style=style,
        measurements=tuple(sorted(graph.measurements)),
        score=graph.score,
        terms=graph.terms,
        corpus_caption=session.launched.corpus.caption,
    )
    files = (path for pattern in ENVIRONMENT_FILES for path in session.root.glob(pattern) if path.is_file())
    secrets = scrub.secret_values(
        {key: attrgetter(key)(experiment) for key in SECRETS},
        [path.read_text(encoding="utf-8", errors="replace") for path in files],
    )
    return Origin(
        layout,
        graph,
        results,
        inputs,
        resolved_values(experiment),
        Path(session.launched.corpus.folder) / MANIFEST,
        plan_snapshot(session.source, layout, experiment.registry),
        secrets,
    )


def _other_tables(origin: Origin, bundle: Bundle) -> list[str]:
    """Names of the files in the experiment's folder of tables that have other bytes in the bundle; its report always has, without hosts."""
    from jobs.report.bundle.contents import TABLES
    from jobs.report.write import FILE

    present = {path.relative_to(origin.layout.tables).as_posix(): path for path in origin.layout.tables.rglob("*") if path.is_file()}
    stated = {name: bundle.files.get(f"{TABLES}/{name}") for name in present}
    return [
        name for name, path in sorted(present.items()) if name != FILE and stated[name] is not None and file_digest(path) != stated[name]
    ]


def _lines(target: Path, bundle: Bundle, results: int) -> Iterator[str]:
    import shlex

    size = in_units(size_of(target))
    yield f"{target}: {counted(bundle.runs, 'run')}, {counted(results, 'result')}, {counted(len(bundle.files) + 1, 'file')}, {size}"
    yield f"sha256 {file_digest(target)}"
    yield f"`{shlex.join(('python', 'launch.py', 'verify', str(target)))}` renders its tables again, on any machine"
