"""Arguments of the commands that write, show and launch an experiment: `init`, `config`, `grid`, `resume`, `reconcile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.arguments import (
    Data,
    DryRun,
    File,
    Name,
    Results,
    Scripts,
    Settings,
    Wait,
    Where,
    check_scripts,
    exit_if_incomplete,
    opener_of,
    with_file,
)
from jobs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jobs.commands.program import Program
    from jobs.commands.session import Session


def add_launch_commands(app: typer.Typer, program: Program) -> None:
    """Add the commands to the command line of a program."""

    def cost_notes(session: Session) -> Callable[[Path, Sequence[Any]], Sequence[str]]:
        return program.plugin(session.launched.experiment.registry).registry.cost_notes

    @app.command()
    def init(
        name: Annotated[str, typer.Argument(metavar="NAME", help="of the new experiment")],
        corpus: Annotated[str, typer.Option(help="a prepared corpus")],
        like: Annotated[str, typer.Option(metavar="EXPERIMENT", help="whose settings it starts from")] = "emodb-base",
        out: Annotated[Path | None, typer.Option(metavar="FILE", help="default: configs/experiment/NAME.yaml")] = None,
        data: Data = program.data,
    ) -> None:
        """Write the file of a new experiment on a prepared corpus, with every key explained."""
        from jobs.commands.init import prepared_corpus, write_experiment
        from jobs.commands.opener import corpora

        folder = data / prepared_corpus(corpus, corpora(data))
        write_experiment(name, opener_of(program).prepared(folder, like), like, out, program)

    @app.command()
    def config(
        arguments: Settings = None,
        file: File = None,
        cluster: Where = None,
        changed: Annotated[bool, typer.Option("--changed", help="only settings that are not at their default")] = False,
        data: Data = program.data,
    ) -> None:
        """Print every setting of an experiment and its source: command line, experiment file, preset, site profile or default."""
        from jobs.commands.console import note
        from jobs.commands.init import print_config
        from jobs.commands.launching import program_words, require_file
        from jobs.commands.opener import corpora

        words = program_words(program, "config", with_file(program, file, arguments), cluster)
        require_file(words.file, program.configs, corpora(data))
        if words.line:
            note(words.line)
        print_config(words, program, changed=changed)

    @app.command()
    def grid(
        arguments: Settings = None,
        file: File = None,
        cluster: Where = None,
        wait: Wait = None,
        dry_run: DryRun = False,
        scripts: Scripts = False,
        yes: Annotated[
            bool, typer.Option("--yes", help="withdraw stages in Slurm that the new settings do not need, without asking")
        ] = False,
        keep_old: Annotated[bool, typer.Option("--keep-old", help="leave such stages in Slurm")] = False,
        data: Data = program.data,
        results: Results = program.results,
    ) -> None:
        """Run every stage of an experiment that has no result, and write its tables. Safe to repeat; lifts a `cancel`."""
        from jobs.commands.grid import print_plan, run_grid
        from jobs.commands.hints import launch_words
        from jobs.commands.launching import program_words
        from jobs.commands.opener import Place
        from jobs.commands.relaunch import old_stages

        check_scripts(scripts, dry_run)
        arguments = with_file(program, file, arguments)
        if yes and keep_old:
            raise UsageError("grid: --yes and --keep-old: one of them")
        words = program_words(program, "grid", arguments, cluster)
        typed = launch_words("grid", arguments, cluster=cluster, wait=wait, folders=program.folders(data, results))
        session = opener_of(program).launch(words, Place(data, results), typed, dry_run=dry_run)
        if dry_run:
            print_plan(session, cost_notes(session), scripts=scripts)
        else:
            exit_if_incomplete(run_grid(session, wait=bool(wait), old=old_stages(yes=yes, keep=keep_old)))

    @app.command()
    def resume(
        experiment: Name = None,
        wait: Wait = None,
        dry_run: DryRun = False,
        scripts: Scripts = False,
        results: Results = program.results,
    ) -> None:
        """Launch an experiment again with the settings it was launched with, whatever its file says now. Lifts a `cancel`."""
        from jobs.commands.grid import print_plan, run_grid

        check_scripts(scripts, dry_run)
        session = opener_of(program).relaunch(experiment, results, dry_run=dry_run)
        if dry_run:
            print_plan(session, cost_notes(session), scripts=scripts)
        else:
            exit_if_incomplete(run_grid(session, wait=bool(wait)))

    @app.command()
    def reconcile(experiment: Name = None, results: Results = program.results) -> None:
        """One pass of the controller on Slurm: submit missing stages that are not queued or running, and a controller job if none is."""
        from jobs.commands.grid import reconcile as reconcile_experiment

        exit_if_incomplete(reconcile_experiment(opener_of(program).reopen(experiment, results)))
