"""Atomic creation of a folder: it is filled under a hidden name beside the target and then renamed."""

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
    """Context with exclusive use of the staging folder, created if missing. The kernel releases the lock if the process dies.

    Raises InputError if another process uses it, or if the parent folder cannot be written.
    """
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{staging.parent}: cannot be written ({error.strerror}); name another target") from error
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        # The previous owner of the lock may have renamed the folder meanwhile.
        if not _lock(descriptor) or not staging.is_dir() or not os.path.samestat(os.fstat(descriptor), staging.stat()):
            raise InputError(f"{staging}: another process is preparing the same target; wait for it")
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock was acquired, or locks are not supported: NFS may refuse to lock folders; two processes then repeat the work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def replace_folder(staging: Path, home: Path) -> None:
    """Replace `home` by the finished folder. Between the two renames `home` is missing; it is never incomplete."""
    old = home.with_name(f".{home.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if home.exists():
        home.rename(old)
    staging.rename(home)
    shutil.rmtree(old, ignore_errors=True)
