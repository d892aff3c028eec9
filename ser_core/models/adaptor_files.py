"""Trained adaptors and heads as files: kept with a run, loaded strictly, merged into the base model, exported for the library peft.

    FOLDER/adaptors.safetensors   every trained tensor by its name in the classifier, the head included
    FOLDER/adaptors.json          the settings of the adaptors, the classes of the head, where the base weights come from

peft's format (`adapter_config.json`, `adapter_model.safetensors`) holds LoRA only; its names are those of peft 0.21.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ser_core.disk import os_errors
from ser_core.errors import InputError
from ser_core.models.adaptors import PROJECTIONS, AdaptedBlock, block_of, low_rank_of, projection_of
from ser_core.models.checkpoint_keys import key_problems

WEIGHTS_FILE = "adaptors.safetensors"
FACTS_FILE = "adaptors.json"
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"


def save_adaptors(model: nn.Module, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the trained parameters of a classifier, and `facts` (JSON values) about them; the same model gives the same bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: each.detach().cpu().contiguous() for name, each in model.named_parameters() if each.requires_grad}
    with os_errors(folder / WEIGHTS_FILE):
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / FACTS_FILE).write_text(json.dumps(dict(facts), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adaptors(model: nn.Module, folder: Path) -> None:
    """Load the trained parameters of a classifier with the same adaptors and classes, in place.

    Raises InputError, and changes nothing, if the file has not exactly the model's trained parameters.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    trained: dict[str, Tensor] = {name: each for name, each in model.named_parameters() if each.requires_grad}
    problems = key_problems(
        path,
        {
            "missing": set(trained) - set(state),
            "not in the model": set(state) - set(trained),
            "of another shape": {name for name in set(state) & set(trained) if state[name].shape != trained[name].shape},
        },
        "these are adaptors of another model",
    )
    if problems:
        raise InputError(problems)
    for name, parameter in trained.items():
        parameter.data.copy_(state[name])


def merge(encoder: Any) -> None:
    """Add LoRA to the weights of an encoder (such as `Wav2Vec2Model`), in place, so that it is a plain model of transformers.

    Raises InputError if it also has bottlenecks or gates, which no weight of the base model can hold.
    """
    if any(type(layer) is AdaptedBlock for layer in encoder.encoder.layers):
        raise InputError("bottleneck and gate cannot be merged into the base model, only LoRA can")
    for layer in encoder.encoder.layers:
        for name in PROJECTIONS:
            projection = projection_of(layer, name)
            if low_rank_of(projection) is not None:
                parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)


def export_peft(encoder: Any, folder: Path, base: str, revision: str | None = None) -> None:
    """Write the LoRA of an encoder in peft's format, for `PeftModel.from_pretrained(Wav2Vec2Model.from_pretrained(base), folder)`.

    `base`: hub name (at `revision`) or folder of the base model. Raises InputError if the encoder has no LoRA.
    """
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for number, layer in enumerate(encoder.encoder.layers):
        for name in PROJECTIONS:
            low_rank = low_rank_of(projection_of(block_of(layer), name))
            if low_rank is None:
                continue
            part = "attention" if name.endswith("_proj") else "feed_forward"
            for letter, factor in (("A", low_rank.down), ("B", low_rank.up)):
                key = f"base_model.model.encoder.layers.{number}.{part}.{name}.lora_{letter}.weight"
                state[key] = factor.detach().cpu().contiguous()
            found[name] = low_rank
    if not found:
        raise InputError("no LoRA in this model: peft's format holds no other of our adaptors")
    first = next(iter(found.values()))
    rank = first.down.shape[0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": list(found),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with os_errors(folder / PEFT_WEIGHTS_FILE):
        save_file(state, folder / PEFT_WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / PEFT_CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
