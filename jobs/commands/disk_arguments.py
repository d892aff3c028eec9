"""Arguments of the commands on a whole results folder: `list`, `du` and `clean`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import AsJson, Results, opener_of
from jobs.store.layout import shared_path

if TYPE_CHECKING:
    from jobs.commands.program import Program

Experiment = Annotated[str, typer.Argument(metavar="[EXPERIMENT]", help="only of this one; default: all of the results folder")]
Days = Annotated[float, typer.Option("--older-than", metavar="DAYS", help="only what shows no sign of life for so many days")]
Whole = Annotated[bool, typer.Option("--whole", help="remove EXPERIMENT, with every stage that no other experiment needs")]
KeepTables = Annotated[bool, typer.Option("--keep-tables", help="with --whole: keep its tables, confusion matrices and bundle")]
Unneeded = Annotated[bool, typer.Option("--unneeded", help="also results that no experiment of the results folder needs")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be freed; change nothing")]
Yes = Annotated[bool, typer.Option("--yes", help="with --whole: do not ask")]


def add_disk_commands(app: typer.Typer, program: Program) -> None:
    """Add the commands to the command line of a program."""

    @app.command("list")
    def list_experiments(as_json: AsJson = False, results: Results = program.results) -> None:
        """List the experiments of the results folder: runs done, size, last launch."""
        from jobs.commands.disk import print_list

        print_list(shared_path(results), opener_of(program).records(results), as_json=as_json)

    @app.command()
    def du(as_json: AsJson = False, results: Results = program.results) -> None:
        """Show the space that each experiment takes, alone and shared, and the results that no experiment needs."""
        from jobs.commands.disk import print_usage

        print_usage(shared_path(results), opener_of(program).records(results), as_json=as_json)

    @app.command()
    def clean(
        experiment: Experiment = "",
        days: Days = 0.0,
        whole: Whole = False,
        keep_tables: KeepTables = False,
        unneeded: Unneeded = False,
        dry_run: DryRun = False,
        yes: Yes = False,
        results: Results = program.results,
    ) -> None:
        """Free checkpoints and partial outputs of failed, diverged and cancelled stages; results stay. With --whole: remove EXPERIMENT."""
        from jobs.commands.clean import Asked
        from jobs.commands.clean import clean as free

        asked = Asked(experiment, days, whole=whole, keep_tables=keep_tables, unneeded=unneeded, dry_run=dry_run, yes=yes)
        free(shared_path(results), opener_of(program).records(results), asked)
