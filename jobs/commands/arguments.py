"""Arguments and options that several commands of `launch.py` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUN = "RUN: METHOD/FOLD/SLOT, or at least 6 digits of a stage's key"

Data = Annotated[Path, typer.Option("--data", envvar="SER_GRID_DATA", help="folder of the prepared corpora")]
Results = Annotated[Path, typer.Option("--results", envvar="SER_GRID_RESULTS", help="folder of the results")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON value, nothing else")]

Name = Annotated[str, typer.Argument(metavar="[EXPERIMENT]", help="name under which the experiment was launched")]
Words = Annotated[list[str], typer.Argument(metavar="[EXPERIMENT] RUN", help=f"{RUN}; of two arguments the first is the experiment")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE ...]")]
Where = Annotated[str | None, typer.Option("--cluster", help="local | slurm; default: as launched last, or as in its file")]
