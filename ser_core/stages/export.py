"""Export of a run that trained adaptors: LoRA in peft's format or merged into a plain model of transformers, and the head beside it.

FOLDER/adapter_config.json, adapter_model.safetensors   peft's format, or with `merged`
FOLDER/config.json, model.safetensors                   a model for `AutoModel.from_pretrained`
FOLDER/preprocessor_config.json                         sampling rate, and whether waves are normalised: of a model in this folder
FOLDER/head.safetensors, head.json                      classifier and weighted sum of layers; classes, pooling, adaptors
FOLDER/base/                                            the base model of peft's format, if no hub name or folder of the user is one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.disk import os_errors, raise_storage_error
from ser_core.errors import InputError
from ser_core.models.adaptor_files import FACTS_FILE, export_peft, load_adaptors, merge
from ser_core.models.backbone import load_encoder, save_encoder
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.hub import pinned_revision
from ser_core.models.identity import checkpoint_folder
from ser_core.models.kept_model import save_preprocessor
from ser_core.models.model_types import NORMALISE_KEY, has_layer_norm
from ser_core.preflight import export_problem
from ser_core.settings.finetune import FinetuneSettings
from ser_core.stages.context import parse_settings, planned_backbone
from ser_core.stages.export_whole import TrainAgain, export_whole
from ser_core.stages.finetune import ADAPTORS, adaptors_of, classifier_of

BASE = "base"  # folder of the base model in an export
HEAD_FILE = "head.safetensors"
HEAD_FACTS = "head.json"


def export_run(
    settings: Mapping[str, Any],
    runtime: Mapping[str, Any],
    upstream: Mapping[str, Path],
    output: Path,
    folder: Path,
    *,
    merged: bool,
    facts: Mapping[str, Any],
    train_again: TrainAgain,
    onnx: bool = False,
) -> tuple[str, ...]:
    """Write the export of a finished `finetune` stage into `folder`; returns lines on what is there and how it is loaded.

    `settings` and `runtime`: of the stage; `upstream`: role -> output of its upstream stages; `output`: its own. `facts`, `train_again` and
    `onnx`: for a run that trained the whole transformer. Raises InputError for adaptors that the format does not hold.
    """
    finetune = parse_settings(FinetuneSettings, settings["finetune"])
    adaptors = adaptors_of(finetune.adaptors)
    if adaptors is None:
        return export_whole(finetune, runtime, output, folder, merged=merged, facts=facts, train_again=train_again, onnx=onnx)
    if onnx:
        raise InputError("--onnx: this run trained adaptors; only a run that trained the whole transformer is exported to ONNX")
    source = planned_backbone(settings, runtime, upstream)
    encoder: Any = load_encoder(source)
    problem = export_problem(finetune.adaptors, encoder.config.model_type, merged=merged)
    if problem:
        raise InputError(f"not exported: {problem}")
    named, revision = _named_base(source)
    if not merged and not named:
        _save(encoder, folder / BASE)
    stated = adaptor_facts(output / ADAPTORS / FACTS_FILE)
    model = classifier_of(encoder, len(stated["classes"]) + len(stated["attributes"]["names"]), finetune, adaptors).eval()
    load_adaptors(model, output / ADAPTORS)
    kind = type(encoder).__name__
    if merged:
        merge(encoder)
        _save(encoder, folder)
        lines = (f"transformers, LoRA merged: {kind}.from_pretrained({str(folder)!r})",)
    else:
        base = named or str(folder / BASE)
        export_peft(encoder, folder, base, revision)
        at = "" if revision is None else f", revision={revision!r}"
        lines = (f"peft: PeftModel.from_pretrained({kind}.from_pretrained({base!r}{at}), {str(folder)!r})",)
    _save_head(model, folder, {**stated, "sampling_rate": SAMPLE_RATE})
    return (*lines, f"classifier: {folder / HEAD_FILE}, described in {folder / HEAD_FACTS}")


def _named_base(source: Any) -> tuple[str, str | None]:
    """Hub name and revision, or folder, of the base model; "" for random weights and for an encoder of an upstream stage."""
    if isinstance(source, Path) or source.checkpoint is None:
        return "", None
    folder = checkpoint_folder(source.checkpoint)
    return (source.checkpoint, pinned_revision(source)) if folder is None else (str(folder), None)


def _save(encoder: Any, folder: Path) -> None:
    save_encoder(encoder, folder)
    # As in the published checkpoints, models with a group norm get no attention mask.
    normalise = bool(getattr(encoder.config, NORMALISE_KEY, False))
    save_preprocessor(folder, normalise=normalise, attention_mask=has_layer_norm(encoder.config.to_dict()))


def _save_head(model: EmotionClassifier, folder: Path, facts: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    parts = {name: each for name, each in model.named_parameters() if not name.startswith("wav2vec2.")}
    with os_errors(folder / HEAD_FILE):
        save_file({name: each.detach().contiguous() for name, each in parts.items()}, folder / HEAD_FILE, metadata={"format": "pt"})
        (folder / HEAD_FACTS).write_text(json.dumps(dict(facts), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adaptor_facts(path: Path) -> dict[str, Any]:
    """The facts that fine-tuning wrote beside the weights of adaptors."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"attributes": {"names": []}, **found, "classes": list(found["classes"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_storage_error(error)
        raise InputError(f"{path}: cannot be read: {error}") from error
