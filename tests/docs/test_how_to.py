"""docs/how-to-add.md: every section is followed to the letter in a copy of the project, so that the page cannot go out of date."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to-add.md"
COPIED = ("launch.py", "jobs", "ser_core", "configs", "slurm_templates")
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of the page."""

    language: str
    file: str  # "" for what is run
    text: str


def sections() -> dict[str, list[Block]]:
    """Heading -> its blocks, in order."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: [Block(*found) for found in FENCE.findall(body)] for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def apply_diff(text: str, diff: str) -> str:
    """`text` with every hunk applied; the old lines of a hunk must be in it exactly once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        found = len(re.findall(f"^{re.escape(old)}", text, flags=re.MULTILINE))
        assert found == 1, f"found {found} times, not once:\n{old}"
        text = re.sub(f"^{re.escape(old)}", lambda _, new=new: new, text, flags=re.MULTILINE)  # type: ignore[misc]
    return text


def run(command: list[str], folder: Path) -> str:
    """What a command prints when it is run in the copy with this interpreter; it must succeed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("SER_GRID_DATA", "SER_GRID_RESULTS", "PYTHONPATH")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def follow(blocks: list[Block], folder: Path) -> None:
    """Do what the blocks say, in order."""
    printed = ""
    for block in blocks:
        if block.language == "diff":
            path = folder / block.file
            path.write_text(apply_diff(path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
        elif block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            run([sys.executable, "-c", block.text], folder)
        elif block.language == "sh":
            commands = [shlex.split(line) for line in block.text.splitlines()]
            printed = "".join(run([sys.executable, *command[1:]], folder) for command in commands)
        elif block.language == "text":
            for line in block.text.splitlines():
                assert line in printed
        else:
            pytest.fail(f"a block of {block.language} that nothing is done with")


@pytest.mark.slow
@pytest.mark.parametrize("title", sections())
def test_a_section_can_be_followed(title: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its files are written, its changes fit the code, its commands succeed and print what the page shows."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    blocks = sections()[title]
    if any("prepare demo" in block.text for block in blocks):  # it is there already, so that it need not be synthesised again
        shutil.copytree(request.getfixturevalue("demo_data"), tmp_path / "data")
    follow(blocks, tmp_path)


@pytest.mark.slow
def test_every_subject_has_an_example_that_is_executed() -> None:
    """A section without a block would pass unseen."""
    found = sections()
    assert list(found) == ["A corpus", "A method", "A site", "A failure class", "A table"]
    assert all(any(block.language in ("python", "sh") and not block.file for block in blocks) for blocks in found.values())


@pytest.mark.slow
def test_a_change_that_does_not_fit_is_noticed() -> None:
    """Lines that are gone, or are there twice, fail with the lines in the message."""
    assert apply_diff("a\nb\nc\n", " a\n-b\n+B\n@@\n c\n+d\n") == "a\nB\nc\nd\n"
    with pytest.raises(AssertionError, match=r"found 0 times, not once:\s+x"):
        apply_diff("a\n", "-x\n")
    with pytest.raises(AssertionError, match="found 2 times"):
        apply_diff("a\na\n", "-a\n")
