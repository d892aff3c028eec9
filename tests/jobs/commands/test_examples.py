"""The examples in the help of each command, and completion."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import typer

import launch
from jobs.commands.examples import EXAMPLES
from tests.command_line import ROOT

PROGRAM = typer.main.get_command(launch.app)
COMMANDS = {name: command for name, command in PROGRAM.commands.items() if not command.hidden}  # type: ignore[attr-defined]


def test_every_command_has_two_examples_in_its_help() -> None:
    """As they are typed, on lines of their own."""
    assert set(EXAMPLES) == set(COMMANDS)
    for name, examples in EXAMPLES.items():
        lines = [f"python launch.py {words}" for words in examples]
        assert COMMANDS[name].epilog.splitlines() == ["Examples:", "", lines[0], "", lines[1]]


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_an_example_can_be_parsed(example: str) -> None:
    """Its command has these options; nothing is executed."""
    name, *words = shlex.split(example)
    assert COMMANDS[name].make_context(name, words) is not None


def test_experiments_are_completed() -> None:
    """Names of configs/experiment and of the launched ones, for `./launch.py grid em<TAB>` in bash."""
    variables = {"_LAUNCH.PY_COMPLETE": "complete_bash", "COMP_WORDS": "launch.py grid em", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "launch.py"], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    expected = ["emodb", "emodb-ablation", "emodb-base", "emodb-peft", "emodb-shift", "emodb-subsets", "emodb-to-demo", "emodb-two-stage"]
    assert done.stdout.split() == expected, done.stderr
