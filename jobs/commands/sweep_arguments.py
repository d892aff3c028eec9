"""Arguments of `sweep`, which searches settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import Data, File, Results, Scripts, Settings, Where, check_scripts, exit_if_incomplete, opener_of, with_file
from jobs.errors import UsageError

if TYPE_CHECKING:
    from jobs.commands.program import Program


def add_sweep(app: typer.Typer, program: Program) -> None:
    """Add the command to the command line of a program."""

    @app.command()
    def sweep(
        arguments: Settings = None,
        file: File = None,
        cluster: Where = None,
        wait: Annotated[bool | None, typer.Option("--wait/--detach", help="slurm: stay until it has ended; default: --detach")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="show the points, the stages and the hours; change nothing")] = False,
        scripts: Scripts = False,
        show: Annotated[bool, typer.Option("--show", help="state of the last sweep, and its results so far")] = False,
        cancel_it: Annotated[bool, typer.Option("--cancel", help="end it; running stages write a checkpoint, results stay")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="with --show: one JSON value, nothing else")] = False,
        data: Data = program.data,
        results: Results = program.results,
    ) -> None:
        """Search sets of cluster counts, and other settings, by validation speakers; never opens the test fold. Safe to repeat: resumes."""
        from jobs.commands import sweep as console
        from jobs.commands.console import note
        from jobs.commands.hints import launch_words
        from jobs.commands.launching import program_words
        from jobs.commands.opener import Place

        arguments = with_file(program, file, arguments)
        modes = [name for name, chosen in (("--dry-run", dry_run), ("--show", show), ("--cancel", cancel_it)) if chosen]
        if len(modes) > 1:
            raise UsageError(f"sweep: {' and '.join(modes)}: one at a time")
        if as_json and not show:
            raise UsageError("sweep: --json goes with --show")
        if show or cancel_it:
            named = arguments or [program.experiment]
            if len(named) > 1 or "=" in named[0]:
                raise UsageError(f"sweep: {modes[0]} is of the sweep launched last: `sweep [EXPERIMENT] {modes[0]}`, without settings")
            session = opener_of(program).reopen_sweep(named[0], results)
            if not arguments:
                note(f"experiment {program.experiment}: the default, as none is named")
            console.show(session, as_json=as_json) if show else console.cancel(session)
            return
        check_scripts(scripts, dry_run)
        words = program_words(program, "sweep", arguments, cluster)
        typed = launch_words("sweep", arguments, cluster=cluster, wait=wait, folders=program.folders(data, results))
        session = opener_of(program).launch_sweep(words, Place(data, results), typed, dry_run=dry_run)
        if dry_run:
            console.print_preview(session, scripts=scripts)
        else:
            exit_if_incomplete(console.launch(session, wait=bool(wait)))
