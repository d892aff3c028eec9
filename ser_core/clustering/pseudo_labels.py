"""Artifacts of the cluster stage: the cluster of every frame, which P-TAPT uses as pseudo-label. Does not import torch.

`clusters.safetensors`: `labels` (all frames,), `counts` (utterances,) frames of each utterance, `centroids` (k, channels).
`utterances.json`: the ids of the utterances in this order.
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
    """Write `labels` (all frames,), `counts` (utterances,) frames of each utterance in `ids`, and `centroids` (k, channels).

    Raises OSError if the disk is full.
    """
    from safetensors.numpy import save_file

    with os_errors(folder / CLUSTERS):
        save_file({"labels": labels, "counts": counts, "centroids": centroids}, folder / CLUSTERS)
    (folder / UTTERANCES).write_text(json.dumps(ids), encoding="utf-8")


def read_labels(folder: Path, ids: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return the pseudo-labels (frames,) of each utterance in `ids`. Raises InputError if the artifact holds other utterances."""
    from safetensors import safe_open

    stored = json.loads((folder / UTTERANCES).read_text(encoding="utf-8"))
    if stored != list(ids):
        raise InputError(f"{folder}: pseudo-labels of other utterances than the training folds")
    with safe_open(folder / CLUSTERS, framework="numpy") as file:
        return np.split(file.get_tensor("labels").astype(np.int64), np.cumsum(file.get_tensor("counts"))[:-1])
