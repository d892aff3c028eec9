"""Two names of one results folder are one store and share their jobs; two folders are two, also one after the other at one path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.slurm.chain import link_name
from jobs.store import identity
from jobs.store.identity import identity_of, record_identity
from jobs.store.layout import Layout


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_KNOWN", {})


def as_in_another_process(root: Path) -> str:
    identity._KNOWN.clear()
    return identity_of(root)


def test_a_folder_that_is_mounted_elsewhere_is_the_same_store(tmp_path: Path) -> None:
    """Two paths with one file, none of them a symbolic link, as with /net/server/home and /home: the names of jobs are the same."""
    home, net = tmp_path / "home", tmp_path / "net"
    record_identity(home)
    net.mkdir()
    (net / "id.json").hardlink_to(home / "id.json")
    assert identity_of(net) == identity_of(home)
    assert link_name(Layout(net, "trial")) == link_name(Layout(home, "trial"))
    record_identity(net)
    assert as_in_another_process(net) == as_in_another_process(home), "a launch under the other name changes nothing"


def test_a_folder_that_was_moved_is_the_same_store(tmp_path: Path) -> None:
    """Its path on another machine looks the same: the path of the first launch is not there."""
    record_identity(tmp_path / "old")
    before = identity_of(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert identity_of(tmp_path / "new") == before
    record_identity(tmp_path / "new")
    assert as_in_another_process(tmp_path / "new") == before


def test_a_new_folder_at_the_path_of_a_removed_one_is_another_store(tmp_path: Path) -> None:
    """It does not take over jobs of the former one that are still in the queue."""
    record_identity(tmp_path / "results")
    before = identity_of(tmp_path / "results")
    shutil.rmtree(tmp_path / "results")
    record_identity(tmp_path / "results")
    assert as_in_another_process(tmp_path / "results") != before


def test_a_copy_is_another_store(tmp_path: Path) -> None:
    """At once, and with an identity of its own from its first launch: the original may be removed afterwards."""
    record_identity(tmp_path / "results")
    shutil.copytree(tmp_path / "results", tmp_path / "copy")
    assert identity_of(tmp_path / "copy") != identity_of(tmp_path / "results")
    record_identity(tmp_path / "copy")
    own = as_in_another_process(tmp_path / "copy")
    shutil.rmtree(tmp_path / "results")
    assert as_in_another_process(tmp_path / "copy") == own


@pytest.mark.parametrize("folder", ["trial/submissions", "trial/sweep/0123/submissions"])
def test_jobs_of_an_earlier_version_keep_their_names(tmp_path: Path, folder: str) -> None:
    """Their names were made of the path without symbolic links."""
    real = tmp_path / "real"
    (real / folder).mkdir(parents=True)
    (tmp_path / "home").symlink_to("real")
    before = link_name(Layout(tmp_path / "home", "trial"))
    assert identity_of(tmp_path / "home") == str(real)
    record_identity(tmp_path / "home")
    assert json.loads((real / "id.json").read_text())["id"] == str(real)
    assert link_name(Layout(tmp_path / "home", "trial")) == before


def test_the_first_of_two_launches_decides(tmp_path: Path) -> None:
    """Recording it again changes nothing."""
    record_identity(tmp_path)
    first = (tmp_path / "id.json").read_bytes()
    record_identity(tmp_path)
    assert (tmp_path / "id.json").read_bytes() == first


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    """Another identity in its place would submit everything again."""
    record_identity(tmp_path)
    (tmp_path / "id.json").write_text('{"schema": 1, "id": ')
    with pytest.raises(UsageError, match=rf"{tmp_path}/id\.json: damaged \(.*\): delete it when squeue shows no job"):
        as_in_another_process(tmp_path)
