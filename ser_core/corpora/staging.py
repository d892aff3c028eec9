"""A folder that appears whole or not at all: it is filled under a hidden name beside its place, then takes that place by a rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ser_core.errors import InputError


@contextmanager
def locked(staging: Path) -> Iterator[None]:
    """The staging folder, made where there is none, for one process at a time; the kernel lets go of the lock when the process dies.

    Raises InputError where another process holds it, or where the parent folder cannot be written.
    """
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{staging.parent}: cannot be written ({error.strerror}); name another target") from error
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        # Whoever held the lock before may have finished and renamed the folder.
        if not _lock(descriptor) or not staging.is_dir() or not os.path.samestat(os.fstat(descriptor), staging.stat()):
            raise InputError(f"{staging}: another process is at work on the same target; wait for it")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours, or there is none to be had: NFS may refuse to lock folders, and two at once only repeat their work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def put_in_place(staging: Path, home: Path) -> None:
    """Let the finished folder take the place `home`. Between the two renames there is nothing at all, never something half done."""
    old = home.with_name(f".{home.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if home.exists():
        home.rename(old)
    staging.rename(home)
    shutil.rmtree(old, ignore_errors=True)
