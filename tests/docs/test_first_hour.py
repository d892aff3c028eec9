"""docs/first-hour.md is what the scripted hour writes, and its parts are exact."""

from __future__ import annotations

from datetime import timedelta

from tests.command_line import ROOT
from tests.end_to_end.first_hour import HOUR, Played, Step
from tests.end_to_end.transcript import document, neutral, picture

STAMPED = "looked at 2026-11-29 15:54:14; ends 2026-11-29\n16:24:14, since 2026-11-29 15:54"


def test_the_document_has_the_commands_and_paragraphs_of_the_hour() -> None:
    """In order: after a change of the hour the document is to be written anew."""
    rest = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
    for step in HOUR:
        for text in filter(None, (step.prose, f"\n$ {step.command}\n")):
            _, found, rest = rest.partition(text)
            assert found, f"not in docs/first-hour.md after the step before: {text!r}; run `python -m tests.end_to_end.first_hour`"


def test_names_and_times_are_replaced() -> None:
    """The longest name first; the first time becomes nine o'clock, also where a line ends between day and time."""
    names = {"/x": "/home", "/x/you": "/home/you"}
    assert neutral("/x/you/a 2026-11-29 15:54", names, timedelta(hours=1)) == "/home/you/a 2026-11-29 16:54"
    page = document([Played(Step("", "look"), STAMPED)], names)
    assert "looked at 2026-01-05 09:00:14; ends 2026-01-05\n09:30:14, since 2026-01-05 09:00" in page


def test_the_picture_has_the_colours_of_the_screen_and_loads_nothing() -> None:
    """Green of the terminal, no address but that of SVG itself."""
    svg = picture([Played(Step("", "look", until="x"), "x", "\x1b[32mdone\x1b[39m and plain")], {})
    assert "done" in svg
    assert "font-face" not in svg
    assert "cdn" not in svg
    assert "#98" in svg or "fill: #" in svg
