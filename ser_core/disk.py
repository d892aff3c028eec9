"""What the disk refuses comes out as OSError with its number, whichever library was writing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Context for safetensors' writing of `path`: its own exception for a full disk or a quota names the error in its text only."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
