"""Arguments of the command `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import Results, exit_if_incomplete, opener_of

if TYPE_CHECKING:
    from jobs.commands.program import Program

USAGE = "predict [EXPERIMENT] RUN FILE... or predict DIR FILE..., or with --list FILE in place of the files"
Model = Annotated[
    list[str],
    typer.Argument(metavar="[EXPERIMENT] RUN|DIR [FILE ...]", help="a finished run, or a folder that export wrote; then the recordings"),
]
Listed = Annotated[Path | None, typer.Option("--list", metavar="FILE", help="a file with the path of a recording in each line")]
Format = Annotated[str, typer.Option("--format", metavar="csv|jsonl", help="rows as CSV with a header, or a JSON object in each line")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="default: standard output")]


def add_predict_command(app: typer.Typer, program: Program) -> None:
    """Add the command to the command line of a program."""

    @app.command()
    def predict(words: Model, listed: Listed = None, form: Format = "csv", out: Out = None, results: Results = program.results) -> None:
        """Emotion and class probabilities of recordings, by a finished run that kept its weights or an exported folder.

        Exit code 3 if a recording cannot be read; the others are done.
        """
        from jobs.commands.predict import check_format, exported_folder, files_of, finished_run, predict_files, split_words

        check_format(form)
        experiment, model, given = split_words(words, USAGE)
        files = files_of(given, listed, USAGE)
        folder = exported_folder(model) if experiment is None else None
        if folder is not None:
            registry, source = program.plugin("").registry, folder
            exit_if_incomplete(predict_files(registry.predict, source, files, form, out))
            return
        session = opener_of(program).reopen(experiment, results, patient=False)
        run = finished_run(session, model)
        exit_if_incomplete(predict_files(program.plugin(session.place.registry).registry.predict, run, files, form, out))
