"""Arguments of the commands on bundles for reviewers: `bundle` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import AllowIncomplete, Bold, Marks, Name, Numbers, Results, Unreplaced, Width, exit_if_incomplete, opener_of

if TYPE_CHECKING:
    from jobs.commands.program import Program

DIFFERS = 1  # exit code
Target = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="default: results/EXPERIMENT/EXPERIMENT-bundle.zip")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="the zip file that `bundle` wrote")]
Rendered = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="also keep the tables that were rendered, in an empty folder")]


def add_bundle_commands(app: typer.Typer, program: Program) -> None:
    """Add the commands to the command line of a program."""

    @app.command()
    def bundle(
        experiment: Name = None,
        out: Target = None,
        allow_incomplete: AllowIncomplete = False,
        unreplaced: Unreplaced = None,
        width: Width = None,
        numbers: Numbers = None,
        bold: Bold = True,
        marks: Marks = False,
        results: Results = program.results,
    ) -> None:
        """Write results, settings, code, corpus manifest and tables of an experiment into one zip, without data, weights and secrets."""
        from jobs.commands.bundle import write_bundle
        from jobs.tables.latex import style_of

        style = style_of(width, numbers, bold=bold, marks=marks)
        complete = write_bundle(opener_of(program).reopen(experiment, results, patient=False), out, unreplaced, style)
        exit_if_incomplete(complete or allow_incomplete)

    @app.command()
    def verify(file: Bundle, out: Rendered = None) -> None:
        """Render the tables again from the results in a bundle. Exit code: 0 equal byte for byte, 1 with what differs, 2 unusable."""
        from jobs.commands.bundle import verify_bundle

        if not verify_bundle(file, out, program.root):
            raise typer.Exit(DIFFERS)
