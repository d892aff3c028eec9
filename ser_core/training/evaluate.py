"""The test of a fine-tuned model: whole utterances, no augmentation, float32; batches by length with the numbers of batches of one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ser_core.models.classifier import EmotionClassifier
from ser_core.models.front_end import project_independent
from ser_core.training.endings import Diverged
from ser_core.training.metrics import Scores, scores
from ser_core.training.splits import Split

PREDICTIONS = "predictions.csv"


@torch.no_grad()
def predict(model: EmotionClassifier, split: Split, batch_size: int) -> NDArray[np.float32]:
    """Logits (utterances, classes) in the order of the split.

    Every utterance goes through the front end alone (so did the authors' test, in batches of one) and shares the transformer with others
    of similar length, whose padding it does not see. Raises Diverged where a logit is not finite.
    """
    model.eval()
    device = model.head.weight.device
    logits = np.zeros((len(split), len(split.classes)), dtype=np.float32)
    order = sorted(range(len(split)), key=lambda position: (-split.samples[position], position))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        features = project_independent(model.wav2vec2, [split.wave(position, keep=False) for position in chosen])
        frames = torch.tensor([len(each) for each in features], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        logits[chosen] = model(padded, frames).float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise Diverged("the trained model gives logits that are not finite")
    return logits


def score(logits: NDArray[np.float32], split: Split) -> Scores:
    """Scores of (utterances, classes) logits."""
    return scores(split.labels, logits.argmax(axis=1).tolist(), len(split.classes))


def write_predictions(path: Path, logits: NDArray[np.float32], split: Split) -> None:
    """One line an utterance: id, speaker, label, predicted, and the probability of every class."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "speaker", "label", "predicted", *(f"p_{name}" for name in split.classes)])
        for utterance, row in zip(split.utterances, probabilities, strict=True):
            predicted = split.classes[int(row.argmax())]
            writer.writerow([utterance.id, utterance.speaker, utterance.label, predicted, *(f"{value:.6f}" for value in row)])
