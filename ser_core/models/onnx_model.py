"""An exported classifier as one ONNX file, for programs without torch: wave in, logits out.

Input `waveform` (1, samples) float32 in -1 to 1, of any length; output `logits` (1, classes) float32. Where the encoder expects normalised
waves, normalisation is part of the graph. Metadata: `classes`, a JSON list in the order of the logits, and `sampling_rate` in Hz.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ser_core.disk import os_errors
from ser_core.errors import InputError, first_line
from ser_core.models.exported_model import SpeechEmotionClassifier
from ser_core.models.front_end import NORMALISE_EPSILON
from ser_core.models.model_types import PREPROCESSOR_FILE

ONNX_FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript")  # that torch.onnx needs
INSTALL = "pip install -c constraints.txt -e '.[onnx]'"
EXAMPLE_SAMPLES = 16_000  # of the wave that torch.export traces the model with; no constant of the graph depends on it


def require_onnx() -> None:
    """Raise InputError with the extra to install if a package for the export is missing. Imports none of them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx: not installed: {', '.join(missing)}; the export needs the extra `onnx`: {INSTALL}")


class _FromWave(nn.Module):
    """The classifier with the normalisation that a feature extractor of transformers does for it."""

    def __init__(self, model: Any, *, normalise: bool) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise

    def forward(self, waveform: Tensor) -> Tensor:
        """(1, samples) -> (1, classes)."""
        if self.normalise:
            variance = waveform.var(1, unbiased=False, keepdim=True)
            waveform = (waveform - waveform.mean(1, keepdim=True)) / torch.sqrt(variance + NORMALISE_EPSILON)
        logits: Tensor = self.model(waveform).logits
        return logits


def write_onnx(folder: Path) -> Path:
    """Write model.onnx beside the classifier that `save_model` wrote into `folder`, and return its path.

    Attention is transformers' own (`eager`), which is exported as plain matrix products. Raises InputError if torch cannot export it.
    """
    model: Any = SpeechEmotionClassifier.from_pretrained(folder).eval()
    model.wav2vec2.set_attn_implementation("eager")
    normalise = bool(json.loads((folder / PREPROCESSOR_FILE).read_text(encoding="utf-8"))["do_normalize"])
    wave = torch.randn(1, EXAMPLE_SAMPLES, generator=torch.Generator().manual_seed(0))
    try:
        program = _exported(_FromWave(model, normalise=normalise).eval(), wave)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        kind = model.wav2vec2.config.model_type
        raise InputError(f"--onnx: torch {torch.__version__} cannot export {kind}: {first_line(error)}") from error
    classes = [model.config.id2label[number] for number in range(model.config.num_labels)]
    program.model.metadata_props.update({"classes": json.dumps(classes), "sampling_rate": str(model.config.sampling_rate)})
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the names of local folders
    with os_errors(folder / ONNX_FILE):
        program.save(folder / ONNX_FILE)
    return folder / ONNX_FILE


def _exported(model: nn.Module, wave: Tensor) -> Any:
    """The program of torch.onnx, for waves of any length."""
    with _errors_only("torch.onnx", "onnxscript"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own modules
        return torch.onnx.export(
            model,
            (wave,),
            dynamo=True,
            dynamic_shapes={"waveform": {1: torch.export.Dim.DYNAMIC}},
            input_names=["waveform"],
            output_names=["logits"],
            verbose=False,
        )


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Keep warnings of loggers out: torch.onnx misses torchvision, which no model needs, and onnxscript names what it cannot fold."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
