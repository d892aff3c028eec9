"""Arguments and options that several commands of `launch.py` have in common.

Each is a type: a command that names it in its signature has the argument, with this help and this environment variable. The default value
is given in the signature, where it may differ from command to command. Typer evaluates the names in the module of the command, so they are
imported there at run time. Nothing heavy is imported here: `--help` and `status` start fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.errors import UsageError

if TYPE_CHECKING:
    from jobs.commands.opener import Opener
    from jobs.commands.program import Program

INCOMPLETE = 3  # exit code: finished, but incomplete
ROOT = Path(__file__).resolve().parents[2]
RUN = "RUN: METHOD/FOLD/SLOT, or at least 6 digits of a stage's key"


def _launched(context: typer.Context, incomplete: str) -> list[str]:
    """Experiments that were launched, for completion."""
    results = context.params.get("results") or ROOT / "results"
    return sorted(path.parent.name for path in Path(results).glob(f"{incomplete}*/experiment.json"))


def _experiments(incomplete: str) -> list[str]:
    """Experiments of configs/experiment/, for completion."""
    return sorted(path.stem for path in (ROOT / "configs" / "experiment").glob(f"{incomplete}*.yaml"))


# what a command is about
Name = Annotated[
    str | None,
    typer.Argument(
        metavar="[EXPERIMENT]",
        help="as it was launched; default: the only one, or iemocap",
        autocompletion=_launched,
    ),
]
Words = Annotated[
    list[str],
    typer.Argument(metavar="[EXPERIMENT] RUN", help=f"{RUN}; of two arguments the first is the experiment", autocompletion=_launched),
]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE ...]", autocompletion=_experiments)]
File = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="file of the experiment, in place of its name")]

# where it reads and writes
Data = Annotated[Path, typer.Option("--data", envvar="SER_GRID_DATA", help="folder of the prepared corpora")]
Results = Annotated[Path, typer.Option("--results", envvar="SER_GRID_RESULTS", help="folder of the results")]
Where = Annotated[str | None, typer.Option("--cluster", help="local | slurm; default: as launched last, or as in its file")]
Wait = Annotated[bool | None, typer.Option("--wait/--detach", help="slurm: stay until all is done; default: --detach")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show what would be reused and submitted; change nothing")]
Scripts = Annotated[bool, typer.Option("--scripts", help="with --dry-run: first print the batch scripts")]

# what it prints
AsJson = Annotated[bool, typer.Option("--json", help="one JSON value, nothing else")]

# how tables are written
Unreplaced = Annotated[
    str | None,
    typer.Option("--unreplaced", metavar="keep|drop", help="outliers that no other run replaces: keep (default) in the means, or drop"),
]
Width = Annotated[str | None, typer.Option("--width", metavar="column|page", help="LaTeX: fit one column or the page (default)")]
Numbers = Annotated[str | None, typer.Option("--numbers", metavar="plain|siunitx", help="LaTeX: numbers as text (default), or by siunitx")]
Bold = Annotated[bool, typer.Option("--bold/--no-bold", help="LaTeX: the best mean of a column in bold (default)")]
Marks = Annotated[bool, typer.Option("--marks", help="LaTeX: a star where a method differs from the first one")]
AllowIncomplete = Annotated[bool, typer.Option("--allow-incomplete", help="exit with 0 even if runs are missing")]


def with_file(program: Program, file: Path | None, arguments: list[str] | None) -> list[str]:
    """The words of an experiment and its settings, with the file of `--config` as the experiment. UsageError if another one is named.

    A file that is not where the user stands is looked for in the folder of the program, which has examples.
    """
    words = list(arguments or ())
    named = [word for word in words if "=" not in word]
    if file is not None and named:
        raise UsageError(f"--config {file}: names the experiment already, leave out {named[0]}")
    if file is not None and not file.is_file() and (program.root / file).is_file():
        file = program.root / file
    return [str(file if file.suffix or "/" in str(file) else f"./{file}"), *words] if file is not None else words


def check_scripts(scripts: bool, dry_run: bool) -> None:
    """UsageError for `--scripts` without `--dry-run`."""
    if scripts and not dry_run:
        raise UsageError("--scripts goes with --dry-run")


def exit_if_incomplete(complete: bool) -> None:
    """End with the exit code of an incomplete experiment, unless it is complete."""
    if not complete:
        raise typer.Exit(INCOMPLETE)


def opener_of(program: Program) -> Opener:
    """What opens the program's experiments; imported when a command runs."""
    from jobs.commands.opener import Opener

    return Opener(program)
