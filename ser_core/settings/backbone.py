"""Speech models, padding and masking of their input."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Normalise(Enum):
    """Whether waves are normalised to zero mean and unit variance before the backbone."""

    auto = "auto"  # as the checkpoint's preprocessor_config.json states, for models with layer norms in the convolutions; else not
    never = "never"
    always = "always"


@dataclass
class BackboneSettings:
    """A speech model (ser_core/models/model_types.py): a checkpoint (Hugging Face name or folder), or random weights from `config`."""

    checkpoint: str | None = "facebook/wav2vec2-base"  # Hugging Face name, or a folder; null: random weights
    revision: str | None = None  # of a Hugging Face name
    config: dict[str, Any] = field(default_factory=dict)  # model_type (default: wav2vec2) and keys of its configuration in transformers
    init_seed: int = 0  # of random weights
    normalise: Normalise = Normalise.auto  # waves to zero mean and unit variance
    commits: dict[str, str] = field(default_factory=dict)  # hub name -> commit; set by a launch (ser_core.models.hub), not part of a key


@dataclass
class Wav2vecSettings:
    """wav2vec v1: a fairseq checkpoint (`wav2vec_large.pt`), or a model with random weights from `config` and `init_seed`."""

    checkpoint: str | None = None  # path of wav2vec_large.pt; null: random weights
    config: dict[str, Any] = field(default_factory=dict)  # fields of ser_core.models.shapes.Wav2vecConfig, used when checkpoint is null
    init_seed: int = 0  # of random weights


class Padding(Enum):
    """Whether padding affects an utterance's features."""

    independent = "independent"  # features depend on the utterance alone
    reference = "reference"  # code: zero-padded batches pass through the front end's group norm, so features depend on the batch


@dataclass
class FeatureSettings:
    """Padding of the front end's input (not stated in the paper; the code pads)."""

    padding: Padding = Padding.independent  # whether padding affects an utterance's features


class SpansPer(Enum):
    """What a number of masked spans is drawn for."""

    utterance = "utterance"  # from the utterance's own length; an utterance's mask does not depend on its batch
    batch = "batch"  # code: one number for all rows, from the padded length; spans are then cut to the valid frames


@dataclass
class SpecAugmentSettings:
    """Spans masked during training (lengths and probabilities from the code)."""

    spans_per: SpansPer = SpansPer.utterance  # what a number of spans is drawn for
    time_length: int = 15  # frames of a span
    time_probability: float = 0.08  # share of the frames in spans, overlaps counted twice
    time_minimum: int = 0  # spans of each utterance, or of the batch
    feature_length: int = 64  # channels of a span
    feature_probability: float = 0.05  # share of the channels in spans, overlaps counted twice
    feature_minimum: int = 1  # spans at least
