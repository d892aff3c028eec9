"""Arguments of `doctor`, which checks machine and site, and of the hidden commands that jobs in Slurm execute: `control`, `worker`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import AsJson, Data, File, Results, Settings, Where, opener_of, with_file
from jobs.store.layout import shared_path

if TYPE_CHECKING:
    from jobs.commands.program import Program


def add_site_commands(app: typer.Typer, program: Program) -> None:
    """Add the commands to the command line of a program."""

    @app.command()
    def doctor(
        arguments: Settings = None,
        file: File = None,
        cluster: Where = None,
        as_json: AsJson = False,
        data: Data = program.data,
        results: Results = program.results,
    ) -> None:
        """Check this machine, what EXPERIMENT needs and, with --cluster slurm, the site: limits, accounting, a probe job on a node."""
        from jobs.commands.console import note
        from jobs.commands.doctor import examine
        from jobs.commands.doctor_checks import check_lines, checks_to_json, exit_code
        from jobs.commands.launching import program_words, read_experiment, require_file
        from jobs.commands.opener import corpora
        from jobs.experiment.config import Cluster

        words = program_words(program, "doctor", with_file(program, file, arguments), cluster, "demo")
        require_file(words.file, program.configs, corpora(data))
        experiment = read_experiment(words, program)
        slurm = experiment if experiment.cluster is Cluster.slurm else None
        needs = opener_of(program).needs(experiment, data) if words.named else None
        checks = examine(shared_path(results), source=program.root, experiment=slurm, tell=note, needs=needs)
        typer.echo(json.dumps(checks_to_json(checks), indent=1) if as_json else "\n".join(check_lines(checks)))
        raise typer.Exit(exit_code(checks))

    @app.command(hidden=True)
    def control(experiment: str, results: Results = program.results) -> None:
        """What a controller job in Slurm executes: one pass for an experiment, or a sweep of it. Exit code 1: no job for the next one."""
        from jobs.commands.passes import run_controller

        name, _, digest = experiment.partition("/sweep/")
        if digest:
            sweep = opener_of(program).reopen_sweep(name, results, digest, look_only=False)
            followed = run_controller(sweep, end=sweep.end)
        else:
            followed = run_controller(opener_of(program).reopen(name, results))
        raise typer.Exit(0 if followed else 1)

    @app.command(hidden=True)
    def worker(description: Path, index: Annotated[int | None, typer.Argument()] = None) -> None:
        """Execute one task of a description: what array elements run."""
        from jobs.worker.main import main as work

        raise typer.Exit(work([str(description), *([] if index is None else [str(index)])]))
