"""The command line as a user runs it: another process, from the repository's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class CommandLine:
    """Runs `launch.py` with its own folders for data and results."""

    data: Path
    results: Path
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment
    program: tuple[str, ...] = (sys.executable,)  # the interpreter, behind the command that makes it another user's

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SER_GRID_DATA": str(self.data), "SER_GRID_RESULTS": str(self.results), "COLUMNS": "200", **self.variables}

    def __call__(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run one command; its output is captured, its exit code is for the caller to look at."""
        command = [*self.program, str(ROOT / "launch.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment, cwd=ROOT, check=False)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin one command in a process group of its own, to be interrupted."""
        command = [*self.program, str(ROOT / "launch.py"), *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment, cwd=ROOT, start_new_session=True
        )
