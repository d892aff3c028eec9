"""A shell in a terminal (tmux): commands are typed, keys are pressed, and the screen is read as a user sees it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROMPT = "$ "
LONGEST_WAIT = 300.0  # seconds
LONGEST_LIFE = "1800"  # seconds of the shell, which ends too where this process is killed


class TerminalError(Exception):
    """What did not happen in time, with the screen."""


@dataclass
class Terminal:
    """One bash in one tmux; use it as a context manager."""

    home: Path  # folder in which the shell begins
    scratch: Path  # folder of the socket and of the list of exit codes
    environment: Mapping[str, str]
    width: int = 100  # characters
    height: int = 45  # lines
    command: tuple[str, ...] = ()  # before tmux and the shell: makes them another user's

    def __enter__(self) -> Terminal:
        if shutil.which("tmux") is None:
            raise TerminalError("tmux is not installed here: run tests/install_packages.sh as root")
        self._codes.write_text("")
        self._codes.chmod(0o666)  # the shell may be another user's
        variables = (f"PS1={PROMPT}", f"HISTFILE={os.devnull}", f"PROMPT_COMMAND=echo $? >> {shlex.quote(str(self._codes))}")
        shell = ("timeout", "--foreground", LONGEST_LIFE, "env", *variables, "bash", "--norc", "--noprofile")
        size = ("-x", str(self.width), "-y", str(self.height))
        self._tmux("-u", "-f", os.devnull, "new-session", "-d", *size, "-c", str(self.home), shlex.join(shell))
        self._wait(lambda: len(self.codes) == 1, "the shell")
        return self

    def __exit__(self, *error: object) -> None:
        self._tmux("kill-server", check=False)

    @property
    def codes(self) -> list[int]:
        """Exit codes of the commands so far; the first one is that of the start."""
        return [int(line) for line in self._codes.read_text().split()]

    def run(self, command: str, answers: Mapping[str, str] | None = None, within: float = LONGEST_WAIT) -> tuple[int, str]:
        """Type a command and wait for its end. `answers`: what is typed after a text of the screen. Returns exit code and output."""
        before = len(self.codes)
        self.type(command)
        for text, answer in (answers or {}).items():
            self.wait_for(text, within)
            self._tmux("send-keys", answer, "Enter")
        return self._end(before, command, within)

    def type(self, command: str) -> None:
        """Clear the screen and type a command; it is not waited for."""
        self._tmux("send-keys", "-R", ";", "clear-history")
        self._tmux("send-keys", "-l", command)
        self._tmux("send-keys", "Enter")

    def wait_for(self, text: str, within: float = LONGEST_WAIT, *, times: int = 1) -> None:
        """Wait until the screen contains a text so many times. TerminalError too if the command ends before."""
        before = len(self.codes)
        self._wait(lambda: self._capture().count(text) >= times or len(self.codes) > before, repr(text), within)
        if self._capture().count(text) < times:
            raise TerminalError(f"the command ended without {text!r}:\n{self._capture()}")

    def interrupt(self) -> tuple[int, str]:
        """Press Ctrl-C and wait for the prompt. Returns exit code and output."""
        before = len(self.codes)
        self._tmux("send-keys", "C-c")
        return self._end(before, "Ctrl-C", LONGEST_WAIT)

    def screen(self) -> str:
        """What the running command shows, with escape sequences for colours and without its own line."""
        return self._output(self._tmux("capture-pane", "-p", "-e", "-S", "-"))

    def _end(self, before: int, what: str, within: float) -> tuple[int, str]:
        self._wait(lambda: len(self.codes) > before, what, within)
        self._wait(lambda: self._capture().endswith(PROMPT.strip()), what)
        return self.codes[-1], self._output(self._capture().removesuffix(PROMPT.strip()))

    def _capture(self) -> str:
        return self._tmux("capture-pane", "-p", "-J", "-S", "-").rstrip()

    def _output(self, captured: str) -> str:
        return "\n".join(line.rstrip() for line in captured.rstrip().splitlines()[1:])

    def _wait(self, condition: Callable[[], bool], what: str, within: float = LONGEST_WAIT) -> None:
        end = time.monotonic() + within
        while not condition():
            if time.monotonic() > end:
                raise TerminalError(f"waited {within:.0f} s for {what}:\n{self._capture()}")
            time.sleep(0.1)

    @property
    def _codes(self) -> Path:
        return self.scratch / "exit-codes"

    def _tmux(self, *arguments: str, check: bool = True) -> str:
        command = [*self.command, "tmux", "-S", str(self.scratch / "tmux"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(self.environment), check=False)
        if check and done.returncode != 0:
            raise TerminalError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done.stdout
