"""Arguments of the commands on what was launched: `status`, `explain`, `logs`, `cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import RUN, AsJson, Results, Words, exit_if_incomplete, opener_of
from jobs.errors import StoredConfigurationError, UsageError
from jobs.store.layout import shared_path

if TYPE_CHECKING:
    from jobs.commands.program import Program


def add_run_commands(app: typer.Typer, program: Program) -> None:
    """Add the commands to the command line of a program."""

    @app.command()
    def status(
        experiment: Annotated[str | None, typer.Argument(help="name under which it was launched; default: a line for each one")] = None,
        watch: Annotated[bool, typer.Option("--watch", help="repeat until nothing is left to do, or Ctrl-C")] = False,
        as_json: AsJson = False,
        requests: Annotated[bool, typer.Option("--requests", help="only: how often the requested time and memory were enough")] = False,
        results: Results = program.results,
    ) -> None:
        """Show where an experiment stands, or a line for each one. It submits nothing."""
        if watch and as_json:
            raise UsageError("status: --json is one value: leave out --watch")
        if experiment is None:
            from jobs.commands.status_list import show_list

            if watch or requests:
                raise UsageError(f"status: {'--watch' if watch else '--requests'} is of one experiment: name it")
            show_list(shared_path(results), lambda name: opener_of(program).reopen(name, results, patient=False), as_json=as_json)
            return
        if requests:
            from jobs.commands.requests import show_requests

            show_requests(opener_of(program).reopen(experiment, results, patient=False), as_json=as_json)
            return
        from jobs.commands.status import show_status

        show_status(opener_of(program).reopen(experiment, results, patient=False), as_json=as_json, watch=watch)

    @app.command()
    def explain(words: Words, results: Results = program.results) -> None:
        """Print the history of a run: its seeds, every attempt of every stage, the retry policy applied, its artifacts, the next step."""
        from jobs.commands.explain import print_explanation
        from jobs.experiment.lookup import experiment_and_run

        experiment, run = experiment_and_run(words, f"explain [EXPERIMENT] RUN; {RUN}")
        print_explanation(opener_of(program).reopen(experiment, results, patient=False), run)

    @app.command()
    def logs(
        words: Words,
        follow: Annotated[bool, typer.Option("-f", "--follow", help="print new lines until the attempt ends, or Ctrl-C")] = False,
        attempt: Annotated[int | None, typer.Option(min=1, help="number of the attempt; default: the newest")] = None,
        lines: Annotated[int | None, typer.Option(min=0, help="only the last N lines; default: all")] = None,
        stage: Annotated[str | None, typer.Option(help="of the run, e.g. tapt; default: the last that was started")] = None,
        results: Results = program.results,
    ) -> None:
        """Print the log of a run: of the newest attempt of its last stage that was started."""
        from jobs.commands.logs import print_log
        from jobs.experiment.lookup import experiment_and_run

        experiment, run = experiment_and_run(words, f"logs [EXPERIMENT] RUN; {RUN}")
        session = opener_of(program).reopen(experiment, results, patient=False)
        exit_if_incomplete(print_log(session, run, stage=stage, attempt=attempt, lines=lines, follow=follow))

    @app.command()
    def cancel(
        words: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [RUN ...]", help=f"{RUN}; default: everything")] = None,
        results: Results = program.results,
    ) -> None:
        """Cancel an experiment, or single runs of it, until it is launched again. Results stay; running Slurm jobs write a checkpoint."""
        from jobs.commands.cancel import print_cancellation

        named = words or []
        experiment, runs = (None, named) if not named or "/" in named[0] else (named[0], named[1:])
        try:
            session = opener_of(program).reopen(experiment, results)
        except StoredConfigurationError:
            if runs:
                raise
            session = opener_of(program).without_configuration(experiment, results)
        print_cancellation(session, runs)
