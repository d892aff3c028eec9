"""Shape of wav2vec v1 and of the emotion states on top of it: configuration, and how many frames come of so many samples.

Without torch: planning counts the frames of a corpus with it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ser_core.errors import InputError
from ser_core.models.identity import CONFIG_FILE, wav2vec_identity
from ser_core.settings import Wav2vecSettings

Layers = tuple[tuple[int, int, int], ...]  # (channels, kernel, stride) of each convolution

# The convolution that brings wav2vec's 10 ms frames to wav2vec 2.0's 20 ms (section 3.3).
MATCH_KERNEL = 4
MATCH_STRIDE = 2


@dataclass(frozen=True)
class Wav2vecConfig:
    """Shape of the network; the defaults are fairseq's, the values of `wav2vec_large.pt` are read from it."""

    conv_feature_layers: Layers = ((512, 10, 5), (512, 8, 4), (512, 4, 2), (512, 4, 2), (512, 4, 2), (512, 1, 1), (512, 1, 1), (512, 1, 1))
    conv_aggregator_layers: Layers = tuple((512, kernel, 1) for kernel in range(2, 14))
    log_compression: bool = True
    skip_connections_feat: bool = False
    skip_connections_agg: bool = True
    residual_scale: float = 0.5
    conv_bias: bool = True  # of the aggregator; the extractor has none
    zero_pad: bool = False  # pad the aggregator's left with zeros instead of its first frame
    affine: bool = True  # group norms with scale and offset
    activation: str = "relu"
    dropout: float = 0.0  # of the aggregator


def parse_config(values: Mapping[str, Any]) -> Wav2vecConfig:
    """Check plain values (of YAML or JSON). Raises InputError naming each unknown key and each value of the wrong kind."""
    fields = {field.name: field for field in dataclasses.fields(Wav2vecConfig)}
    problems: list[str] = []
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problems.append(
                f"wav2vec.config.{key}: no such key" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(fields)}")
            )
        elif key.endswith("_layers"):
            try:
                layers = tuple((int(channels), int(kernel), int(stride)) for channels, kernel, stride in value)
            except (TypeError, ValueError):
                layers = ()
            if not layers or min(min(layer) for layer in layers) < 1:
                problems.append(f"wav2vec.config.{key}: {value!r} is not a list of [channels, kernel, stride]")
            parsed[key] = layers
        else:
            kind = type(fields[key].default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind):
                problems.append(f"wav2vec.config.{key}: {value!r} is not a {kind.__name__}")
            parsed[key] = value
    if parsed.get("activation", "relu") not in ("relu", "gelu"):
        problems.append(f"wav2vec.config.activation: {parsed['activation']!r} is neither relu nor gelu")
    if problems:
        raise InputError(problems)
    return Wav2vecConfig(**parsed)


def expected_shape(settings: Wav2vecSettings) -> Wav2vecConfig:
    """The shape of a recipe's wav2vec v1. No weights are opened: a checkpoint file is taken to be as `wav2vec_large.pt`, fairseq's default.

    Raises InputError as `wav2vec_identity` does, and for a configuration that is none.
    """
    wav2vec_identity(settings)
    if settings.checkpoint is None:
        return parse_config(settings.config)
    folder = Path(settings.checkpoint).expanduser()
    return parse_config(json.loads((folder / CONFIG_FILE).read_text())) if folder.is_dir() else Wav2vecConfig()


def convolved_length(layers: Layers, samples: int) -> int:
    """Return the length after unpadded convolutions; 0 where there is not one frame."""
    for _, kernel, stride in layers:
        samples = max((samples - kernel) // stride + 1, 0)
    return samples


def extractor_frames(config: Wav2vecConfig, samples: int) -> int:
    """Return the frames of the extractor for so many samples: what a time mask is drawn over."""
    return convolved_length(config.conv_feature_layers, samples)


def state_count(config: Wav2vecConfig, samples: int) -> int:
    """Return the emotion states for so many samples (0 where there are too few), strided aggregators included."""
    frames = extractor_frames(config, samples)
    for _, _, stride in config.conv_aggregator_layers:
        frames = (frames - 1) // stride + 1 if frames else 0  # padded by its kernel less one
    return max((frames - MATCH_KERNEL) // MATCH_STRIDE + 1, 0)


def minimum_samples(config: Wav2vecConfig) -> int:
    """Return how many samples give one emotion state."""
    length = MATCH_KERNEL
    for _, _, stride in reversed(config.conv_aggregator_layers):
        length = (length - 1) * stride + 1
    for _, kernel, stride in reversed(config.conv_feature_layers):
        length = (length - 1) * stride + kernel
    return length
