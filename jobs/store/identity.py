"""The identity of a results folder: names of Slurm jobs are made of it, not of the folder's path, which machines may mount differently.

`results/id.json` is written by the first launch. Two paths with the same file are one folder, and share their jobs. A folder that was made
anew at the path of a removed one has another identity; so has a copy, recognised by the original, which is still at the path that the file
states.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.errors import UsageError
from jobs.store.layout import IDENTITY, shared_path
from jobs.store.records import DamagedRecordError, Decoder, create_json, write_json

SCHEMA = 1


@dataclass(frozen=True)
class _Identity:
    """`id.json`."""

    id: str
    path: str  # of the folder, by the name under which it was launched first

    def __post_init__(self) -> None:
        if not self.id or not self.path.startswith("/") or "\0" in self.path:
            raise ValueError("not the identity of a folder with an absolute path")


_RECORDS = Decoder(_Identity, SCHEMA)
_KNOWN: dict[Path, str] = {}  # folder -> identity that this process has read


def identity_of(root: Path) -> str:
    """The identity of a results folder; before its first launch its path without symbolic links. Read once per process.

    UsageError for a damaged record: under another identity the jobs in the queue would not be found, and would be submitted again.
    """
    if root not in _KNOWN:
        found = _recorded(root)
        if found is None:
            return os.path.realpath(root)
        _KNOWN[root] = f"{found.id} {os.path.realpath(root)}" if _is_copy(root, found) else found.id
    return _KNOWN[root]


def record_identity(root: Path) -> None:
    """Give a results folder an identity of its own, unless it has one: at a launch, before anything is submitted.

    A folder with submissions of a version without `id.json` keeps its path as its identity, as the names of those jobs are made of it.
    """
    root.mkdir(parents=True, exist_ok=True)
    found = _recorded(root)
    if found is not None and not _is_copy(root, found):
        return
    record = {"schema": SCHEMA, **asdict(_Identity(secrets.token_hex(8), str(shared_path(root))))}
    if found is not None:
        write_json(root / IDENTITY, record)
    else:
        earlier = any(next(root.glob(pattern), None) for pattern in ("*/submissions", "*/sweep/*/submissions"))
        create_json(root / IDENTITY, {**record, "id": os.path.realpath(root)} if earlier else record)
    _KNOWN.pop(root, None)


def _recorded(root: Path) -> _Identity | None:
    file = root / IDENTITY
    try:
        return _RECORDS.load(file)
    except DamagedRecordError as error:
        raise UsageError(f"{file}: damaged ({error}): delete it when squeue shows no job of an experiment of this folder") from error


def _is_copy(root: Path, found: _Identity) -> bool:
    """Whether the folder from which the file was copied is still at its path."""
    original = Path(found.path)
    if original == shared_path(root):
        return False
    known = _RECORDS.read(original / IDENTITY) if os.access(original / IDENTITY, os.R_OK) else None
    return known is not None and known.id == found.id and not (original / IDENTITY).samefile(root / IDENTITY)
