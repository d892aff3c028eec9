"""The artifact `pooled.safetensors` of a run: the input of its last layer for each utterance, without dropout and masks.

Tensors `training` and `test`, (utterances, units) float32 each; the metadata `utterances` names the rows of both. Read by the fusion that
trains a layer on the vectors of finished runs (`ser_core.stages.concat`). The same model gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ser_core.disk import os_errors
from ser_core.errors import InputError
from ser_core.training.splits import Split

POOLED = "pooled.safetensors"
TRAINING, TEST = "training", "test"
ROWS = "utterances"  # one key of metadata, as the order of several is not the same in every file


def write_pooled(folder: Path, training: tuple[Split, NDArray[np.float32]], test: tuple[Split, NDArray[np.float32]]) -> None:
    """Write the vectors (utterances, units) of both splits into a folder. Raises OSError if the disk is full."""
    from safetensors.numpy import save_file

    parts = {TRAINING: training, TEST: test}
    rows = {name: [utterance.id for utterance in split.utterances] for name, (split, _) in parts.items()}
    with os_errors(folder / POOLED):
        vectors = {name: np.ascontiguousarray(found, dtype=np.float32) for name, (_, found) in parts.items()}
        save_file(vectors, folder / POOLED, metadata={ROWS: json.dumps(rows)})


def read_pooled(folder: Path, part: str, split: Split) -> NDArray[np.float32]:
    """Return the vectors (utterances, units) of a part, `TRAINING` or `TEST`, in the order of the split; the other part is not read.

    Raises InputError if the run kept none, or those of other utterances.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / POOLED
    if not path.is_file():
        raise InputError(f"{path}: not there, as an earlier version computed this run; compute it again (docs/text.md, Older runs)")
    try:
        with safe_open(path, framework="numpy") as file:
            rows = json.loads(file.metadata()[ROWS])[part]
            vectors: NDArray[np.float32] = file.get_tensor(part)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    places = {name: place for place, name in enumerate(rows)}
    ids = [utterance.id for utterance in split.utterances]
    if set(places) != set(ids) or len(vectors) != len(ids):
        raise InputError(f"{path}: its utterances of the {part} split are not those of this stage; launch again")
    return vectors[[places[name] for name in ids]]
