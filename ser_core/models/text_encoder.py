"""Text classifier: an encoder of transformers, the masked mean of its last hidden states, a linear layer; and its tokens.

Everything is read from local files: nothing is downloaded.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ser_core.disk import raise_storage_error
from ser_core.errors import InputError, first_line, is_memory_error
from ser_core.models.backbone import quiet_transformers
from ser_core.models.checkpoint_keys import key_problems
from ser_core.models.text_identity import KEY, cached_encoder, missing_encoder
from ser_core.models.trained import below, train_only
from ser_core.settings.text import TextEncoderSettings

Tokens = list[list[int]]  # ids of each utterance, special tokens included, never empty
UNUSED = ("pooler.",)  # parts of encoders behind the last hidden states


class TextClassifier(nn.Module):
    """Logits of transcripts. Encoder and linear layer train; dropout is that of the encoder's configuration."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        unused = tuple(f"encoder.{part}" for part in UNUSED)
        train_only(self, [name for name in below(self, "encoder", "head") if not name.startswith(unused)])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, classes) of padded token ids (B, T) with their mask (B, T), 1 for tokens."""
        logits: Tensor = self.head(self.pooled(ids, mask))
        return logits

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the last hidden states over the tokens: (B, hidden)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.to(hidden.dtype)
        mean: Tensor = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return mean


def load_text_encoder(settings: TextEncoderSettings) -> tuple[Any, Any]:
    """Return encoder (evaluation mode, CPU, float32) and tokenizer. Raises InputError if one cannot be loaded or they do not fit."""
    if missing := missing_encoder(settings):
        raise InputError(f"{KEY}.checkpoint: {missing}")
    source = _source(settings)
    encoder = _from_config(settings) if source is None else _from_folder(source)
    tokenizer = _tokenizer(settings.tokenizer or str(source))
    if len(tokenizer) > encoder.config.vocab_size:
        raise InputError(f"{KEY}: the tokenizer has {len(tokenizer)} tokens, the encoder {encoder.config.vocab_size} (vocab_size)")
    return encoder.float().eval(), tokenizer


def tokens_of(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Tokens:
    """Return the token ids of each text in lower case, at most `max_tokens`; an empty text has at least one token."""
    lowered = [text.lower() for text in texts]
    found = tokenizer(lowered, truncation=True, max_length=max_tokens)["input_ids"] if lowered else []
    empty = next((each for each in (tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) if each is not None), 0)
    return [list(ids) or [empty] for ids in found]


def padded(tokens: Tokens, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) int64, padded with `pad`, and their mask (B, T) int64, 1 for tokens."""
    longest = max(map(len, tokens))
    ids = torch.tensor([[*each, *[pad] * (longest - len(each))] for each in tokens])
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in tokens])
    return ids, mask


def most_tokens(encoder: Any) -> int | None:
    """Return how many tokens an encoder has positions for; None if there is no limit. RoBERTa counts positions from behind its padding."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    offset = encoder.config.pad_token_id + 1 if "roberta" in encoder.config.model_type and encoder.config.pad_token_id else 0
    return positions - offset


def _source(settings: TextEncoderSettings) -> Path | None:
    if settings.checkpoint is None:
        return None
    folder = Path(settings.checkpoint).expanduser()
    return folder if folder.is_dir() else cached_encoder(settings)


def _from_config(settings: TextEncoderSettings) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel

    values = {key: value for key, value in settings.config.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(settings.config["model_type"], **values)
        unknown = sorted(set(values) - set(type(config)().to_dict()))
        if unknown:
            raise InputError(f"{KEY}.config.{unknown[0]}: no such key of {settings.config['model_type']}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.init_seed)
            return AutoModel.from_config(config)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        if is_memory_error(error):
            raise
        raise InputError(f"{KEY}.config: {first_line(error.__cause__ or error)}") from error


def _from_folder(folder: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModel

    with quiet_transformers():
        try:
            model, report = AutoModel.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, SafetensorError) as error:
            raise_storage_error(error)
            if is_memory_error(error):
                raise
            raise InputError(f"{folder}: cannot be loaded as a text encoder: {first_line(error)}") from error
    missing = [key for key in report["missing_keys"] if not key.startswith(UNUSED)]
    if problems := key_problems(folder, {"missing": missing}, "the checkpoint does not fit this encoder"):
        raise InputError(problems)
    return model


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_storage_error(error)
        raise InputError(f"{folder}: no tokenizer that can be read: {first_line(error)}") from error
