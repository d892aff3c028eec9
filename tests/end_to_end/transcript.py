"""What a terminal showed as Markdown and as a picture: names of the machine replaced, the clock set to nine o'clock. Pure."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from tests.end_to_end.first_hour import Played

WIDTH = 100
BEGIN = datetime(2026, 1, 5, 9, 0)
STAMP = re.compile(r"(\d{4}-\d\d-\d\d)(\s)(\d\d:\d\d)(:\d\d)?")
FONT_FACES = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)  # they load fonts from the network; the picture has what the reader has
HEAD = """\
# The first hour

From a folder of recordings to a table on a Slurm cluster, with the mistakes that people make. This page
is written by `python -m tests.end_to_end.first_hour`, which types the commands into a terminal on the
tests' Slurm of three nodes; `tests/end_to_end/test_first_hour.py` plays the same hour. What follows is
what the terminal showed, on two busy cores. Only the names of the machine and its user are replaced,
and the clock begins at nine.

The program is set up ([README](../README.md#first-grid-on-slurm-in-five-minutes)), its environment is
active, and the recordings are in a folder beside it:

    ~/ser-grid                 the program
    ~/speech/my_corpus.csv     path,label,speaker
    ~/speech/recordings/       64 recordings of four speakers
"""
PICTURE = "![`status mine --watch`, as the terminal showed it](status-watch.svg)\n"


def document(played: Sequence[Played], names: Mapping[str, str]) -> str:
    """The page: each step's paragraph, its command and its output, wrapped as by a terminal of 100 columns."""
    shift = _shift([each.output for each in played])
    parts = [HEAD]
    for each in played:
        if each.step.prose:
            parts.append(f"{each.step.prose}\n")
        shown = neutral(each.output, names, shift).splitlines()
        if each.step.answer[0]:
            shown = [line for line in shown if line]
        lines = [f"$ {each.step.command}", *(piece for line in shown for piece in wrapped(line))]
        if each.step.until and lines[-1] != "^C":
            lines.append("^C")
        parts.append("\n".join(("```text", *(line.rstrip() for line in lines), "```\n")))
        if each.screen:
            parts.append(PICTURE)
    return "\n".join(parts)


def picture(played: Sequence[Played], names: Mapping[str, str]) -> str:
    """The screen of the first step that has one, as SVG."""
    shift = _shift([each.output for each in played])
    step, screen = next((each.step, each.screen) for each in played if each.screen)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(neutral(screen, names, shift)))
    return console.export_svg(title=step.command, code_format=FONT_FACES.sub("", CONSOLE_SVG_FORMAT), unique_id="watch")


def neutral(text: str, names: Mapping[str, str], shift: timedelta) -> str:
    """The text with other names, and with times shifted."""
    for name, other in sorted(names.items(), key=lambda each: -len(each[0])):
        text = text.replace(name, other)

    def shifted(found: re.Match[str]) -> str:
        day, gap, minutes, seconds = found.groups(default="")
        then = datetime.fromisoformat(f"{day} {minutes}{seconds}") + shift
        return f"{then:%Y-%m-%d}{gap}{then:%H:%M}" + (f":{then:%S}" if seconds else "")

    return STAMP.sub(shifted, text)


def wrapped(line: str) -> list[str]:
    """The line in pieces of 100 characters."""
    return [line[start : start + WIDTH] for start in range(0, len(line), WIDTH)] or [""]


def _shift(texts: Sequence[str]) -> timedelta:
    """From the first time that the texts show to nine o'clock; zero where they show none."""
    times = [datetime.fromisoformat(f"{each[1]} {each[3]}") for text in texts for each in STAMP.finditer(text)]
    return BEGIN - min(times) if times else timedelta()
