"""P-TAPT stage 2 (section 3.3): k-means on the emotion states of the training folds, one stage for each k.

20 Lloyd iterations on all frames in float32 (scikit-learn), from k-means++ seeds drawn on a subset of `SEEDING_FRAMES` frames a cluster
(seeding on all frames would cost as much as the iterations). scikit-learn adds the threads' partial sums up in the order in which they
finish, so several threads would not give the same centroids twice: one is used. At the paper's size (1.2 million frames of 512) memory is
that of the frames, 2.4 GiB, because they are centred in place and convergence is not tested by their variance; time grows with k, and a
stopped stage starts again.

Artifacts: `clusters.safetensors` (labels of all frames, frames of each utterance, centroids) and `utterances.json` (their order).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ser_core.disk import os_errors
from ser_core.errors import InputError
from ser_core.stages.context import StageContext
from ser_core.stages.states import read_frames
from ser_core.training.randomness import generator

CLUSTERS = "clusters.safetensors"
UTTERANCES = "utterances.json"
SEEDING_FRAMES = 32  # for each cluster
SKLEARN_SEEDS = 2**32


def run(context: StageContext) -> dict[str, Any]:
    """Cluster and save labels and centroids. Raises InputError where there are fewer frames than clusters."""
    from safetensors.numpy import save_file

    k = int(context.settings["k"])
    iterations = int(context.settings["iterations"])
    ids = [utterance.id for utterance in context.training.utterances]
    frames, counts = read_frames(context.upstream["states"], ids)
    if k > len(frames):
        raise InputError(f"cluster: k = {k} is more than the {len(frames)} frames of the training folds; take it out of cluster.counts")
    started = time.monotonic()
    labels, centroids, inertia = k_means(frames, k, iterations, context.seed)
    seconds = time.monotonic() - started
    context.report(f"cluster: k {k}, {len(frames)} frames, inertia a frame {inertia / len(frames):.4g}, {seconds:.1f} s")
    with os_errors(context.output / CLUSTERS):
        save_file({"labels": labels, "counts": counts, "centroids": centroids}, context.output / CLUSTERS)
    (context.output / UTTERANCES).write_text(json.dumps(ids), encoding="utf-8")
    share = np.bincount(labels, minlength=k) / len(labels)
    entropy = float(-np.sum(share[share > 0] * np.log(share[share > 0])))
    metrics = {"k": k, "frames": len(frames), "inertia": inertia, "entropy": entropy, "empty_clusters": int((share == 0).sum())}
    return {"metrics": metrics, "durations": {"k_means": seconds}}


def k_means(frames: NDArray[np.float32], k: int, iterations: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.float32], float]:
    """Labels (N,), centroids (k, channels) and the sum of squared distances of `frames` (N, channels), which are changed and put back."""
    import warnings

    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    rng = generator(seed, "k-means", k)
    subset = rng.choice(len(frames), size=min(len(frames), SEEDING_FRAMES * k), replace=False, shuffle=False)
    random_state = int(rng.integers(SKLEARN_SEEDS))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct frames than clusters leave some empty: counted in the metrics
        first, _ = kmeans_plusplus(frames[np.sort(subset)], k, random_state=random_state)
        fitted = KMeans(k, init=first, n_init=1, max_iter=iterations, tol=0.0, copy_x=False, algorithm="lloyd").fit(frames)
    return fitted.labels_.astype(np.int32), fitted.cluster_centers_.astype(np.float32), float(fitted.inertia_)


def read_labels(folder: Path, ids: Sequence[str]) -> list[NDArray[np.int64]]:
    """Pseudo-labels (frames,) of each utterance in the order of `ids`. Raises InputError where the artifact is of other utterances."""
    from safetensors.numpy import load_file

    stored = json.loads((folder / UTTERANCES).read_text(encoding="utf-8"))
    if stored != list(ids):
        raise InputError(f"{folder}: pseudo-labels of other utterances than the training folds")
    tensors = load_file(folder / CLUSTERS)
    return np.split(tensors["labels"].astype(np.int64), np.cumsum(tensors["counts"])[:-1])
