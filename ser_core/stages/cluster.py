"""P-TAPT stage 2 (section 2.3): k-means on the emotion states of the training folds, one stage for each k.

At most `cluster.iterations` Lloyd iterations on all frames in float32, from k-means++ centroids chosen on a subset
(`ser_core/clustering/kmeans.py`). The frames are memory-mapped: at the paper's size (1.2 million frames of 512, 2.3 GiB) they are read once
per iteration. All threads are used; the labels are bit-identical with any number. A stopped stage resumes after its last iteration.

Artifacts: those of `ser_core/clustering/pseudo_labels.py`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ser_core.clustering.kmeans import Checkpointing, Float32Array, KMeans, lloyd
from ser_core.clustering.pseudo_labels import write_labels
from ser_core.errors import InputError
from ser_core.parallel.threads import DeterministicPool
from ser_core.stages.context import StageContext
from ser_core.stages.states import read_frames
from ser_core.training.randomness import generator


def run(context: StageContext) -> dict[str, Any]:
    """Cluster the frames, save labels and centroids, and return metrics. Raises InputError for fewer frames than clusters."""
    k = int(context.settings["k"])
    iterations = int(context.settings["iterations"])
    ids = [utterance.id for utterance in context.training.utterances]
    mapped, counts = read_frames(context.upstream["states"], ids)
    if k > len(mapped):
        raise InputError(
            f"cluster: k = {k} is more than the {len(mapped)} frames of the training folds; take it out of recipe.cluster.counts"
        )
    started = time.monotonic()
    checkpoints, progress = context.checkpoints(), context.progress()
    saved = checkpoints.load()

    def save(done: int, centroids: Float32Array) -> None:
        checkpoints.save(done, {"centroids": {"centroids": torch.from_numpy(centroids)}}, {})

    def on_iteration(iteration: int, inertia: float) -> None:
        progress.update(iteration, iterations, f"cluster: k {k}, iteration", f", inertia a frame {inertia / len(mapped):.6g}")

    checkpointing = Checkpointing(
        save=save,
        seconds=context.execution.checkpoint_minutes * 60,
        saved=(saved.step, saved.tensors["centroids"]["centroids"].numpy()) if saved else None,
    )
    if saved:
        context.report(f"cluster: k {k}, resumed after iteration {saved.step}")
    with DeterministicPool(torch.get_num_threads() if context.device.type == "cpu" else 1) as pool:
        try:
            frames = KMeans(mapped, pool, context.device, context.should_stop)
        except ValueError as error:
            raise InputError(f"cluster: {error} in {context.upstream['states']}; delete that folder and launch again") from error
        found = lloyd(
            frames,
            lambda: frames.initial_centroids(k, generator(context.seed, "k-means", k)),
            iterations,
            checkpointing,
            on_iteration,
        )
    seconds = time.monotonic() - started
    inertia = found.inertia
    context.report(f"cluster: k {k}, {len(mapped)} frames, inertia a frame {inertia / len(mapped):.4g}, {seconds:.1f} s")
    write_labels(context.output, ids, found.labels, counts, found.centroids)
    share = np.bincount(found.labels, minlength=k) / len(mapped)
    entropy = float(-np.sum(share[share > 0] * np.log(share[share > 0])))
    metrics = {"k": k, "frames": len(mapped), "inertia": inertia, "entropy": entropy, "empty_clusters": int((share == 0).sum())}
    return {"metrics": metrics, "durations": {"k_means": seconds, "resumed_at_step": saved.step if saved else 0}}
