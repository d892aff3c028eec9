"""A small grid of every method, and how tests look at what it left."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

SMALL = (
    *("corpus=small", "folds=[1,2]", "seeds=1", "recipe.cluster.counts=[8,16]", "policy.poll_seconds=0.2", "policy.poll_minutes=0.1"),
    *("recipe.finetune.epochs=3", "recipe.finetune.batch_size=8"),  # less, and it has not learnt
    *("recipe.tapt.steps=3", "recipe.states.steps=3", "recipe.ptapt.steps=3", "recipe.tapt.warmup_steps=1", "recipe.ptapt.warmup_steps=1"),
)
ON_SLURM = ("policy.poll_seconds=1",)  # a pass asks squeue and sacct
IDLE = ("slurm.prologue=[exec sleep 3600]",)  # for tests of jobs in the queue: no worker begins


def attempts(results: Path) -> int:
    """Executions ever begun."""
    return len(list((results / "store").glob("*/*/attempts/*/claim.json")))


def scores(summary: dict[str, Any]) -> dict[tuple[str, str, int], float]:
    """(method, fold, seed) -> UA."""
    return {
        (method["method"], cell["fold"], run["seed"]): run["ua"]
        for method in summary["methods"]
        for cell in method["cells"]
        for run in cell["runs"]
    }


def read_json(file: Path) -> dict[str, Any]:
    """What a file says; nothing if it is not there."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def compile_table(folder: Path) -> Path:
    """Compile tables.tex as it stands."""
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "tables.tex"], cwd=folder, check=True, capture_output=True)
    return folder / "tables.pdf"
