"""The library that is preloaded into the Python processes of jobs (injection.c), and the text files that configure it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.chaos.scene import boot_seconds


def build(folder: Path, root: Path) -> Mapping[str, str]:
    """Compile the library into a folder; the variables of processes that load it. Calls below `root` can fail."""
    library = folder / "injection.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    subprocess.run(
        [compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("injection.c")), "-ldl"], check=True
    )
    return {"LD_PRELOAD": str(library), "CHAOS_CONTROL": str(folder), "CHAOS_ROOT": str(root)}


def set_error(control: Path, target: str, error: int, permille: int, seconds: float) -> None:
    """Let calls of a target (`job-ID`, `node-NAME`) fail for some seconds, `permille` of a thousand."""
    _write(control / target, f"{error} {permille}", seconds)


def set_clock(control: Path, node: str, offset: float, seconds: float) -> None:
    """Let the clock of a node be wrong by `offset` seconds, for some seconds."""
    _write(control / f"clock-{node}", f"{offset:.0f} 0", seconds)


def _write(path: Path, text: str, seconds: float) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(f"{text} {boot_seconds() + seconds:.3f}\n")
    temporary.replace(path)
