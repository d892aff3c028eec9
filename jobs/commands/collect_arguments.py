"""Arguments of `collect`, which writes the tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import AllowIncomplete, Bold, Marks, Numbers, Results, Unreplaced, Width, exit_if_incomplete, opener_of
from jobs.errors import UsageError

if TYPE_CHECKING:
    from jobs.commands.program import Program


def add_collect(app: typer.Typer, program: Program) -> None:
    """Add the command to the command line of a program."""

    @app.command()
    def collect(
        experiments: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT ...]", help="several: one table, with --out")] = None,
        formats: Annotated[list[str] | None, typer.Option("--format", help="latex | markdown | csv | json | html; default: all")] = None,
        out: Annotated[
            Path | None, typer.Option(help="folder to write to; default: results/EXPERIMENT/tables; -: one format to standard output")
        ] = None,
        allow_incomplete: AllowIncomplete = False,
        force: Annotated[bool, typer.Option("--force", help="overwrite complete tables with incomplete ones of fewer runs")] = False,
        source: Annotated[Path | None, typer.Option("--from", metavar="RUNS.CSV", help="results from elsewhere, one row a run")] = None,
        outliers: Annotated[str | None, typer.Option(metavar="RULE", help="with --from: pooled (default) | common | cell | none")] = None,
        unreplaced: Unreplaced = None,
        width: Width = None,
        numbers: Numbers = None,
        bold: Bold = True,
        marks: Marks = False,
        results: Results = program.results,
    ) -> None:
        """Write the tables of an experiment: LaTeX, Markdown, CSV, JSON, an HTML report, confusion matrices. Of several: one table."""
        from jobs.commands.collect import Asked, write_csv_tables, write_joint_tables, write_tables
        from jobs.tables.latex import style_of

        asked = Asked(formats, out, unreplaced, style_of(width, numbers, bold=bold, marks=marks), force)
        if source is not None:
            complete = write_csv_tables(source, outliers, program.published, asked)
        elif outliers is not None:
            raise UsageError("--outliers goes with --from: an experiment is judged by the rule it was launched with (policy.outliers)")
        elif experiments and len(experiments) > 1:
            complete = write_joint_tables([opener_of(program).reopen(name, results) for name in experiments], asked)
        else:
            session = opener_of(program).reopen(experiments[0] if experiments else None, results)
            complete = write_tables(session, session.look(ask_slurm=False), asked)
        exit_if_incomplete(complete or allow_incomplete)
