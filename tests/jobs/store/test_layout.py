"""Folder names under `results/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.store.layout import Layout, shared_path, valid_experiment_name


@pytest.mark.parametrize("name", ["iemocap", "savee-20", "a.b_c", "x" * 64])
def test_ordinary_names_are_fine(name: str) -> None:
    """Letters, digits, dot, dash and underscore, up to 64."""
    assert valid_experiment_name(name)


@pytest.mark.parametrize("name", ["", "store", "id.json", "../x", "a/b", ".hidden", "-x", "a b", "x" * 65, "a\n"])
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


def test_paths_for_other_machines_keep_the_name_that_the_user_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an automounter's link leads to is there on this machine only; the working folder is named as `pwd` prints it."""
    real, home = tmp_path / "mounted-here-only", tmp_path / "home"
    (real / "results").mkdir(parents=True)
    home.symlink_to("mounted-here-only")
    assert shared_path(home / "results") == home / "results"
    assert shared_path(home / "results" / ".." / "other") == home / "other"
    assert shared_path(home / ".." / "other") == tmp_path / "other"
    monkeypatch.chdir(home)
    monkeypatch.setenv("PWD", str(home))
    assert shared_path(Path("results")) == home / "results"
    assert shared_path(real / "results") == home / "results", "as the interpreter names a script that was given by a relative path"
    for outdated in (str(tmp_path), str(tmp_path / "gone"), "relative", ""):
        monkeypatch.setenv("PWD", outdated)
        assert shared_path(Path("results")) == real / "results"


def test_a_dotted_path_behind_a_link_that_leads_elsewhere(tmp_path: Path) -> None:
    """`LINK/..` is not the folder of the link: nothing is cut off then."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    assert shared_path(tmp_path / "link" / ".." / "results").resolve() == tmp_path / "far" / "results"
