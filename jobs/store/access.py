"""Folders of the store that this user may not read or write: who owns them, and a check at launch, before anything is submitted."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from jobs.errors import UsageError
from jobs.store.layout import Layout


def denied_line(error: PermissionError) -> str:
    """What was denied, in one line with path, owner and mode: of the first folder on the way that cannot be searched, else of the path."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return str(error)
    path = Path(os.fsdecode(error.filename)).absolute()
    closed = next((each for each in reversed(path.parents) if not os.access(each, os.X_OK, effective_ids=True)), path)
    return _line(closed if closed != path or path.exists() else path.parent)


def check_store(layout: Layout, stages: Iterable[tuple[str, str]]) -> None:
    """Test that these stages can be read and written. UsageError that names path and owner if not; OSError for a failing disk.

    `stages`: name and key of each. A finished one must be readable, any other one writable.
    """
    store = layout.stage("_", "_").path.parents[1]
    names: dict[str, list[str]] = {}
    for stage, key in stages:
        names.setdefault(stage, []).append(key)
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store) as probe:
            probe.write(b"1")
        for stage, keys in names.items():
            folder = layout.stage(stage, "_").path.parent
            if not folder.is_dir():
                continue
            _require(folder, os.R_OK | os.W_OK | os.X_OK)
            present = set(os.listdir(folder))
            for key in filter(present.__contains__, keys):
                found = layout.stage(stage, key)
                _require(found.path, os.R_OK | os.X_OK)
                _require(*((found.result, os.R_OK) if found.result.exists() else (found.path, os.W_OK)))
    except PermissionError as error:
        raise UsageError(denied_line(error)) from error


def _require(path: Path, mode: int) -> None:
    if not os.access(path, mode, effective_ids=True):
        raise UsageError(_line(path))


def _line(path: Path) -> str:
    status = path.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    return (
        f"{path}: permission denied (owner {owner}, mode {stat.filemode(status.st_mode)}): "
        f"ask {owner} for access, or choose another folder with --results"
    )
