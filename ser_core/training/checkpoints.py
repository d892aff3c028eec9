"""Checkpoints: folders of safetensors and JSON, written atomically and verified when read.

    FOLDER/step-000000700/
        model.safetensors, adam.safetensors, ...   one file for each group of tensors
        state.json                                 schema, identity, step, facts, sha256 of the other files

A checkpoint is written to a temporary folder, synced and renamed. `load` returns the newest one with correct digests and the stage's
identity; an incomplete or damaged one, or one of another stage, is skipped. The next save removes what a killed save left behind.

An attempt whose node was cut off may still run while a later attempt uses the same folder. So every file carries the number of its attempt,
only those of the own and of earlier attempts are removed, and an attempt that a later one has superseded writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ser_core.disk import os_errors, raise_storage_error, sync_folder
from ser_core.errors import Interrupted

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
    """The checkpoints of one stage in one folder. Only one process of an attempt may write; those of other stages are never loaded.

    `attempt`: number of the execution of the stage (0: there is only one). `superseded`: whether a later one has begun.
    """

    def __init__(self, folder: Path, identity: str, attempt: int = 0, superseded: Callable[[], bool] = lambda: False) -> None:
        self.folder = folder
        self.identity = identity
        self.attempt = attempt
        self.superseded = superseded

    def save(self, step: int, tensors: Groups, facts: Mapping[str, Any]) -> None:
        """Write the state after `step` steps. Raises OSError if the disk is full; earlier checkpoints remain.

        Raises Interrupted, and writes nothing, if a later attempt of the stage has begun.
        """
        self._require_newest()
        final = self.folder / f"{PREFIX}{step:09d}"
        temporary = self.folder / f".{final.name}.{self.attempt}.{os.getpid()}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{PREFIX}*.tmp"):  # left by a killed save; as large as a checkpoint
            if _attempt_of_temporary(left.name) <= self.attempt:
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            digests = {}
            for group, named in tensors.items():
                path = temporary / f"{group}{SUFFIX}"
                with os_errors(path):
                    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, path)
                digests[path.name] = _synced_digest(path)
            state = {"schema": SCHEMA, "identity": self.identity, "attempt": self.attempt, "step": step, "facts": dict(facts)}
            state["files"] = digests
            with (temporary / STATE).open("w", encoding="utf-8") as file:
                json.dump(state, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(temporary)
            self._require_newest()  # writing has taken a while
            if final.exists():  # damaged, of another stage or of a superseded attempt, otherwise it would have been resumed from
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = self._found()
        # Unusable or of a superseded attempt, otherwise they would have been resumed from
        later = [path for path in found if path.name > final.name]
        for path in [*later, *found[len(later) + KEPT :]]:
            if _attempt_of(path) <= self.attempt:
                shutil.rmtree(path, ignore_errors=True)

    def _require_newest(self) -> None:
        if self.superseded():
            raise Interrupted(f"a later attempt than {self.attempt} has begun and owns the checkpoints: no checkpoint was written")

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


def _attempt_of_temporary(name: str) -> int:
    """Number of the attempt in `.step-STEP.ATTEMPT.PID.tmp`; 0 for a name of earlier versions, which lacks it."""
    parts = name.split(".")
    return int(parts[2]) if len(parts) == 5 and parts[2].isdecimal() else 0


def _attempt_of(path: Path) -> int:
    """Number of the attempt that wrote a checkpoint; 0 if it is damaged or of an earlier version."""
    try:
        return int(json.loads((path / STATE).read_text(encoding="utf-8"))["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced_digest(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
