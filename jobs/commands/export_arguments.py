"""Arguments of the command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.arguments import RUN, Results, Words, opener_of

if TYPE_CHECKING:
    from jobs.commands.program import Program

Target = Annotated[Path, typer.Option("--out", metavar="DIR", help="a new or empty folder")]
Merged = Annotated[bool, typer.Option("--merge", help="LoRA added to the weights of the base model: a plain model of transformers")]
Onnx = Annotated[bool, typer.Option("--onnx", help="also model.onnx, for ONNX Runtime; needs the extra `onnx`")]
Licence = Annotated[str | None, typer.Option("--licence", metavar="ID", help="of the model, for its card: an identifier of the hub")]


def add_export_command(app: typer.Typer, program: Program) -> None:
    """Add the command to the command line of a program."""

    @app.command()
    def export(
        words: Words, out: Target, licence: Licence = None, merge: Merged = False, onnx: Onnx = False, results: Results = program.results
    ) -> None:
        """Write the model of a finished run as a folder for transformers; of LoRA in peft's format, or merged into its base model.

        A run that kept no weights (recipe.finetune.keep) is trained again here, and must predict what it did.
        """
        from jobs.commands.export import export_run
        from jobs.experiment.lookup import experiment_and_run

        experiment, run = experiment_and_run(words, f"export [EXPERIMENT] RUN --out DIR; {RUN}")
        session = opener_of(program).reopen(experiment, results, patient=False)
        exporter = program.plugin(session.place.registry).registry.export
        export_run(session, run, out, exporter, merged=merge, onnx=onnx, licence=licence or "")
