#!/usr/bin/env python3
"""Command line: `prepare` a corpus, launch a `grid`, look at its `status`, `explain` a run, `collect` the tables, `sweep` settings.

Only this file knows both packages: it names the registry of `ser_core` to `jobs`, and prepares corpora. The other commands are in
`jobs.commands`: their arguments in the modules that end in `_arguments`, what a command does in the module of its name. Commands import
what they need when they run, so that `--help` and `status` start fast.
Exit codes: 0 done · 1 internal error · 2 wrong usage, configuration or data · 3 finished but incomplete.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.arguments import Data
from jobs.commands.bundle_arguments import add_bundle_commands
from jobs.commands.collect_arguments import add_collect
from jobs.commands.console import COMMAND
from jobs.commands.disk_arguments import add_disk_commands
from jobs.commands.examples import add_examples
from jobs.commands.export_arguments import add_export_command
from jobs.commands.launch_arguments import add_launch_commands
from jobs.commands.main import run
from jobs.commands.program import Program
from jobs.commands.run_arguments import add_run_commands
from jobs.commands.site_arguments import add_site_commands
from jobs.commands.sweep_arguments import add_sweep
from jobs.errors import UsageError
from jobs.store.layout import shared_path

ROOT = shared_path(Path(__file__).resolve() if Path(__file__).is_symlink() else Path(__file__)).parent
INSTALLED = (ROOT / "__init__.py").is_file()  # it lies in the package `ser_grid`
PROGRAM = Program(
    root=ROOT,
    registry="ser_core.registry:REGISTRY",
    experiment="iemocap",
    home=shared_path(Path()) if INSTALLED else None,
    command="ser-grid" if INSTALLED else COMMAND,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Experiment grids on this machine or a Slurm cluster whose last step is a trustworthy table.",
)


@app.command()
def prepare(
    kind: Annotated[str | None, typer.Argument(metavar="CORPUS", help="a kind of corpus; --list shows them")] = None,
    source: Annotated[Path | None, typer.Option(help="folder of the corpus as distributed; a file for csv and labels")] = None,
    name: Annotated[str | None, typer.Option(help="name of the prepared corpus; default: its kind, or the source's name")] = None,
    meta: Annotated[Path | None, typer.Option(metavar="FILE", help="emobox: its list of a corpus, data/NAME/NAME.jsonl")] = None,
    audio: Annotated[Path | None, typer.Option(help="emobox, labels: folder of the recordings; labels: default: that of the file")] = None,
    four_classes: Annotated[bool, typer.Option("--four-classes", help="emodb: only the four classes of IEMOCAP")] = False,
    folds: Annotated[str | None, typer.Option(metavar="RULE", help="csv without a fold column: leave-one-speaker-out, or K")] = None,
    shared_speakers: Annotated[
        bool, typer.Option("--shared-speakers", help="emobox, csv, labels: accept folds that share speakers; every caption states it")
    ] = False,
    strength: Annotated[float | None, typer.Option(help="demo: mean strength of the emotions; default: 1")] = None,
    check_counts: Annotated[bool, typer.Option(help="compare classes and folds with the published counts")] = True,
    list_known: Annotated[bool, typer.Option("--list", help="show each corpus, what to give to prepare, its folds and its page")] = False,
    data: Data = PROGRAM.data,
) -> None:
    """Check a corpus, convert it to 16 kHz mono, write its manifest. Every problem is listed by file name."""
    from jobs.commands.console import note, say, with_progress
    from jobs.commands.hints import next_after_prepare
    from ser_core.corpora.demo import demo_name, prepare_demo
    from ser_core.corpora.known import known_corpora, table_lines
    from ser_core.corpora.lines import corpus_line, default_name
    from ser_core.corpora.prepare import prepare as prepare_corpus

    if list_known:
        typer.echo("\n".join(table_lines(known_corpora())))
        return
    if kind is None:
        raise UsageError("prepare: name a corpus; `python launch.py prepare --list` shows what is known")
    if (meta is not None) != (kind == "emobox"):
        raise UsageError(f"prepare {kind}: --meta names the list of a corpus of EmoBox: prepare emobox --meta FILE --audio DIR")
    source = meta or source
    if folds is not None and kind != "csv":
        raise UsageError(f"prepare {kind}: --folds is for csv only, {kind} has folds of its own")
    if strength is not None and kind != "demo":
        raise UsageError(f"prepare {kind}: --strength is for demo only")
    if kind == "demo":
        factor = 1.0 if strength is None else strength
        called = name or demo_name(factor)
        spoken = source or data / f"{demo_name(factor)}-source"
        manifest = with_progress(called, lambda tick: prepare_demo(data / called, spoken, tick, strength=factor, name=called))
    elif source is None:
        raise UsageError(f"prepare {kind}: name the folder of the corpus: --source DIR")
    else:
        found, own = source, name or default_name(kind, source)
        if not found.exists():
            raise UsageError(f"prepare {kind}: {'--meta' if meta else '--source'} {found}: no such file or folder")
        manifest = with_progress(
            own,
            lambda tick: prepare_corpus(
                kind,
                found,
                data / own,
                name=own,
                check_counts=check_counts,
                four_classes=four_classes,
                audio=audio,
                folds=folds,
                shared_speakers=shared_speakers,
                progress=tick,
            ),
        )
    say(corpus_line(manifest))
    for line in manifest.source.get("notes", ()):
        note(str(line))
    if kind != "demo":  # which `grid demo` prepares itself
        has_experiment = any((each / "experiment" / f"{manifest.corpus}.yaml").is_file() for each in (PROGRAM.own_configs, PROGRAM.configs))
        note(next_after_prepare(manifest.corpus, [("--data", data, PROGRAM.data)], has_experiment=has_experiment))


add_launch_commands(app, PROGRAM)
add_run_commands(app, PROGRAM)
add_collect(app, PROGRAM)
add_sweep(app, PROGRAM)
add_site_commands(app, PROGRAM)
add_bundle_commands(app, PROGRAM)
add_disk_commands(app, PROGRAM)
add_export_command(app, PROGRAM)
add_examples(app, PROGRAM.command)


def main() -> int:
    """Run the command line; returns the exit code."""
    return run(app, PROGRAM.command)


if __name__ == "__main__":
    sys.exit(main())
