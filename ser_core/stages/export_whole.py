"""Export of a run that trained the whole transformer: a folder that transformers' pipeline loads with `trust_remote_code=True`.

FOLDER/config.json, model.safetensors, preprocessor_config.json   the classifier (`ser_core.models.kept_model`)
FOLDER/modeling_ser_grid.py                                       its code, which imports transformers and torch only
FOLDER/README.md                                                  the model card
FOLDER/model.onnx                                                 with `onnx`: the classifier for ONNX Runtime

The weights are those that the run kept. If it kept none it is trained again, and must predict what the run did.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ser_core.disk import os_errors, raise_storage_error
from ser_core.errors import InputError, NotReproduced, first_line
from ser_core.models import exported_model
from ser_core.models.kept_model import MODELLING_FILE, is_kept_model, load_model
from ser_core.models.onnx_model import require_onnx, write_onnx
from ser_core.settings.finetune import FinetuneSettings, Keep
from ser_core.stages.finetune import MODEL
from ser_core.stages.model_card import model_card
from ser_core.training.evaluate import PREDICTIONS

TrainAgain = Callable[[Mapping[str, Any]], Path]

# Largest difference of a class probability between the predictions of a run and of its repetition. On the same processor, with the same
# number of threads, they are the same bytes; another processor rounds otherwise, and training makes more of the difference.
TOLERANCE = 0.01
CARD = "README.md"


def export_whole(
    settings: FinetuneSettings,
    runtime: Mapping[str, Any],
    output: Path,
    folder: Path,
    *,
    merged: bool,
    facts: Mapping[str, Any],
    train_again: TrainAgain,
    onnx: bool = False,
) -> tuple[str, ...]:
    """Write the model of a run into `folder`; arguments, result and errors as of `SpeechRegistry.export`."""
    if merged:
        raise InputError("--merge: this run trained the whole transformer, there is nothing to merge; leave it out")
    if settings.attributes.weight == 1:
        raise InputError("not exported: this run was trained on attributes alone and has no logits of classes")
    if onnx:
        require_onnx()
    source, lines = output / MODEL, list[str]()
    if not is_kept_model(source):
        again = train_again({"keep": Keep.all.name})
        source = again / MODEL
        if not is_kept_model(source):
            raise NotReproduced("trained again, the run diverged: nothing is exported")
        lines.append(_reproduced(output / PREDICTIONS, again / PREDICTIONS))
    classes = load_model(source).classes
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, folder / path.name)
    card = model_card(facts, classes, str(runtime.get("weights", "")), onnx=onnx)
    with os_errors(folder / CARD):
        (folder / MODELLING_FILE).write_bytes(Path(str(exported_model.__file__)).read_bytes())
        (folder / CARD).write_text(card, encoding="utf-8")
    call = f'pipeline("audio-classification", model={str(folder)!r}, trust_remote_code=True, top_k=None)'
    lines.append(f"transformers: {call}")
    if onnx:
        lines.append(f"ONNX: {write_onnx(folder)}")
    return (*lines, f"model card: {folder / CARD}")


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest absolute difference of class probabilities between two files of predictions of the same utterances.

    Raises InputError if one cannot be read, or if they are of other utterances or classes.
    """
    ours, theirs = _probabilities(first), _probabilities(second)
    if {name: set(row) for name, row in ours.items()} != {name: set(row) for name, row in theirs.items()}:
        raise InputError(f"{first} and {second}: predictions of other utterances or classes; the corpus was prepared again")
    return max((abs(value - theirs[name][column]) for name, row in ours.items() for column, value in row.items()), default=0.0)


def _reproduced(first: Path, second: Path) -> str:
    """The line on how well a run was reproduced. Raises NotReproduced if it was not."""
    if first.read_bytes() == second.read_bytes():
        return "trained again: the predictions are those of the run, byte for byte"
    found = largest_difference(first, second)
    stated = f"largest difference of a class probability to the run's {PREDICTIONS}: {found:.6f}, tolerance {TOLERANCE:g}"
    if found > TOLERANCE:
        raise NotReproduced(
            f"trained again, the run predicts otherwise: {stated}; nothing is exported. Export it on a machine with the processor, GPU and "
            "packages of the run (explain names them), or train it with recipe.finetune.keep=all"
        )
    return f"trained again: {stated}"


def _probabilities(path: Path) -> dict[str, dict[str, float]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["id"]: {name: float(value) for name, value in row.items() if name.startswith("p_")} for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise_storage_error(error)
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
