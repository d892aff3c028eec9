"""The command line as a user runs it: another process, from the repository's folder."""

from __future__ import annotations

import json
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

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command; its output is captured, its exit code is for the caller to look at. The time-out is that of the test."""
        command = [*self.program, str(ROOT / "launch.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=ROOT, check=False)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin one command in a process group of its own, to be interrupted."""
        command = [*self.program, str(ROOT / "launch.py"), *arguments]
        begun = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment, cwd=ROOT, start_new_session=True
        )
        BEGUN.append(begun)
        return begun


BEGUN: list[subprocess.Popen[str]] = []  # by `CommandLine.start`, until the end of the test


def end_what_was_begun() -> None:
    """Kill the commands that a test, possibly a failed one, has left running; their workers end with them."""
    for process in BEGUN:
        if process.poll() is None:
            process.kill()
            process.wait()
    BEGUN.clear()


FORKS = """
import contextlib, io, json, os, sys, tempfile
import launch
for command in ("grid", "sweep", "status", "explain", "collect", "doctor"):  # imports what they need before their first error
    sys.argv = ["launch.py", command, "demo", *(["--cluster", "cloud"] if command == "doctor" else ["vft/1/0", "seed=3"])]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        launch.main()
for line in sys.stdin:
    request = json.loads(line)
    files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        for number, file in enumerate((open(os.devnull), *files)):
            os.dup2(file.fileno(), number)
        os.environ.update(request["environment"])
        sys.argv = ["launch.py", *request["arguments"]]
        code = 1
        try:
            code = launch.main()
        except SystemExit as ending:
            code = ending.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    written = []
    for file in files:
        file.seek(0)
        written.append(file.read().decode())
    print(json.dumps([code, *written]), flush=True)
"""


class Forks:
    """Runs commands in forks of one interpreter that has imported `launch.py`: for many cases that differ in their arguments only."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._environment = {**os.environ, "COLUMNS": "200", **variables}
        self._process: subprocess.Popen[str] | None = None  # the interpreter

    def __call__(self, line: CommandLine, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command with the folders of `line`. A call that is aborted ends the interpreter: the next one would read its answer."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment, cwd=ROOT
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        folders = {name: line.environment[name] for name in ("SER_GRID_DATA", "SER_GRID_RESULTS")}
        try:
            self._process.stdin.write(json.dumps({"arguments": arguments, "environment": folders}) + "\n")
            self._process.stdin.flush()
            code, output, errors = json.loads(self._process.stdout.readline())
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._process = None
            raise
        return subprocess.CompletedProcess(arguments, code, output, errors)

    def close(self) -> None:
        """End the interpreter."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
