"""Speech emotion classifier for transformers: a pretrained speech encoder, the mean over frames, and a linear head.

Exported models contain a copy of this file, which `trust_remote_code=True` loads. It imports transformers and torch only.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class SpeechEmotionConfig(PretrainedConfig):  # type: ignore[misc]
    """`encoder`: the configuration of the encoder (wav2vec2, hubert, wavlm or data2vec-audio). `pooling`: `paper` or `reference`.

    `projector_units`: outputs of a linear layer on every frame, whose plain mean the head classifies; 0: none, `pooling` decides.
    """

    model_type = "ser-grid-classifier"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        pooling: str = "paper",
        projector_units: int = 0,
        sampling_rate: int = 16_000,
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder or {"model_type": "wav2vec2"}
        self.pooling = pooling
        self.projector_units = projector_units
        self.sampling_rate = sampling_rate
        super().__init__(**kwargs)


class SpeechEmotionClassifier(PreTrainedModel):  # type: ignore[misc]
    """Logits of the emotions of an utterance. An utterance's logits do not depend on the others of its batch."""

    config_class: ClassVar[Any] = SpeechEmotionConfig
    base_model_prefix = "wav2vec2"
    main_input_name = "input_values"
    _supports_sdpa = True

    def __init__(self, config: SpeechEmotionConfig) -> None:
        super().__init__(config)
        values = dict(config.encoder)
        kind = values.pop("model_type")
        # transformers has no scaled_dot_product_attention for WavLM
        options = {"attn_implementation": "eager"} if kind == "wavlm" else {}
        self.wav2vec2 = AutoModel.from_config(AutoConfig.for_model(kind, **values), **options)
        hidden, units = self.wav2vec2.config.hidden_size, config.projector_units
        self.projector = nn.Linear(hidden, units) if units else None
        self.head = nn.Linear(units or hidden, config.num_labels)
        self.post_init()

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """Return logits (B, classes) of waves (B, samples); `attention_mask` (B, samples) is 1 for the samples of each utterance.

        Each utterance is computed without its padding, which would change it in encoders with a group norm.
        """
        rows = list(input_values)
        if attention_mask is not None:
            rows = [row[: int(mask.sum())] for row, mask in zip(rows, attention_mask, strict=True)]
        return SequenceClassifierOutput(logits=torch.cat([self._logits(row[None]) for row in rows]))

    def _logits(self, wave: Tensor) -> Tensor:
        """(1, samples) -> (1, classes). With torch.sym_max instead of max the lengths stay free when torch.export traces it."""
        missing = torch.sym_max(self._shortest() - wave.shape[1], 0)  # type: ignore[no-untyped-call]
        hidden: Tensor = self.wav2vec2(F.pad(wave, (0, missing))).last_hidden_state
        if self.projector is not None:
            pooled = self.projector(hidden).mean(1)
        elif self.config.pooling == "reference":
            pooled = F.relu(hidden)[:, : torch.sym_max(hidden.shape[1] - 1, 1)].mean(1)  # type: ignore[no-untyped-call]
        else:
            pooled = F.relu(hidden.mean(1))
        logits: Tensor = self.head(pooled)
        return logits

    def _shortest(self) -> int:
        """Samples of one frame; a shorter wave is padded with zeros."""
        samples = 1
        config = self.wav2vec2.config
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return int(samples)
