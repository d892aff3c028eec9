"""Provenance: commit and dirty diff, versions, measurements."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from jobs import VERSION
from jobs.store.snapshot import code_facts
from jobs.worker.provenance import Stopwatch, package_versions, process_facts


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text("one\n")
    (folder / ".gitignore").write_text("ignored\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        _git(folder, *command)
    return folder


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_a_clean_working_tree_has_no_dirty_digest(repository: Path) -> None:
    """Nothing differs from the commit."""
    assert code_facts(repository) == {"commit": _git(repository, "rev-parse", "HEAD").strip(), "dirty": ""}


def test_every_difference_changes_the_digest(repository: Path) -> None:
    """Changed, untracked, changed untracked: each is another digest; ignored files are not code."""
    (repository / "ignored").write_text("data")
    seen = [code_facts(repository)["dirty"]]
    for name, text in (("a.py", "two\n"), ("new.py", "three\n"), ("new.py", "four\n")):
        (repository / name).write_text(text)
        seen.append(code_facts(repository)["dirty"])
    assert seen[0] == ""
    assert len(set(seen)) == 4
    assert code_facts(repository)["dirty"] == seen[-1]


def test_without_a_repository_there_is_a_version_and_no_commit(tmp_path: Path) -> None:
    """An unpacked archive has no commit."""
    assert code_facts(tmp_path) == {"commit": None, "dirty": None, "version": VERSION}


def test_only_named_packages_are_recorded() -> None:
    """A missing package is None."""
    assert package_versions(["pytest", "no-such-package"]) == {"pytest": pytest.__version__, "no-such-package": None}


def test_a_stopwatch_measures_wall_cpu_and_memory() -> None:
    """Sleeping takes wall-clock time and next to no CPU time."""
    watch = Stopwatch()
    time.sleep(0.05)
    facts = watch.facts()
    assert 0.05 <= facts["seconds"] < 5
    assert facts["cpu_seconds"] < facts["seconds"]
    assert facts["peak_rss_bytes"] > 1 << 20
    assert facts["started"] <= facts["finished"]


def test_slurm_ids_are_taken_from_the_environment() -> None:
    """Only what identifies the job, under short names."""
    facts = process_facts([], threads=3, environment={"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SLURM_EXPORT_ENV": "ALL"})
    assert facts["slurm"] == {"job_id": "12", "restart_count": "1"}
    assert facts["threads"] == 3
    assert facts["device"] == "cpu"
