"""The corpora of the check, written once into its folder: short tones that can be learned, and noise with lengths like IEMOCAP's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.gpu_check.recipes import FOLD
from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance, load_manifest, write_manifest

FOLDS = (FOLD, "2")
CLASSES = ("angry", "happy", "neutral", "sad")
TRAINING, TEST = 24, 12  # utterances of the tones
BASE_TRAINING, BASE_TEST = 192, 16  # utterances of the noise
MEAN_SECONDS, SPREAD, SHORTEST_SECONDS, LONGEST_SECONDS = 4.5, 0.55, 0.6, 10.0  # as in benchmarks/training.py


def tones(root: Path) -> Manifest:
    """36 utterances of 0.06 to 2 s, a pitch for each class, in noise; every eighth is a single frame long."""
    rng = np.random.default_rng(0)

    def utterance(number: int) -> tuple[np.ndarray, str]:
        samples = 945 if number % 8 == 7 else int(rng.integers(6_000, 32_000))
        pitch = 120 * (1 + number % len(CLASSES))
        wave = 0.1 * np.sin(2 * np.pi * pitch * np.arange(samples) / SAMPLE_RATE) + 0.02 * rng.standard_normal(samples)
        return wave, CLASSES[number % len(CLASSES)]

    return _corpus(root / "tones", TRAINING, TEST, utterance)


def noise(root: Path, *, small: bool) -> Manifest:
    """Noise of log-normal lengths (mean 4.5 s, at most 10 s); `small`: a quarter of the length, an eighth of the utterances."""
    rng = np.random.default_rng(0)
    scale = 0.25 if small else 1.0

    def utterance(number: int) -> tuple[np.ndarray, str]:
        seconds = float(np.clip(rng.lognormal(np.log(MEAN_SECONDS) - SPREAD**2 / 2, SPREAD), SHORTEST_SECONDS, LONGEST_SECONDS))
        return 0.05 * rng.standard_normal(int(scale * seconds * SAMPLE_RATE)), CLASSES[number % len(CLASSES)]

    share = 8 if small else 1
    return _corpus(root / ("noise-small" if small else "noise"), BASE_TRAINING // share, max(4, BASE_TEST // share), utterance)


def _corpus(folder: Path, training: int, test: int, utterance: Callable[[int], tuple[np.ndarray, str]]) -> Manifest:
    """Return the corpus in `folder`, written first if it is not there: training utterances in fold 2, test utterances in fold 1."""
    if folder.exists():
        return load_manifest(folder)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    (unfinished / "audio").mkdir(parents=True)
    utterances = []
    for number in range(training + test):
        wave, label = utterance(number)
        fold = FOLDS[1] if number < training else FOLDS[0]
        path = f"audio/{number:05d}.flac"
        soundfile.write(unfinished / path, wave, SAMPLE_RATE, subtype="PCM_16")
        utterances.append(Utterance(f"{number:05d}", path, len(wave), label, f"speaker{fold}", fold))
    write_manifest(unfinished, folder.name, list(FOLDS), utterances)
    unfinished.rename(folder)  # complete or absent: a part may be killed at any moment
    return load_manifest(folder)
