"""Which pretrained weights a method needs, and where they are: for checks before a launch. Does not import torch, opens no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ser_core.errors import InputError
from ser_core.models.hub import CACHED_MODEL, cache_folder, cached_commit, is_commit
from ser_core.models.identity import MISSING_WAV2VEC, checkpoint_folder
from ser_core.models.text_identity import KEY as TEXT_ENCODER
from ser_core.models.text_identity import cached_encoder, missing_encoder
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.recipe import Recipe
from ser_core.settings.text import TextEncoderSettings


@dataclass(frozen=True)
class NeededWeights:
    """One checkpoint: its key in the configuration, its file or folder here, and why it cannot be used or is not there."""

    key: str
    path: str = ""  # absolute; "": not here
    missing: str = ""  # with what to do
    downloadable: bool = False  # a stage downloads it if its node has network


def needed_weights(method: str, recipe: Recipe) -> list[NeededWeights]:
    """Return the checkpoints of a method; models with random weights need none."""
    if method in ("score", "concat", "cross"):
        return [*needed_weights(recipe.fusion.audio.name, recipe), *needed_weights("text", recipe)]
    if method == "text":
        return [_text_encoder(recipe.text.encoder)] if recipe.text.encoder.checkpoint is not None else []
    found = [_backbone(recipe.backbone)] if recipe.backbone.checkpoint is not None else []
    if method == "ptapt" and recipe.states.wav2vec.checkpoint is not None:
        key, path = "recipe.states.wav2vec.checkpoint", Path(recipe.states.wav2vec.checkpoint).expanduser().absolute()
        found.append(NeededWeights(key, str(path)) if path.exists() else NeededWeights(key, missing=f"{path}: {MISSING_WAV2VEC}"))
    return found


def _backbone(settings: BackboneSettings) -> NeededWeights:
    key, name = "recipe.backbone.checkpoint", settings.checkpoint or ""
    try:
        folder = checkpoint_folder(name)
    except InputError as error:
        return NeededWeights(key, missing=str(error))
    if folder is not None:
        return NeededWeights(key, str(folder.absolute()))
    model = cache_folder() / f"{CACHED_MODEL}{name.replace('/', '--')}"
    commit = settings.revision if is_commit(settings.revision) else cached_commit(name, settings.revision)
    if commit and (model / "snapshots" / commit).is_dir():
        return NeededWeights(key, str(model / "snapshots" / commit))
    revision = f" --revision {settings.revision}" if settings.revision else ""
    missing = f"{name} is not in the cache of the Hugging Face hub ({cache_folder()}): run `hf download {name}{revision}`"
    return NeededWeights(key, missing=missing, downloadable=True)


def _text_encoder(settings: TextEncoderSettings) -> NeededWeights:
    key = f"{TEXT_ENCODER}.checkpoint"
    try:
        folder, missing = checkpoint_folder(settings.checkpoint or "", key), missing_encoder(settings)
    except InputError as error:
        return NeededWeights(key, missing=str(error))
    return NeededWeights(key, missing=missing) if missing else NeededWeights(key, str((folder or cached_encoder(settings)).absolute()))
