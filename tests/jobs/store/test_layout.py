"""Folder names under `results/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.store.layout import Layout, valid_experiment_name


@pytest.mark.parametrize("name", ["iemocap", "savee-20", "a.b_c", "x" * 64])
def test_ordinary_names_are_fine(name: str) -> None:
    """Letters, digits, dot, dash and underscore, up to 64."""
    assert valid_experiment_name(name)


@pytest.mark.parametrize("name", ["", "store", "../x", "a/b", ".hidden", "-x", "a b", "x" * 65, "a\n"])
def test_names_that_would_leave_the_folder_or_clash_are_refused(name: str) -> None:
    """No path parts, no leading dot or dash, not the store's own name."""
    assert not valid_experiment_name(name)


def test_stages_are_shared_between_experiments() -> None:
    """The folder of a stage does not depend on the experiment, the rest does."""
    first, second = Layout(Path("results"), "one"), Layout(Path("results"), "two")
    assert first.stage("tapt", "abc") == second.stage("tapt", "abc")
    assert first.logs != second.logs
    assert (first.sweep, second.sweep) == (Path("results/one/sweep"), Path("results/two/sweep"))
    assert first.stage("tapt", "abc").attempt(3).output == Path("results/store/tapt/abc/attempts/0003/output")
