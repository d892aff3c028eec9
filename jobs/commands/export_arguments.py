"""Arguments of the command `export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import RUN, Results, Words

if TYPE_CHECKING:
    from jobs.commands.export import Exporter
    from jobs.commands.session import Session

Target = Annotated[Path, typer.Option("--out", metavar="DIR", help="a new or empty folder")]
Merged = Annotated[bool, typer.Option("--merge", help="LoRA added to the weights of the base model: a plain model of transformers")]


def add_export_command(app: typer.Typer, default: Path, reopen: Callable[[str | None, Path], Session], exporter: Exporter) -> None:
    """Add the command to a command line.

    `default`: folder of the results; `reopen`: opens an experiment of such a folder; `exporter`: the registry's function.
    """

    @app.command()
    def export(words: Words, out: Target, merge: Merged = False, results: Results = default) -> None:
        """Write the adaptors (LoRA) and the head of a finished run in peft's format, or merged into its base model."""
        from jobs.commands.export import export_run
        from jobs.experiment.lookup import experiment_and_run

        experiment, run = experiment_and_run(words, f"export [EXPERIMENT] RUN --out DIR; {RUN}")
        export_run(reopen(experiment, results), run, out, exporter, merged=merge)
