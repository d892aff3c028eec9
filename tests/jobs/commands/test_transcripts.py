"""What commands print about an experiment of a single run: the noun is singular, and no value is None."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.commands.collect import Asked, write_tables
from jobs.commands.explain import print_explanation
from jobs.commands.grid import print_plan, run_grid
from jobs.commands.status import show_status
from jobs.commands.status_list import show_list
from tests.jobs.local_launch import new_session
from tests.test_wording import AVOIDED, NOUNS

WRONG = re.compile(rf"\b1 (?:\w+ )?(?:{'|'.join(NOUNS)})e?s\b|\bNone\b|{'|'.join(AVOIDED)}")


@pytest.mark.parametrize("line", ["1 stages held", "1 finished runs", "waits (None)", "submit: 1 tasks, 1 stages", "it goes on"])
def test_wrong_words_are_found(line: str) -> None:
    """The messages that this file is about."""
    assert WRONG.search(line)


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["", "fail:1", "oom:1", "refuse"])
def test_a_single_run(behaviour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dry run, launch, status, explain and tables of one run that succeeds, fails, runs out of memory, or is refused."""
    recipe: dict[str, object] = {"failing": {"finetune vft 1 0": behaviour}}

    def look() -> None:
        session = new_session(tmp_path, recipe=recipe)
        show_status(session)
        show_list(tmp_path / "results", lambda name: session)
        print_explanation(session, "vft/1/0")

    print_plan(new_session(tmp_path, recipe=recipe), lambda corpus, nodes: ())
    look()
    run_grid(new_session(tmp_path, recipe=recipe), wait=False)
    look()
    session = new_session(tmp_path, recipe=recipe)
    write_tables(session, session.look(), Asked(force=True))
    text = "".join(capsys.readouterr())
    assert "exp: 1 run, 1 stage" in text
    assert [line for line in text.splitlines() if WRONG.search(line)] == []
