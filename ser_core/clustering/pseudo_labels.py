"""What the cluster stage leaves behind and who comes later reads: the cluster of every frame. Without torch.

`clusters.safetensors` (labels of all frames, frames of each utterance, centroids) and `utterances.json` (their order).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ser_core.disk import os_errors
from ser_core.errors import InputError

CLUSTERS = "clusters.safetensors"
UTTERANCES = "utterances.json"


def write_labels(
    folder: Path, ids: Sequence[str], labels: NDArray[np.integer], counts: NDArray[np.int64], centroids: NDArray[np.floating]
) -> None:
    """`labels` of all frames, `counts` of frames of each utterance of `ids`. Raises OSError where the disk is full."""
    from safetensors.numpy import save_file

    with os_errors(folder / CLUSTERS):
        save_file({"labels": labels, "counts": counts, "centroids": centroids}, folder / CLUSTERS)
    (folder / UTTERANCES).write_text(json.dumps(ids), encoding="utf-8")


def read_labels(folder: Path, ids: Sequence[str]) -> list[NDArray[np.int64]]:
    """Pseudo-labels (frames,) of each utterance in the order of `ids`. Raises InputError where the artifact is of other utterances."""
    from safetensors import safe_open

    stored = json.loads((folder / UTTERANCES).read_text(encoding="utf-8"))
    if stored != list(ids):
        raise InputError(f"{folder}: pseudo-labels of other utterances than the training folds")
    with safe_open(folder / CLUSTERS, framework="numpy") as file:
        return np.split(file.get_tensor("labels").astype(np.int64), np.cumsum(file.get_tensor("counts"))[:-1])
