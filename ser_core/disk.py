"""Errors of file systems: those of safetensors as OSError with errno, those that say nothing about a file; and fsync of folders."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Of a file system that is full, read-only, or whose server does not answer, and of resources that a node lacks for a while.
STORAGE_ERRORS = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EREMOTEIO),
        *(errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EAGAIN, errno.EMFILE, errno.ENFILE),
    )
)
_NUMBER = re.compile(r"\(os error (\d+)\)")


def raise_storage_error(error: BaseException) -> None:
    """Raise `error` again if a file system failed: the file is neither missing nor damaged, and the stage is retried later."""
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        raise error


def check_readable(path: Path) -> None:
    """Read a file to its end, for libraries whose errors have no errno; raises OSError if the file system fails."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        while stream.read(1 << 20):
            pass


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Context for reading or writing `path` with safetensors: raise its errors (disk full, quota exceeded) as OSError with errno and path.

    safetensors gives the number only in the text of its exception, "(os error 28)".
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that files created or renamed in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
