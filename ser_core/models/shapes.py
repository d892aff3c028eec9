"""Configuration of wav2vec v1, and the number of its frames and of emotion states for a number of samples.

Does not import torch: planning counts the frames of a corpus.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ser_core.errors import InputError
from ser_core.models.checkpoint_keys import unknown_key
from ser_core.models.identity import wav2vec_identity
from ser_core.models.model_types import CONFIG_FILE
from ser_core.settings.backbone import Wav2vecSettings

Layers = tuple[tuple[int, int, int], ...]  # (channels, kernel, stride) of each convolution

# Convolution from the 10 ms frames of wav2vec v1 to the 20 ms frames of wav2vec 2.0 (section 2.3).
MATCH_KERNEL = 4
MATCH_STRIDE = 2


@dataclass(frozen=True)
class Wav2vecConfig:
    """Hyperparameters of the network. Defaults: fairseq's; for a checkpoint they are read from its file."""

    conv_feature_layers: Layers = ((512, 10, 5), (512, 8, 4), (512, 4, 2), (512, 4, 2), (512, 4, 2), (512, 1, 1), (512, 1, 1), (512, 1, 1))
    conv_aggregator_layers: Layers = tuple((512, kernel, 1) for kernel in range(2, 14))
    log_compression: bool = True
    skip_connections_feat: bool = False
    skip_connections_agg: bool = True
    residual_scale: float = 0.5
    conv_bias: bool = True  # of the aggregator; the extractor has none
    zero_pad: bool = False  # causal padding of the aggregator with zeros instead of copies of the first frame
    affine: bool = True  # group norms with scale and offset
    activation: str = "relu"
    dropout: float = 0.0  # of the aggregator


def parse_config(values: Mapping[str, Any]) -> Wav2vecConfig:
    """Build the configuration from YAML or JSON values. Raises InputError with one line per unknown key and per value of a wrong type."""
    fields = {field.name: field for field in dataclasses.fields(Wav2vecConfig)}
    problems: list[str] = []
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(unknown_key("recipe.states.wav2vec.config", key, fields))
        elif key.endswith("_layers"):
            try:
                layers = tuple((int(channels), int(kernel), int(stride)) for channels, kernel, stride in value)
            except (TypeError, ValueError):
                layers = ()
            if not layers or min(min(layer) for layer in layers) < 1:
                problems.append(f"recipe.states.wav2vec.config.{key}: {value!r} is not a list of [channels, kernel, stride]")
            parsed[key] = layers
        else:
            kind = type(fields[key].default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind):
                problems.append(f"recipe.states.wav2vec.config.{key}: {value!r} is not a {kind.__name__}")
            parsed[key] = value
    if parsed.get("activation", "relu") not in ("relu", "gelu"):
        problems.append(f"recipe.states.wav2vec.config.activation: {parsed['activation']!r} is neither relu nor gelu")
    if problems:
        raise InputError(problems)
    return Wav2vecConfig(**parsed)


def expected_shape(settings: Wav2vecSettings) -> Wav2vecConfig:
    """Return the configuration of a recipe's wav2vec v1 without opening weights: a checkpoint file is assumed to be `wav2vec_large.pt`.

    Raises InputError as `wav2vec_identity` does, and for an invalid configuration.
    """
    wav2vec_identity(settings)
    if settings.checkpoint is None:
        return parse_config(settings.config)
    folder = Path(settings.checkpoint).expanduser()
    return parse_config(json.loads((folder / CONFIG_FILE).read_text())) if folder.is_dir() else Wav2vecConfig()


def convolved_length(layers: Layers, samples: int) -> int:
    """Return the number of frames after convolutions without padding; 0 for too few samples."""
    for _, kernel, stride in layers:
        samples = max((samples - kernel) // stride + 1, 0)
    return samples


def extractor_frames(config: Wav2vecConfig, samples: int) -> int:
    """Return the number of extractor frames for `samples`, the length of a time mask."""
    return convolved_length(config.conv_feature_layers, samples)


def state_count(config: Wav2vecConfig, samples: int) -> int:
    """Return the number of emotion states for `samples` (0 for too few), also for an aggregator with strides."""
    frames = extractor_frames(config, samples)
    for _, _, stride in config.conv_aggregator_layers:
        frames = (frames - 1) // stride + 1 if frames else 0  # causal padding of kernel - 1
    return max((frames - MATCH_KERNEL) // MATCH_STRIDE + 1, 0)


def minimum_samples(config: Wav2vecConfig) -> int:
    """Return the number of samples of one emotion state (receptive field)."""
    length = MATCH_KERNEL
    for _, _, stride in reversed(config.conv_aggregator_layers):
        length = (length - 1) * stride + 1
    for _, kernel, stride in reversed(config.conv_feature_layers):
        length = (length - 1) * stride + kernel
    return length
