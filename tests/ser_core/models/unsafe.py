"""An object whose pickle runs code when it is loaded, as a checkpoint from elsewhere may hold one."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class RunsCode:
    """Its pickle makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)
