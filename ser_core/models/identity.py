"""Identity of initial weights as JSON values, part of a stage's key. Computed without torch, so that planning stays fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ser_core.disk import raise_storage_error
from ser_core.errors import InputError
from ser_core.models.hub import CACHED_MODEL, cache_folder, cached_commit, is_commit, pinned_revision, reference
from ser_core.models.model_types import CONFIG_FILE, WAV2VEC2, label_of
from ser_core.settings.backbone import BackboneSettings, Normalise, Wav2vecSettings

WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")

SHOWN_DIGEST = 12  # characters

NO_BACKBONE = "recipe.backbone: neither checkpoint nor config is set; name a checkpoint or give the keys of a small model"
NO_WAV2VEC = "recipe.states.wav2vec: neither checkpoint nor config is set; give the path of wav2vec_large.pt, or the keys of a small model"
MISSING_WAV2VEC = "no such wav2vec checkpoint; set recipe.states.wav2vec.checkpoint to the path of wav2vec_large.pt"

# Keys of config.json that do not affect the network.
VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})


def backbone_identity(settings: BackboneSettings) -> dict[str, Any]:
    """Identity of the backbone: hub name and revision, digests of a folder, or configuration and seed; `normalise` unless it is `auto`.

    Raises InputError for a missing path or a folder without weights.
    """
    waves = {} if settings.normalise is Normalise.auto else {"normalise": settings.normalise.name}
    if settings.checkpoint is None:
        if not settings.config:
            raise InputError(NO_BACKBONE)
        # wav2vec 2.0 is the default kind of model: named or not, the weights are the same.
        config = {key: value for key, value in settings.config.items() if (key, value) != ("model_type", WAV2VEC2)}
        return {"config": config, "init_seed": settings.init_seed, **waves}
    folder = checkpoint_folder(settings.checkpoint)
    if folder is None:
        return {"checkpoint": settings.checkpoint, "revision": settings.revision, **waves}
    return {**folder_identity(folder), **waves}


def backbone_origin(settings: BackboneSettings) -> str:
    """Describe where the weights come from: kind, name and revision, or a folder's digest. Raises as `backbone_identity`.

    The hub's cache keeps each revision in `models--OWNER--NAME/snapshots/COMMIT`; the revision of any other folder is not known.
    """
    return f"{label_of(settings)} {_origin(settings)}".strip()


def _origin(settings: BackboneSettings) -> str:
    waves = "" if settings.normalise is Normalise.auto else f", waves {settings.normalise.name} normalised"
    if settings.checkpoint is None:
        return f"with random weights (seed {settings.init_seed}){waves}"
    pinned = settings.revision
    folder = checkpoint_folder(settings.checkpoint)
    if folder is None:
        pinned = pinned_revision(settings)
        return f"{settings.checkpoint}, {f'revision {pinned}' if pinned else 'no revision pinned'}{waves}"
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(CACHED_MODEL):
        name, revision = folder.parent.parent.name.removeprefix(CACHED_MODEL).replace("--", "/", 1), folder.name
        other = f", not {pinned} as configured" if pinned not in (None, revision) else ""
        return f"{name}, revision {revision}{other}{waves}"
    unknown = f" (not known whether revision {pinned})" if pinned else ""
    return f"from the local folder {folder.name}, sha256 {_digests(weight_files(folder))}{unknown}{waves}"


def pin_commit(settings: BackboneSettings, former: Mapping[str, str]) -> str:
    """Set the commit of a hub name in `settings.commits`: that of a former launch (`former`), else the one in the local cache.

    Returns a line for the user: that the cache has another commit now, or that no commit is known, so that nodes may load different
    weights; "" if there is nothing to say. Nothing is set for a folder, a configuration, or a revision that is a commit.
    """
    if settings.checkpoint is None or is_commit(settings.revision) or checkpoint_folder(settings.checkpoint) is not None:
        return ""
    name, key = settings.checkpoint, reference(settings)
    found, before = cached_commit(name, settings.revision), settings.commits.get(key) or former.get(key, "")
    if before or found:
        settings.commits[key] = before or found
    if before and found not in ("", before):
        return (
            f"backbone {key}: continues with commit {before} of the last launch; the cache has {found} now, "
            f"and recipe.backbone.revision={found} computes with it"
        )
    if before or found:
        return ""
    return (
        f"backbone {key}: not in the local cache ({cache_folder()}), so its commit is not known: nodes may load different weights; "
        "set recipe.backbone.revision to a commit"
    )


def wav2vec_origin(settings: Wav2vecSettings) -> str:
    """Describe where the weights of wav2vec v1 come from: file name and digest. Raises InputError as `wav2vec_identity`."""
    if settings.checkpoint is None:
        return f"wav2vec v1 with random weights (seed {settings.init_seed})"
    path = Path(settings.checkpoint).expanduser()
    return f"wav2vec v1 {path.name}, sha256 {_digests(weight_files(path) if path.is_dir() else [path])}"


def wav2vec_identity(settings: Wav2vecSettings) -> dict[str, Any]:
    """Identity of the wav2vec v1 weights: digest of a checkpoint, or configuration and seed. Raises InputError for a missing path."""
    if settings.checkpoint is None:
        if not settings.config:
            raise InputError(NO_WAV2VEC)
        return {"config": dict(settings.config), "init_seed": settings.init_seed}
    path = Path(settings.checkpoint).expanduser()
    if path.is_dir():
        return folder_identity(path)
    if not path.is_file():
        raise InputError(f"{path}: {MISSING_WAV2VEC}")
    return {"weights": file_digest(path)}


def checkpoint_folder(checkpoint: str, key: str = "recipe.backbone.checkpoint") -> Path | None:
    """Return `checkpoint`, the value of `key`, as a folder, or None if it is a Hugging Face name. Raises InputError for a missing path."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") > 1 or path.exists():
        raise InputError(f"{checkpoint}: no such {key.split('.')[-2]} folder; {key} is a Hugging Face name or a folder with {CONFIG_FILE}")
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of `folder`: safetensors if there are any, otherwise torch's."""
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def folder_identity(folder: Path) -> dict[str, Any]:
    """Identity of a checkpoint folder: digests of its weight files, and its configuration without VOLATILE_CONFIG_KEYS."""
    files = weight_files(folder)
    config = folder / CONFIG_FILE
    if not files or not config.is_file():
        raise InputError(f"{folder}: not a checkpoint: needs {CONFIG_FILE} and model.safetensors (or pytorch_model.bin)")
    try:
        settings = json.loads(config.read_text())
    except (ValueError, OSError) as error:
        raise_storage_error(error)
        raise InputError(f"{config}: cannot be read: {error}") from error
    kept = {key: value for key, value in settings.items() if key not in VOLATILE_CONFIG_KEYS}
    return {"weights": [file_digest(path) for path in files], "config": kept}


def _digests(files: list[Path]) -> str:
    return " ".join(file_digest(path)[:SHOWN_DIGEST] for path in files)


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file; cached in the process for the same path, size and mtime."""
    facts = path.stat()
    return _digest(path.resolve(), facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
