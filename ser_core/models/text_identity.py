"""Identity of a text encoder and its tokenizer as JSON values, part of a stage's key; what is missing of them. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ser_core.errors import InputError
from ser_core.models.hub import CACHED_MODEL, cache_folder, is_commit
from ser_core.models.identity import SHOWN_DIGEST, checkpoint_folder, file_digest, folder_identity, weight_files
from ser_core.settings.text import TextEncoderSettings

KEY = "recipe.text.encoder"
# Files of the tokenizers of transformers: fast ones, WordPiece, byte pair encoding, SentencePiece.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json"),
)


def text_identity(settings: TextEncoderSettings) -> dict[str, Any]:
    """Identity of encoder and tokenizer: hub name and commit, digests of a folder, or configuration and seed; digests of the tokenizer.

    Raises InputError for a folder without weights or tokenizer, a hub name without a commit, and neither checkpoint nor configuration.
    """
    tokenizer = None if settings.tokenizer is None else tokenizer_identity(Path(settings.tokenizer).expanduser())
    own = {} if tokenizer is None else {"tokenizer": tokenizer}
    if settings.checkpoint is None:
        if "model_type" not in settings.config:
            raise InputError(f"{KEY}: neither checkpoint nor config with a model_type is set; name a folder, or the keys of a small model")
        if tokenizer is None:
            raise InputError(f"{KEY}.tokenizer: not set; an encoder with random weights needs the folder of a tokenizer")
        return {"config": dict(settings.config), "init_seed": settings.init_seed, **own}
    folder = checkpoint_folder(settings.checkpoint, f"{KEY}.checkpoint")
    if folder is not None:
        return {**folder_identity(folder), "tokenizer": tokenizer or tokenizer_identity(folder)}
    if not is_commit(settings.revision):
        raise InputError(
            f"{KEY}.revision={settings.revision}: name the commit of {settings.checkpoint} (40 hexadecimal digits), "
            "since a branch may have other weights tomorrow"
        )
    return {"checkpoint": settings.checkpoint, "revision": settings.revision, **own}


def tokenizer_identity(folder: Path) -> dict[str, str]:
    """File name -> digest of a tokenizer's files. Raises InputError for a folder without any."""
    found = {name: file_digest(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not found:
        raise InputError(f"{folder}: no tokenizer here (tokenizer.json or vocab.txt); {KEY}.tokenizer names a folder with one")
    return found


def text_origin(settings: TextEncoderSettings) -> str:
    """Describe where the weights come from, for tables. Raises InputError as `text_identity`."""
    if settings.checkpoint is None:
        return f"text encoder {settings.config.get('model_type')} with random weights (seed {settings.init_seed})"
    folder = checkpoint_folder(settings.checkpoint, f"{KEY}.checkpoint")
    if folder is None:
        return f"text encoder {settings.checkpoint}, revision {settings.revision}"
    digests = " ".join(file_digest(path)[:SHOWN_DIGEST] for path in weight_files(folder))
    return f"text encoder from the local folder {folder.name}, sha256 {digests}"


def cached_encoder(settings: TextEncoderSettings) -> Path:
    """The folder of a Hugging Face name's commit in the local cache, whether it is there or not."""
    model = f"{CACHED_MODEL}{(settings.checkpoint or '').replace('/', '--')}"
    return cache_folder() / model / "snapshots" / (settings.revision or "none")


def missing_encoder(settings: TextEncoderSettings) -> str:
    """Return the line for an encoder that is not in the local cache; "" for one that is, and for a folder or a configuration."""
    if settings.checkpoint is None or checkpoint_folder(settings.checkpoint, f"{KEY}.checkpoint") is not None:
        return ""
    if cached_encoder(settings).is_dir():
        return ""
    command = f"hf download {settings.checkpoint} --revision {settings.revision}"
    return f"{settings.checkpoint} is not in the cache of the Hugging Face hub ({cache_folder()}): run `{command}`"
