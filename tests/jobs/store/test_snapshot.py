"""Snapshots of the code: complete, one per content, with commit and diff."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import jobs.store.snapshot
from jobs import VERSION
from jobs.errors import UsageError
from jobs.store.snapshot import code_facts, plan_snapshot, snapshot_facts, take_snapshot
from tests.jobs.slurm_cases import layout_of


def git(folder: Path, *arguments: str) -> str:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    environment = {**{name: value for name, value in os.environ.items() if not name.startswith("GIT_")}, **identity}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for name, text in {
        "launch.py": "print(1)\n",
        "jobs/a.py": "A = 1\n",
        "configs/x y.yaml": "a: 1\n",
        "tests/test_a.py": "",
        ".gitignore": "*.log\nresults/\n",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    git(source, "init", "--quiet")
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "--message=one")
    return source


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_tracked_changed_and_new_files_are_copied(checkout: Path, tmp_path: Path) -> None:
    """As they are now: edited, untracked, deleted; no ignored files, no tests, no git folder."""
    (checkout / "jobs/a.py").write_text("A = 2\n")
    (checkout / "jobs/new.py").write_text("NEW = 1\n")
    (checkout / "run.log").write_text("x")
    (checkout / "configs/x y.yaml").unlink()
    (checkout / "launch.py").chmod(0o755)
    snapshot = take_snapshot(checkout, layout_of(tmp_path))
    assert files_of(snapshot.path) == {".gitignore", "launch.py", "jobs/a.py", "jobs/new.py", "snapshot.json", "dirty.diff"}
    assert (snapshot.path / "jobs/a.py").read_text() == "A = 2\n"
    assert os.access(snapshot.path / "launch.py", os.X_OK)
    record = json.loads((snapshot.path / "snapshot.json").read_text())
    assert record["commit"] == git(checkout, "rev-parse", "HEAD")
    assert record["dirty"] is True
    assert {"jobs/a.py", "jobs/new.py"} <= set(record["changed"])
    assert "+A = 2" in (snapshot.path / "dirty.diff").read_text()
    assert snapshot_facts(snapshot)["snapshot"] == snapshot.path.name == snapshot.digest


def test_secrets_and_files_that_jobs_do_not_need_are_not_copied(checkout: Path, tmp_path: Path) -> None:
    """Tracked or not, at any depth; untracked files are copied only from the folders that jobs need, and the others are named."""
    hidden = (".env", "configs/.env", "jobs/.env.local", "configs/site.pem", "checkpoints/wav2vec_large.pt")
    for name in (*hidden, "notes.txt", "mine/b.py"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("TOKEN=1\n")
    git(checkout, "add", "--force", "configs/.env")
    git(checkout, "commit", "--quiet", "--message=two")
    snapshot = take_snapshot(checkout, layout_of(tmp_path))
    assert files_of(snapshot.path) == {".gitignore", "launch.py", "jobs/a.py", "configs/x y.yaml", "snapshot.json", "dirty.diff"}
    assert snapshot.left_out == ("mine/b.py", "notes.txt")
    assert not snapshot_facts(snapshot)["dirty"]
    assert (snapshot.path / "dirty.diff").stat().st_mode & 0o777 == 0o600


def test_data_is_left_out_tracked_or_not(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings, arrays and weights by their names, and what is large outside of the folders that jobs need; each is named.

    Before: whatever git tracks was copied at every launch of another version, and its changes into `dirty.diff`.
    """
    monkeypatch.setattr(jobs.store.snapshot, "LARGEST", 1000)
    data = ("configs/speech.WAV", "mine/base.safetensors", "mine/large.txt", "jobs/states.npy")
    for name in (*data, "mine/small.py", "jobs/table.txt"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_bytes(b"1" * 2000 if "small" not in name else b"1")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message=two")
    (checkout / "jobs/states.npy").write_bytes(b"2" * 2000)
    (checkout / "jobs/new.pt").write_bytes(b"2")
    snapshot = take_snapshot(checkout, layout_of(tmp_path))
    code = {".gitignore", "launch.py", "jobs/a.py", "configs/x y.yaml", "mine/small.py", "jobs/table.txt"}
    assert files_of(snapshot.path) == {*code, "snapshot.json", "dirty.diff"}
    assert snapshot.left_out == tuple(sorted((*data, "jobs/new.pt")))
    assert (snapshot.path / "dirty.diff").read_text() == ""
    assert not snapshot_facts(snapshot)["dirty"]


def test_a_large_snapshot_is_reported_once(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its size, the largest files, and what to do; only when it is made."""
    take_snapshot(checkout, layout_of(tmp_path))
    assert not caplog.messages
    monkeypatch.setattr(jobs.store.snapshot, "LARGE", 10_000)
    (checkout / "jobs/table.txt").write_bytes(bytes(12_000))
    for _ in range(2):
        snapshot = take_snapshot(checkout, layout_of(tmp_path))
    (message,) = caplog.messages
    assert message.startswith(f"{snapshot.path}: the copy of the code for jobs has 0 MB, once for each version")
    assert "largest: jobs/table.txt 0.0 MB, " in message


def test_an_installed_package_has_a_version_and_no_commit(checkout: Path) -> None:
    """Nor has it the commit of a repository that its environment lies in."""
    (checkout / ".gitignore").write_text("environment/\n")
    installed = checkout / "environment" / "ser_grid"
    (installed / "jobs").mkdir(parents=True)
    assert code_facts(installed) == {"commit": None, "dirty": None, "version": VERSION}
    assert "version" not in code_facts(checkout)


def test_large_untracked_files_are_not_read(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a working tree has their size, and nothing of weights in `checkpoints/`."""
    monkeypatch.setattr(jobs.store.snapshot, "LARGEST", 100)
    clean = code_facts(checkout)
    (checkout / "checkpoints").mkdir()
    (checkout / "checkpoints" / "base.pt").write_bytes(bytes(200))
    assert code_facts(checkout) == clean
    (checkout / "speech.wav").write_bytes(bytes(200))
    with_speech = code_facts(checkout)
    (checkout / "speech.wav").write_bytes(b"1" * 200)
    assert with_speech == code_facts(checkout) != clean
    (checkout / "speech.wav").write_bytes(bytes(201))
    assert code_facts(checkout) != with_speech


@pytest.mark.parametrize("change", [lambda file: file.write_text("A = 3\n"), Path.unlink, lambda file: file.chmod(0o755)])
def test_a_copy_that_was_changed_is_refused(change: Callable[[Path], object], checkout: Path, tmp_path: Path) -> None:
    """Jobs would run other code than the digest in their results says."""
    layout = layout_of(tmp_path)
    taken = take_snapshot(checkout, layout)
    assert take_snapshot(checkout, layout).path == taken.path
    change(taken.path / "jobs" / "a.py")
    with pytest.raises(UsageError, match="this copy of the code was changed"):
        take_snapshot(checkout, layout)
    shutil.rmtree(taken.path)
    assert (take_snapshot(checkout, layout).path / "jobs" / "a.py").read_text() == "A = 1\n"


def test_once_for_each_content(checkout: Path, tmp_path: Path) -> None:
    """The same content is found again; another content gets another folder, and the first is unchanged."""
    layout = layout_of(tmp_path)
    first = take_snapshot(checkout, layout)
    assert not snapshot_facts(first)["dirty"]
    inode = (first.path / "launch.py").stat().st_ino
    again = take_snapshot(checkout, layout)
    assert (again.path, (again.path / "launch.py").stat().st_ino) == (first.path, inode)
    (checkout / "launch.py").write_text("print(2)\n")
    second = take_snapshot(checkout, layout)
    assert second.path != first.path
    assert (first.path / "launch.py").read_text() == "print(1)\n"
    assert sorted(os.listdir(layout.snapshots)) == sorted([first.digest, second.digest])


def test_a_test_that_changes_does_not_change_the_digest(checkout: Path, tmp_path: Path) -> None:
    """Jobs read no tests: editing one makes no new snapshot; a mode that changes does."""
    layout = layout_of(tmp_path)
    first = plan_snapshot(checkout, layout)
    (checkout / "tests/test_a.py").write_text("x")
    assert plan_snapshot(checkout, layout).digest == first.digest
    (checkout / "launch.py").chmod(0o755)
    assert plan_snapshot(checkout, layout).digest != first.digest


def test_without_git(tmp_path: Path) -> None:
    """A folder that is no checkout: the parts that jobs need, by name; planning writes nothing."""
    source = tmp_path / "source"
    for name in ("launch.py", "jobs/a.py", "jobs/__pycache__/a.pyc", "data/huge.bin", "notes.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    layout = layout_of(tmp_path)
    planned = plan_snapshot(source, layout)
    assert not layout.root.exists()
    assert set(planned.files) == {"launch.py", "jobs/a.py"}
    taken = take_snapshot(source, layout)
    assert taken.digest == planned.digest
    assert (taken.commit, snapshot_facts(taken)["dirty"]) == ("", False)


def test_an_untracked_file_too_large_to_be_code_is_named_and_left_out(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recordings in the folder are not copied with every launch."""
    monkeypatch.setattr(jobs.store.snapshot, "LARGEST", 100)
    (checkout / "speech.wav").write_bytes(bytes(101))
    snapshot = take_snapshot(checkout, layout_of(tmp_path))
    assert "speech.wav" not in snapshot.files
    assert json.loads((snapshot.path / "snapshot.json").read_text())["left_out"] == ["speech.wav"]


def test_an_incomplete_copy_is_no_snapshot(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a full disk leaves is removed, and the next launch makes a complete one."""
    layout = layout_of(tmp_path)
    copied: list[object] = []

    def full(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 2:
            raise OSError(28, "No space left on device")
        Path(target).write_bytes(Path(source).read_bytes())

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copy", full)
        with pytest.raises(OSError, match="No space"):
            take_snapshot(checkout, layout)
    assert os.listdir(layout.snapshots) == []
    assert take_snapshot(checkout, layout).taken


def test_code_edited_while_it_is_copied_is_an_error(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot always matches its digest."""

    def edited(source: Path, target: Path) -> None:
        Path(target).write_text("something else")

    monkeypatch.setattr(shutil, "copy", edited)
    with pytest.raises(UsageError, match="changed while it was copied"):
        take_snapshot(checkout, layout_of(tmp_path))
    assert os.listdir(layout_of(tmp_path).snapshots) == []


def test_no_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no code"):
        plan_snapshot(tmp_path / "empty", layout_of(tmp_path))


def test_a_snapshot_of_a_snapshot_is_the_same(checkout: Path, tmp_path: Path) -> None:
    """A job that runs in a snapshot and submits others passes on the same code, commit and diff, and writes nothing."""
    (checkout / "jobs/a.py").write_text("A = 2\n")
    (checkout / "jobs/new.py").write_text("NEW = 1\n")
    layout = layout_of(tmp_path)
    first = take_snapshot(checkout, layout)
    before = files_of(layout.snapshots)
    again = plan_snapshot(first.path, layout)
    assert (again.path, again.digest, dict(again.files)) == (first.path, first.digest, dict(first.files))
    assert snapshot_facts(again) == snapshot_facts(first)
    assert take_snapshot(first.path, layout).taken
    assert files_of(layout.snapshots) == before


def test_a_snapshot_copied_to_another_experiment_keeps_commit_and_diff(checkout: Path, tmp_path: Path) -> None:
    """Digest, commit and diff are those of the launch."""
    (checkout / "jobs/a.py").write_text("A = 2\n")
    first = take_snapshot(checkout, layout_of(tmp_path))
    other = take_snapshot(first.path, layout_of(tmp_path / "other"))
    assert other.path != first.path
    assert {**snapshot_facts(other), "folder": ""} == {**snapshot_facts(first), "folder": ""}
    assert (other.path / "dirty.diff").read_text() == (first.path / "dirty.diff").read_text()
    assert (other.path / "dirty.diff").read_text()


def test_a_snapshot_that_was_edited_is_none(checkout: Path, tmp_path: Path) -> None:
    """It has no commit any more, and another digest."""
    first = take_snapshot(checkout, layout_of(tmp_path))
    (first.path / "jobs/a.py").write_text("A = 3\n")
    edited = plan_snapshot(first.path, layout_of(tmp_path))
    assert edited.digest != first.digest
    assert edited.commit == ""
