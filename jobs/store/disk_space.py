"""Errors of a disk that is full, or of a quota: each names the file, or the folder whose disk is full.

The system gives no file name with an error of `write` or `fsync`; "No space left on device" alone does not tell which of several disks.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
LEAST = 1 << 20  # bytes; a disk with less is full for what stages write


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context for writing `path`: an OSError of a full disk gets its name."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.filename = str(path)
        raise


def name_full_disk(error: BaseException, folder: Path) -> None:
    """Give an error of a full disk without a file name that of `folder`, if the disk of that folder is full or has a quota."""
    nameless = isinstance(error, OSError) and error.errno in FULL and error.filename is None
    if isinstance(error, OSError) and nameless and (error.errno == errno.EDQUOT or is_full(folder)):
        error.filename = str(folder)


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no room for another file: bytes or inodes. Of a missing folder that of its parent."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    facts = os.statvfs(there)
    return facts.f_bavail * facts.f_frsize < LEAST or (facts.f_files > 0 and facts.f_favail == 0)
