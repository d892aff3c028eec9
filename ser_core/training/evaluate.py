"""Test of a fine-tuned model: whole utterances, no augmentation, float32; batches by length, with the logits of batches of one.

Several processes share the batches, which do not depend on the number of processes.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ser_core.corpora.manifest import DIMENSIONS
from ser_core.corpora.scripts import KINDS, kind_of
from ser_core.errors import Diverged
from ser_core.features.features import FrozenFeatures
from ser_core.models.classifier import EmotionClassifier
from ser_core.parallel.group import Group
from ser_core.settings.backbone import Padding
from ser_core.settings.execution import FeatureCache, Precision
from ser_core.training.batches import shares
from ser_core.training.device import choose_arithmetic
from ser_core.training.metrics import Scores, scores
from ser_core.training.splits import Split

PREDICTIONS = "predictions.csv"


def whole_features(
    model: EmotionClassifier, split: Split, cache: FeatureCache = FeatureCache.none, shared: Path | None = None
) -> FrozenFeatures:
    """Return features of whole utterances for a single pass: from the store if there is one, otherwise computed when needed."""
    arithmetic = choose_arithmetic(model.head.weight.device, Precision.float32)
    return FrozenFeatures(model.wav2vec2, split, None, Padding.independent, cache, arithmetic, shared, once=True)


def predict(
    model: EmotionClassifier,
    split: Split,
    batch_size: int,
    features: FrozenFeatures | None = None,
    group: Group | None = None,
) -> NDArray[np.float32]:
    """Return the outputs of `evaluate`."""
    return evaluate(model, split, batch_size, features, group)[0]


@torch.no_grad()
def evaluate(
    model: EmotionClassifier,
    split: Split,
    batch_size: int,
    features: FrozenFeatures | None = None,
    group: Group | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the model's outputs (utterances, outputs), and the inputs of its last layer (utterances, units), in the order of the split.

    In every process. The front end processes every utterance alone (as the authors' test does, with batches of one); the transformer
    processes utterances of similar length together, and attention ignores padding. `features`: a filled `whole_features`, or others that do
    not depend on the batch; None: computed here. Raises Diverged for an output that is NaN or infinite.
    """
    group = group or Group()
    model.eval()
    device = model.head.weight.device
    features = features or whole_features(model, split)
    outputs, pooled = np.zeros((len(split), model.head.out_features)), np.zeros((len(split), model.head.in_features))
    order = sorted(range(len(split)), key=lambda position: (-split.samples[position], position))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    costs = [split.samples[batch[0]] * len(batch) for batch in batches]
    for number in shares(costs, group.size)[group.rank]:
        group.expect_progress()
        chosen = batches[number]
        padded, frames = features.padded(chosen)
        found = model.pooled(padded, frames.to(device))
        outputs[chosen], pooled[chosen] = (each.float().cpu().numpy() for each in (model.head(found), found))
    outputs, pooled = group.all_reduce(outputs), group.all_reduce(pooled)
    if not np.isfinite(outputs).all():
        raise Diverged("the trained model gives outputs that are not finite")
    return outputs.astype(np.float32), pooled.astype(np.float32)


def score(logits: NDArray[np.float32], split: Split) -> Scores:
    """Return the scores of logits (utterances, classes)."""
    return scores(split.labels, logits.argmax(axis=1).tolist(), len(split.classes))


def score_kinds(logits: NDArray[np.float32], split: Split) -> dict[str, float]:
    """Return the UA (fraction) of scripted and of improvised turns, `ua_scripted` and `ua_improvised`, of the kinds that there are."""
    found = {}
    kinds = [kind_of(utterance) for utterance in split.utterances]
    for kind in KINDS:
        chosen = [position for position, each in enumerate(kinds) if each == kind]
        if chosen:
            labels = [split.labels[position] for position in chosen]
            found[f"ua_{kind}"] = scores(labels, logits[chosen].argmax(axis=1).tolist(), len(split.classes)).ua
    return found


def write_predictions(path: Path, logits: NDArray[np.float32], split: Split, attributes: NDArray[np.float64] | None = None) -> None:
    """Write one CSV row per utterance: id, speaker, label, predicted class and the softmax probability of every class.

    `attributes`: (utterances, 3) predictions in the corpus' scale; then the row ends with the true values, empty if missing, and the
    predictions.
    """
    columns: list[tuple[str, list[str]]] = [
        (name, [str(getattr(utterance, name)) for utterance in split.utterances]) for name in ("id", "speaker", "label")
    ]
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    columns.append(("predicted", [split.classes[int(row.argmax())] for row in probabilities]))
    columns += [(f"p_{name}", [f"{row[place]:.6f}" for row in probabilities]) for place, name in enumerate(split.classes)]
    if attributes is not None:
        true = [utterance.dimensions for utterance in split.utterances]
        columns += [(name, ["" if each is None else f"{each[place]:g}" for each in true]) for place, name in enumerate(DIMENSIONS)]
        columns += [(f"predicted_{name}", [f"{row[place]:.6f}" for row in attributes]) for place, name in enumerate(DIMENSIONS)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name for name, _ in columns])
        writer.writerows(zip(*(cells for _, cells in columns), strict=True))
