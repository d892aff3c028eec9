"""Records: complete or absent, never torn into a wrong answer."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.store.layout import StageFolder
from jobs.store.records import (
    SCHEMA,
    Claim,
    Ending,
    Outcome,
    Result,
    artifacts_present,
    attempt_numbers,
    claim_attempt,
    create_json,
    damaged_records,
    file_digest,
    file_exists,
    read_claim,
    read_json,
    read_outcome,
    read_result,
    result_intact,
    write_json,
    write_outcome,
    write_result,
)

RESULT = Result(
    key="k1",
    stage="finetune",
    version=1,
    fold="1",
    seed=0,
    corpus="fake",
    corpus_digest="d1",
    settings={"lr": 1e-4},
    upstream={},
    attempt=1,
    metrics={"ua": 62.25},
    provenance={"commit": "c"},
    confusion=((3, 1), (0, 4)),
    classes=("angry", "sad"),
)


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "store" / "finetune" / "k1")


def test_a_link_that_was_made_although_an_error_says_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose reply was lost: the process that made the file has won; one that finds another's file has not."""
    link = os.link

    def link_twice(*arguments: Any, **options: Any) -> None:
        link(*arguments, **options)
        link(*arguments, **options)

    monkeypatch.setattr(os, "link", link_twice)
    file = tmp_path / "claim.json"
    assert create_json(file, {"winner": 1})
    assert not create_json(file, {"winner": 2})
    assert read_json(file) == {"winner": 1}
    assert os.listdir(tmp_path) == ["claim.json"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_only_a_missing_file_is_missing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be read raises; a name that is not there, or below a file, does not exist."""
    (tmp_path / "file").write_text("")
    assert file_exists(tmp_path / "file")
    assert not any(file_exists(tmp_path / name) for name in ("other", "file/below", "."))

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        file_exists(tmp_path / "file")


def test_a_result_reads_back_as_it_was_written(folder: StageFolder) -> None:
    """Tuples, numbers and names survive the file."""
    write_result(folder, RESULT)
    assert read_result(folder, "k1") == RESULT


def test_records_of_an_older_version_are_read(folder: StageFolder) -> None:
    """What it did not know has the value that says nothing."""
    value = {"schema": SCHEMA, **asdict(RESULT)}
    del value["diverged"]
    write_json(folder.result, value)
    assert read_result(folder, "k1") == RESULT
    claim = {"schema": SCHEMA, "attempt": 1, "host": "h", "pid": 2, "process_start": "", "started": 3.0, "slurm_job": "7_0"}
    write_json(folder.attempt(1).claim, claim)
    assert read_claim(folder.attempt(1)) == Claim(1, "h", 2, "", 3.0, "7_0")
    outcome = {"schema": SCHEMA, "attempt": 1, "ending": "failed", "error": "E", "message": "", "detail": "", "host": "h", "seconds": 1.0}
    write_json(folder.attempt(1).outcome, outcome)
    assert read_outcome(folder.attempt(1)) == Outcome(1, Ending.failed, "E", "", "", "h", 1.0)


def test_a_full_disk_leaves_what_was_there(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary file, no half of a record, and the error of the system."""
    write_result(folder, RESULT)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as told:
        write_result(folder, replace(RESULT, version=2))
    assert told.value.filename == str(folder.result)
    with pytest.raises(OSError, match="No space left"):
        claim_attempt(folder, 1, Claim(1, "h", 2, "", 3.0))
    assert read_result(folder, "k1") == RESULT
    assert [path.name for path in folder.path.rglob("*") if path.is_file()] == ["result.json"]


@pytest.mark.parametrize("length", [0, 1, 40, 200])
def test_a_torn_result_is_none(folder: StageFolder, length: int) -> None:
    """Any beginning of the file is neither success nor failure."""
    write_result(folder, RESULT)
    folder.result.write_bytes(folder.result.read_bytes()[:length])
    assert read_result(folder, "k1") is None


@pytest.mark.parametrize("change", [{"schema": SCHEMA + 1}, {"key": "k2"}])
def test_a_result_of_another_schema_or_key_is_none(folder: StageFolder, change: dict[str, object]) -> None:
    """What this version does not understand does not count."""
    write_json(folder.result, {"schema": SCHEMA, **asdict(RESULT), **change})
    assert read_result(folder, "k1") is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("confusion", text) for text in ('[["x"]]', "[[NaN]]", "[[Infinity]]", "5")),
        *(("metrics", text) for text in ("null", "[1]")),
        *(("provenance", "null"), ("artifacts", "null"), ("attempt", '"1"'), ("diverged", "null")),
    ],
)
def test_a_result_with_a_value_of_the_wrong_kind_is_none(folder: StageFolder, name: str, text: str) -> None:
    """A file that somebody has mended by hand is neither success nor failure, and no traceback at every look."""
    write_json(folder.result, {"schema": SCHEMA, **asdict(RESULT), name: "HERE"})
    folder.result.write_text(folder.result.read_text().replace('"HERE"', text))
    assert read_result(folder, "k1") is None


def test_fields_of_a_newer_version_are_ignored(folder: StageFolder) -> None:
    """Whatever they hold, at any depth."""
    provenance = {**RESULT.provenance, "unheard": {"deep": [1, None]}}
    write_json(folder.result, {"schema": SCHEMA, **asdict(replace(RESULT, provenance=provenance)), "unheard": {"a": [None]}})
    assert read_result(folder, "k1") == replace(RESULT, provenance=provenance)
    claim = Claim(1, "h", 2, "", 3.0)
    write_json(folder.attempt(1).claim, {"schema": SCHEMA, **asdict(claim), "unheard": 1})
    assert read_claim(folder.attempt(1)) == claim
    assert not damaged_records(folder.path)


def test_a_result_that_lacks_a_field_is_none(folder: StageFolder) -> None:
    """Incomplete is not finished."""
    value = {"schema": SCHEMA, **asdict(RESULT)}
    del value["metrics"]
    write_json(folder.result, value)
    assert read_result(folder, "k1") is None


def test_nan_cannot_be_published(folder: StageFolder) -> None:
    """A record that JSON readers would choke on is refused, and what was there stays."""
    write_result(folder, RESULT)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_result(folder, replace(RESULT, metrics={"ua": float("nan")}))
    assert read_result(folder, "k1") == RESULT
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


def test_artifacts_are_checked_by_presence_and_by_content(folder: StageFolder) -> None:
    """A missing artifact is seen without reading, a changed one by its digest."""
    output = folder.attempt(1).output
    output.mkdir(parents=True)
    (output / "model.bin").write_bytes(b"weights")
    result = replace(RESULT, artifacts={"model.bin": file_digest(output / "model.bin")})
    assert artifacts_present(folder, result)
    assert result_intact(folder, result)
    (output / "model.bin").write_bytes(b"weighty")
    assert artifacts_present(folder, result)
    assert not result_intact(folder, result)
    (output / "model.bin").unlink()
    assert not artifacts_present(folder, result)


def test_claims_and_outcomes_read_back(folder: StageFolder) -> None:
    """An attempt is listed from its claim on; its outcome says how it ended."""
    claim = Claim(1, "node1", 12, "boot/ns/99", 5.0, "7_3", "n1", "/logs/7_3.out", 1, 4.5)
    assert claim_attempt(folder, 1, claim)
    assert not claim_attempt(folder, 1, replace(claim, pid=13))
    assert read_claim(folder.attempt(1)) == claim
    outcome = Outcome(1, Ending.interrupted, "Interrupted", "asked to stop", "", "node1", 3.5, "7_3", "time_limit")
    write_outcome(folder.attempt(1), outcome)
    assert read_outcome(folder.attempt(1)) == outcome
    assert attempt_numbers(folder) == (1,)


def _claim_in_process(path: str, pid: int, queue: multiprocessing.Queue[bool]) -> None:
    queue.put(claim_attempt(StageFolder(Path(path)), 1, Claim(1, "host", pid, "", 0.0)))


def test_of_many_processes_one_gets_the_claim(folder: StageFolder) -> None:
    """An attempt has one owner, whoever else tries at the same time."""
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bool] = context.Queue()
    workers = [context.Process(target=_claim_in_process, args=(str(folder.path), number, queue)) for number in range(8)]
    for worker in workers:
        worker.start()
    won = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(won) == [False] * 7 + [True]
    assert sorted(os.listdir(folder.attempt(1).path)) == ["claim.json"]


def test_create_json_never_replaces(tmp_path: Path) -> None:
    """The second writer is told, and the first one's text stays."""
    assert create_json(tmp_path / "intent.json", {"a": 1})
    assert not create_json(tmp_path / "intent.json", {"a": 2})
    assert read_json(tmp_path / "intent.json") == {"a": 1}


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "\x00"])
def test_what_is_not_an_object_reads_as_none(tmp_path: Path, text: str) -> None:
    """Torn, empty or of another kind: None."""
    (tmp_path / "record.json").write_text(text)
    assert read_json(tmp_path / "record.json") is None


def test_files_are_readable_by_the_group(tmp_path: Path) -> None:
    """Records follow the user's umask, so that a laboratory can share a folder."""
    write_json(tmp_path / "record.json", {})
    mask = os.umask(0o022)
    os.umask(mask)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert json.loads((tmp_path / "record.json").read_text()) == {}
