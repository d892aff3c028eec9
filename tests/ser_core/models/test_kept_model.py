"""Classifiers as folders: read back as they were, and loaded by transformers with the same logits, whatever the backbone and the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ser_core.errors import InputError
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.exported_model import SpeechEmotionClassifier
from ser_core.models.front_end import project_independent
from ser_core.models.kept_model import is_kept_model, load_model, save_model
from ser_core.settings.finetune import Pooling
from tests.ser_core.models.test_backbones import filled, waves

CLASSES = ("angry", "happy", "sad")


def logits(model: EmotionClassifier, wave: Tensor) -> Tensor:
    features = project_independent(model.wav2vec2, [wave])[0][None]
    found: Tensor = model(features, torch.tensor([features.shape[1]]))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["wav2vec2", "hubert-unnormed", "wavlm-stable", "data2vec"])
def test_a_classifier_is_what_it_was(name: str, tmp_path: Path) -> None:
    """In this package, and in transformers for each utterance of a padded batch. Attributes are left out."""
    pooling, units = (Pooling.reference, 0) if name == "wavlm-stable" else (Pooling.paper, 5 if name == "data2vec" else 0)
    torch.manual_seed(0)
    model = EmotionClassifier(filled(name), len(CLASSES) + 3, pooling, projector=units).eval()
    save_model(model, CLASSES, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.classes == CLASSES
    expected = [logits(model, wave)[:, : len(CLASSES)] for wave in waves()]
    for wave, found in zip(waves(), expected, strict=True):
        torch.testing.assert_close(logits(loaded.model, wave), found, rtol=0, atol=1e-6)
    batch, mask = pad_sequence(waves(), batch_first=True), pad_sequence([torch.ones(len(wave)) for wave in waves()], batch_first=True)
    theirs = SpeechEmotionClassifier.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(batch, attention_mask=mask).logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert [theirs.config.id2label[number] for number in range(3)] == list(CLASSES)


def test_folders_that_are_no_classifier(tmp_path: Path) -> None:
    """One line each: another model's folder, a damaged one, weights that do not fit."""
    assert not is_kept_model(tmp_path)
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load_model(tmp_path)
    model = EmotionClassifier(filled("wav2vec2"), 2)
    save_model(model, CLASSES[:2], tmp_path)
    assert is_kept_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, line in (
        ({"model_type": "wav2vec2"}, "model_type=wav2vec2: not an exported classifier"),
        ({"encoder": {**config["encoder"], "model_type": "unknown"}}, "cannot be loaded: KeyError"),
        ({"id2label": {"0": "angry"}}, r"model\.safetensors: 2 keys of another shape: head\.bias, head\.weight"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=line):
            load_model(tmp_path)
