"""Classifiers as ONNX files: ONNX Runtime gives the logits of torch at any length."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch

from ser_core.models.classifier import EmotionClassifier
from ser_core.models.kept_model import save_model
from ser_core.models.model_types import NORMALISE_KEY
from ser_core.models.onnx_model import EXAMPLE_SAMPLES, write_onnx
from ser_core.settings.finetune import Pooling
from tests.ser_core.models.test_backbones import filled
from tests.ser_core.models.test_kept_model import CLASSES, logits

LENGTHS = (3, 700, EXAMPLE_SAMPLES + 5_001)  # samples: less than a frame, one frame more than none, more than the traced wave


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-stable"])
def test_logits_are_those_of_the_classifier(name: str, tmp_path: Path) -> None:
    """Computed by this package, at three lengths, within 1e-5. The stable model is normalised, with the authors' pooling."""
    stable = name == "wav2vec2-stable"
    torch.manual_seed(0)
    encoder = filled(name)
    setattr(encoder.config, NORMALISE_KEY, stable)
    model = EmotionClassifier(encoder, len(CLASSES), Pooling.reference if stable else Pooling.paper).eval()
    save_model(model, CLASSES, tmp_path)
    path = write_onnx(tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    found = []
    for samples in LENGTHS:
        wave = 0.1 * torch.randn(samples, generator=generator) + 0.02
        found.append(torch.from_numpy(session.run(["logits"], {"waveform": wave[None].numpy()})[0]))
        torch.testing.assert_close(found[-1], logits(model, wave), rtol=0, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    stated = session.get_modelmeta().custom_metadata_map
    assert (json.loads(stated["classes"]), stated["sampling_rate"]) == (list(CLASSES), "16000")
    assert str(Path(__file__).parents[3]).encode() not in path.read_bytes()
