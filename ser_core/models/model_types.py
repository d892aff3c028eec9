"""The kinds of pretrained models that can be a backbone, by transformers' `model_type`, and which methods are defined for each.

Does not import torch or transformers: planning asks for the kind of a backbone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ser_core.models.checkpoint_keys import unknown_key
from ser_core.models.hub import CACHED_MODEL, cache_folder, cached_commit, is_commit, pinned_revision
from ser_core.settings.backbone import BackboneSettings, Normalise

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

# Key of the saved configuration: whether the model expects waves normalised to zero mean and unit variance.
NORMALISE_KEY = "normalise_waves"

WAV2VEC2 = "wav2vec2"

ON_PRETRAINING_LOSS = ("tapt", "pretraining_loss")  # methods that compute the model's own pretraining loss


@dataclass(frozen=True)
class ModelType:
    """One kind of model."""

    label: str
    model: str  # class in transformers, with its configuration class
    config: str
    pretraining_loss: bool = False  # transformers has the model's own pretraining loss
    eager: bool = False  # transformers computes its attention in eager mode only
    # Padded seconds of audio per micro-batch, as a share of AUTO_PART_SECONDS. WavLM keeps an attention bias (rows x heads, T, T) of every
    # layer for the backward pass: for 36 s in rows of 10 s and 12 heads 43 MB a tensor, several tensors a layer.
    part_share: float = 1.0


MODEL_TYPES: Mapping[str, ModelType] = {
    WAV2VEC2: ModelType("wav2vec 2.0", "Wav2Vec2Model", "Wav2Vec2Config", pretraining_loss=True),
    "hubert": ModelType("HuBERT", "HubertModel", "HubertConfig"),
    "wavlm": ModelType("WavLM", "WavLMModel", "WavLMConfig", eager=True, part_share=0.5),
    "data2vec-audio": ModelType("data2vec", "Data2VecAudioModel", "Data2VecAudioConfig"),
}


def model_type_of(settings: BackboneSettings) -> str | None:
    """Return transformers' `model_type` of a backbone; None for a hub model whose configuration is not in the local cache."""
    if settings.checkpoint is None:
        return str(settings.config.get("model_type", WAV2VEC2))
    values = stored_config(settings)
    return None if values is None else str(values.get("model_type", ""))


def stored_config(settings: BackboneSettings) -> Mapping[str, Any] | None:
    """Return the configuration of a checkpoint: of its folder, or of the hub's local cache; None where there is none that can be read."""
    name = settings.checkpoint or ""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        revision = pinned_revision(settings)
        commit = revision if is_commit(revision) else cached_commit(name, revision)
        folder = cache_folder() / f"{CACHED_MODEL}{name.replace('/', '--')}" / "snapshots" / (commit or "none")
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, Mapping) else None


def label_of(settings: BackboneSettings) -> str:
    """Return the name of the kind of a backbone; "" if it is not known."""
    found = model_type_of(settings)
    if found is None and WAV2VEC2 in (settings.checkpoint or ""):
        found = WAV2VEC2
    kind = MODEL_TYPES.get(found or "")
    return "" if kind is None else kind.label


def type_problem(source: str, model_type: str) -> str:
    """Return the line for a kind of model that cannot be a backbone; "" for one that can."""
    if model_type in MODEL_TYPES:
        return ""
    return f"{source}: model_type={model_type or 'missing'}: no such backbone; known are {', '.join(MODEL_TYPES)}"


def method_problem(method: str, model_type: str) -> str:
    """Return the line for a method that is not defined for a kind of model; "" if it is."""
    kind = MODEL_TYPES.get(model_type)
    if kind is None or kind.pretraining_loss or method not in ON_PRETRAINING_LOSS:
        return ""
    able = ", ".join(each.label for each in MODEL_TYPES.values() if each.pretraining_loss)
    return (
        f"method {method}: not defined for {kind.label}, it needs the model's pretraining loss, which transformers has for {able} only; "
        f"leave out {', '.join(ON_PRETRAINING_LOSS)}"
    )


def backbone_problems(settings: BackboneSettings) -> Iterator[str]:
    """Yield one line per reason why a configured checkpoint cannot be used, as far as its configuration can be read here."""
    values = stored_config(settings)
    if values is None:
        return
    source = f"recipe.backbone.checkpoint={settings.checkpoint}"
    if problem := type_problem(source, str(values.get("model_type", ""))):
        yield problem
    elif values.get("conv_pos_batch_norm"):
        yield f"{source}: {BATCH_NORM}"
    elif (
        settings.normalise is Normalise.auto
        and Path(settings.checkpoint or "").expanduser().is_dir()
        and has_layer_norm(values)
        and NORMALISE_KEY not in values
        and not (Path(settings.checkpoint or "").expanduser() / PREPROCESSOR_FILE).is_file()
    ):
        yield missing_preprocessor(settings.checkpoint or "")


BATCH_NORM = (
    "has a batch norm before its positional convolution (conv_pos_batch_norm), through which padding reaches an utterance; "
    "a checkpoint without it is needed"
)


def has_layer_norm(config: Mapping[str, Any]) -> bool:
    """Whether the convolutions of a configuration have layer norms; those of data2vec have no key and always have."""
    return bool(config.get("feat_extract_norm", "layer" if config.get("model_type") == "data2vec-audio" else "group") == "layer")


def missing_preprocessor(folder: str | Path) -> str:
    """Return the line for a folder that does not state whether waves are normalised."""
    return (
        f"{folder}: {PREPROCESSOR_FILE} is missing; it states whether waves are normalised: copy it from the model's page, or set "
        "recipe.backbone.normalise=always or never"
    )


def unknown_keys(config: Mapping[str, Any], known: set[str], section: str) -> Iterator[str]:
    """Yield one line per key of a configuration that transformers' class for its `model_type` does not have; `known`: keys not to check."""
    others = set(config) - known - {"model_type"}
    kind = MODEL_TYPES.get(str(config.get("model_type", WAV2VEC2)))
    if others and kind is not None:
        import transformers

        names = getattr(transformers, kind.config)().to_dict()
        yield from (unknown_key(section, key, names) for key in sorted(others - set(names)))
