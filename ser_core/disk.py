"""Durable writes: fsync of folders, and write errors of safetensors as OSError with errno, like those of any other file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Context for writing `path` with safetensors: raise its errors (disk full, quota exceeded) as OSError with errno and path.

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
