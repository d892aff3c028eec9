"""Emotions of recordings by a trained classifier: any format, rate and number of channels that corpora can have, of any length.

A recording of at most WINDOW_SECONDS is read whole, as utterances are in the test of a run. A longer one is cut into the fewest windows of
equal length that are no longer than that, and its probabilities are the mean over its windows. One window is in memory at a time, and each
is computed alone: the result of a recording does not depend on the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from ser_core.corpora.audio import FULL_SCALE, AudioError, convert
from ser_core.corpora.recordings import WHOLE, Excerpt
from ser_core.errors import InputError
from ser_core.features.features import float32_only
from ser_core.models.adaptor_files import FACTS_FILE, load_adaptors
from ser_core.models.backbone import load_encoder
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.front_end import project_independent
from ser_core.models.kept_model import LoadedModel, is_kept_model, load_model
from ser_core.settings.finetune import FinetuneSettings
from ser_core.stages.context import parse_settings, planned_backbone
from ser_core.stages.export import adaptor_facts
from ser_core.stages.finetune import ADAPTORS, MODEL, adaptors_of, classifier_of
from ser_core.training.device import choose_device, deterministic

WINDOW_SECONDS = 40.0  # longer than any utterance of IEMOCAP (34 s)


def classifier_of_run(settings: Mapping[str, Any], runtime: Mapping[str, Any], upstream: Mapping[str, Path], output: Path) -> LoadedModel:
    """Load the classifier of a finished `finetune` stage; arguments as for `SpeechRegistry.export`.

    Raises InputError if its weights were not kept, or if it predicts attributes alone.
    """
    finetune = parse_settings(FinetuneSettings, settings["finetune"])
    if finetune.attributes.weight == 1:
        raise InputError("this run was trained on attributes alone and has no probabilities of classes")
    adaptors = adaptors_of(finetune.adaptors)
    if adaptors is None:
        if not is_kept_model(output / MODEL):
            raise InputError(
                "the weights of this run were not kept (recipe.finetune.keep): `export` trains it again and writes a folder that predict "
                "takes in place of the run"
            )
        return load_model(output / MODEL)
    facts = adaptor_facts(output / ADAPTORS / FACTS_FILE)
    outputs = len(facts["classes"]) + len(facts["attributes"]["names"])
    model = classifier_of(load_encoder(planned_backbone(settings, runtime, upstream)), outputs, finetune, adaptors).eval()
    load_adaptors(model, output / ADAPTORS)
    return LoadedModel(model, tuple(facts["classes"]))


def columns(loaded: LoadedModel) -> tuple[str, ...]:
    """Names of the values of a row of `predict_files`."""
    return ("path", "emotion", *(f"p_{name}" for name in loaded.classes))


def predict_files(loaded: LoadedModel, files: Sequence[str], device: str = "auto") -> Iterator[tuple[dict[str, Any], str]]:
    """Yield for each file, in order, its row (`path`, `emotion`, the probability of each class as `p_CLASS`) and "".

    Or a row of its `path` alone, and why it cannot be read. `device`: auto, cpu or cuda.
    """
    chosen = choose_device(device)
    model = loaded.model.to(chosen)
    for file in files:
        try:
            probabilities = _recording(model, len(loaded.classes), Path(file), chosen)
        except (AudioError, OSError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            yield {"path": file}, reason
            continue
        emotion = loaded.classes[int(probabilities.argmax())]
        named = {f"p_{name}": round(float(value), 6) for name, value in zip(loaded.classes, probabilities, strict=True)}
        yield {"path": file, "emotion": emotion, **named}, ""


def windows(frames: int, rate: int) -> list[Excerpt]:
    """Cut a recording of `frames` samples a channel into the fewest parts of equal length, within one sample, of at most WINDOW_SECONDS."""
    count = max(1, math.ceil(frames / (WINDOW_SECONDS * rate)))
    if count == 1:
        return [WHOLE]
    ends = [frames * number // count for number in range(count + 1)]
    return [Excerpt(start=first / rate, end=last / rate) for first, last in itertools.pairwise(ends)]


def _recording(model: EmotionClassifier, classes: int, path: Path, device: torch.device) -> NDArray[np.float64]:
    """Class probabilities (classes,) of a recording. Raises AudioError or OSError if it cannot be read."""
    if not path.is_file():
        raise AudioError("no such file" if not path.exists() else "not a file")
    try:
        with soundfile.SoundFile(path) as stream:
            parts = windows(stream.frames, stream.samplerate)
    except (soundfile.SoundFileError, RuntimeError):
        parts = [WHOLE]  # `convert` states what is wrong
    found = [_probabilities(model, classes, convert(path, part).samples, device) for part in parts]
    mean: NDArray[np.float64] = np.mean(found, axis=0)
    return mean


@torch.no_grad()
def _probabilities(model: EmotionClassifier, classes: int, samples: NDArray[np.int16], device: torch.device) -> NDArray[np.float64]:
    wave = torch.from_numpy(samples.astype(np.float32) / FULL_SCALE)
    with deterministic(device, None), float32_only(device):
        features = project_independent(model.wav2vec2, [wave])[0][None]
        logits = model(features, torch.tensor([features.shape[1]], device=device))[0, :classes]
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model gives outputs that are not finite")
    found: NDArray[np.float64] = torch.softmax(logits.double(), -1).cpu().numpy()
    return found
