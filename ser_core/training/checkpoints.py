"""Checkpoints: folders of safetensors and JSON, written atomically and verified when read.

    FOLDER/step-000000700/
        model.safetensors, adam.safetensors, ...   one file for each group of tensors
        state.json                                 schema, identity, step, facts, sha256 of the other files

A checkpoint is written to a temporary folder, synced and renamed. `load` returns the newest one with correct digests and the stage's
identity; an incomplete or damaged one, or one of another stage, is skipped. The next save removes what a killed save left behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ser_core.disk import os_errors, raise_storage_error, sync_folder

SCHEMA = 2
KEPT = 2  # the newest, and one to fall back on
PREFIX = "step-"
STATE = "state.json"
SUFFIX = ".safetensors"

Groups = Mapping[str, Mapping[str, Tensor]]  # group -> name -> tensor


@dataclass(frozen=True)
class Saved:
    """A loaded checkpoint after `step` steps: CPU tensors by group and name, and JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def identity_of(value: object) -> str:
    """Return the identity of the stage that a checkpoint belongs to: sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one stage in one folder. Only one process may write; checkpoints of other stages are never loaded."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def save(self, step: int, tensors: Groups, facts: Mapping[str, Any]) -> None:
        """Write the state after `step` steps. Raises OSError if the disk is full; earlier checkpoints remain."""
        final = self.folder / f"{PREFIX}{step:09d}"
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{PREFIX}*.tmp"):  # left by a killed save; as large as a checkpoint
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            digests = {}
            for group, named in tensors.items():
                path = temporary / f"{group}{SUFFIX}"
                with os_errors(path):
                    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, path)
                digests[path.name] = _synced_digest(path)
            state = {"schema": SCHEMA, "identity": self.identity, "step": step, "facts": dict(facts), "files": digests}
            with (temporary / STATE).open("w", encoding="utf-8") as file:
                json.dump(state, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(temporary)
            if final.exists():  # damaged or of another stage, otherwise it would have been resumed from
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = self._found()
        later = [path for path in found if path.name > final.name]  # unusable, otherwise they would have been resumed from
        for path in [*later, *found[len(later) + KEPT :]]:
            shutil.rmtree(path, ignore_errors=True)

    def load(self) -> Saved | None:
        """Return the newest intact checkpoint with this identity, or None."""
        for path in self._found():
            saved = self._read(path)
            if saved is not None:
                return saved
        return None

    def _found(self) -> list[Path]:
        return sorted((path for path in self.folder.glob(f"{PREFIX}*") if path.is_dir()), reverse=True)

    def _read(self, path: Path) -> Saved | None:
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state["schema"] != SCHEMA or state["identity"] != self.identity:
                return None
            tensors = {}
            for name, digest in state["files"].items():
                if _digest(path / name) != digest:
                    return None
                # Copied out of the memory map: the verified bytes are used, and the file may be removed later.
                tensors[name.removesuffix(SUFFIX)] = {key: tensor.clone() for key, tensor in load_file(path / name).items()}
            return Saved(int(state["step"]), tensors, dict(state["facts"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise_storage_error(error)
            return None  # damaged in whatever way: the previous checkpoint is tried


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced_digest(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
