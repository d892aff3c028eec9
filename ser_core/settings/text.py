"""Text encoders, and fusion of audio and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any

from ser_core.settings.execution import Precision


@dataclass
class TextEncoderSettings:
    """A text encoder of transformers: a folder, a Hugging Face name in the local cache, or random weights from `config`."""

    checkpoint: str | None = "google-bert/bert-base-uncased"  # folder or Hugging Face name, never downloaded; null: random weights
    revision: str | None = "86b5e0934494bd15c9632b12f734a8a67f723594"  # the commit of a Hugging Face name, which must be given
    config: dict[str, Any] = field(default_factory=dict)  # model_type and keys of its configuration in transformers
    init_seed: int = 0  # of random weights
    tokenizer: str | None = None  # folder with the tokenizer; null: the checkpoint's


@dataclass
class TextSettings:
    """Fine-tuning of a text encoder on transcripts; rate, batch size and epochs are among those of BERT (arXiv 1810.04805, A.3)."""

    encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    epochs: int = 4  # passes over the training utterances
    batch_size: int = 32  # utterances
    learning_rate: float = 2e-5  # constant
    max_tokens: int = 128  # of an utterance, special tokens included; the rest is cut off (IEMOCAP: 98 words at most)
    precision: Precision = Precision.auto  # autocast type
    transcripts: str = ""  # digest of the corpus' transcripts, set by a launch

    def encoder_name(self) -> str:
        """The encoder, as captions name it."""
        if self.encoder.checkpoint is None:
            return f"text encoder {self.encoder.config.get('model_type')} with random weights (init_seed {self.encoder.init_seed})"
        return f"text encoder {PurePath(self.encoder.checkpoint).name}"


class AudioMethod(Enum):
    """The method of audio that is fused with text."""

    vft = "vft"
    tapt = "tapt"
    ptapt = "ptapt"


@dataclass
class FusedLayerSettings:
    """Training of the linear layer of the method `concat`; values: published code of arXiv 2406.08353, for layers on frozen encoders."""

    epochs: int = 100  # passes over the training utterances
    batch_size: int = 64  # utterances
    learning_rate: float = 5e-4  # constant


@dataclass
class CrossSettings:
    """Classifier of the method `cross`, on frozen encoders as in arXiv 2406.08353; training: its published code, as for the layer."""

    heads: int = 8  # of each attention; divides the widths of both encoders
    units: int = 1024  # of the feed-forward layers
    dropout: float = 0.1  # of attention and feed-forward layers
    epochs: int = 100  # passes over the training utterances
    batch_size: int = 64  # utterances
    learning_rate: float = 5e-4  # constant
    precision: Precision = Precision.auto  # autocast type


@dataclass
class FusionSettings:
    """Fusion of audio and text by the methods `score` and `concat` (of two runs of the same fold and seed) and `cross`."""

    audio: AudioMethod = AudioMethod.vft  # the method of audio
    text_weight: float = 0.5  # of `score`: of the text's log-probabilities; those of audio have 1 - text_weight. Fixed, not fitted
    layer: FusedLayerSettings = field(default_factory=FusedLayerSettings)
    cross: CrossSettings = field(default_factory=CrossSettings)
