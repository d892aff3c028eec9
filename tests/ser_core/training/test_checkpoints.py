from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ser_core.errors import Interrupted
from ser_core.training.checkpoints import Checkpoints, identity_of


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((3, 2), value), "count": torch.tensor(7)},
        "adam": {"step/weight": torch.tensor(value)},
        "extra": {},
    }


def written(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, "mine")
    for step in steps:
        checkpoints.save(step, tensors(step), {"loss": step / 2, "rows": [[1, {"a": 0.1}]]})
    return checkpoints


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Tensors to the bit, facts as JSON, empty groups included."""
    saved = written(tmp_path, 5).load()
    assert saved is not None
    assert saved.step == 5
    assert saved.facts == {"loss": 2.5, "rows": [[1, {"a": 0.1}]]}
    assert torch.equal(saved.tensors["model"]["weight"], torch.full((3, 2), 5.0))
    assert saved.tensors["model"]["count"].dtype == torch.int64
    assert saved.tensors["extra"] == {}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 30, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000030", "step-000000100"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state", "torn state", "other schema", "not safetensors"])
def test_a_damaged_checkpoint_is_skipped(damage: str, tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    newest = tmp_path / "step-000000002"
    weights, state = newest / "model.safetensors", newest / "state.json"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-4])
        case "flipped":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "missing":
            weights.unlink()
        case "no state":
            state.unlink()
        case "torn state":
            state.write_text(state.read_text()[:40])
        case "other schema":
            state.write_text(json.dumps({**json.loads(state.read_text()), "schema": 99}))
        case "not safetensors":
            import hashlib

            weights.write_bytes(b"nonsense")
            facts = json.loads(state.read_text())
            facts["files"]["model.safetensors"] = hashlib.sha256(b"nonsense").hexdigest()
            state.write_text(json.dumps(facts))
    saved = checkpoints.load()
    assert saved is not None
    assert saved.step == 1
    checkpoints.save(2, tensors(9), {})  # and it can be written again in its place
    again = checkpoints.load()
    assert again is not None
    assert float(again.tensors["model"]["weight"][0, 0]) == 9


def test_a_superseded_attempt_writes_and_removes_nothing(tmp_path: Path) -> None:
    """Attempt 1 still runs and finds the folder in use by attempt 2, at the start of its save or at the end: all of attempt 2 stays."""
    superseded_before = Checkpoints(tmp_path, "mine", 1, superseded=lambda: True)
    superseded_meanwhile = Checkpoints(tmp_path, "mine", 1, superseded=iter([False, True]).__next__)
    Checkpoints(tmp_path, "mine", 2).save(30, tensors(30), {})
    saving = tmp_path / ".step-000000040.2.4242.tmp"  # attempt 2 is in the middle of a save
    saving.mkdir()
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    for checkpoints in (superseded_before, superseded_meanwhile):
        with pytest.raises(Interrupted, match="a later attempt than 1 has begun"):
            checkpoints.save(30, tensors(1), {})
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_only_files_of_earlier_attempts_are_removed(tmp_path: Path) -> None:
    """What attempts 1 and 2 left is removed by attempt 2; what attempt 3 has written since its last look is not."""
    for attempt, step in ((1, 50), (2, 60), (3, 70)):
        Checkpoints(tmp_path, "mine", attempt).save(step, tensors(step), {})
        (tmp_path / f".step-000000080.{attempt}.4242.tmp").mkdir()
    (tmp_path / ".step-000000080.4242.tmp").mkdir()  # of an earlier version, which gave no number
    Checkpoints(tmp_path, "mine", 2).save(40, tensors(40), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000000080.3.4242.tmp", "step-000000040", "step-000000070"]


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_an_unreadable_file_system_loses_no_progress(name: str, tmp_path: Path) -> None:
    """It is an error: an older checkpoint, or the start, would be taken in place of the newest."""
    checkpoints = written(tmp_path, 1, 2)
    file = tmp_path / "step-000000002" / name
    file.unlink()
    file.symlink_to("/proc/self/mem")  # reading its start gives EIO
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.load()


def test_the_checkpoint_of_another_stage_is_never_loaded(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    assert Checkpoints(tmp_path, "theirs").load() is None


def test_a_write_that_was_killed_leaves_nothing_that_is_loaded(tmp_path: Path) -> None:
    """A temporary folder is never loaded."""
    checkpoints = written(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / ".step-000000001.4242.tmp")
    assert checkpoints.load() is None


def test_a_failing_write_leaves_the_earlier_ones(tmp_path: Path) -> None:
    """NaN is not JSON: the write fails before anything is renamed."""
    checkpoints = written(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.save(2, tensors(2), {"loss": float("nan")})
    saved = checkpoints.load()
    assert saved is not None
    assert saved.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_identity_depends_on_every_value() -> None:
    values: list[object] = [["tapt", {"steps": 5}, "1", 0], ["tapt", {"steps": 6}, "1", 0], ["tapt", {"steps": 5}, "2", 0]]
    assert len({identity_of(value) for value in values}) == 3
    assert identity_of({"a": 1, "b": 2}) == identity_of({"b": 2, "a": 1})


def test_later_checkpoints_that_cannot_be_resumed_make_room(tmp_path: Path) -> None:
    """Later checkpoints of another stage do not displace the one being written: otherwise every attempt would start from step 0."""
    written(tmp_path, 800, 900)
    mine = Checkpoints(tmp_path, "other")
    assert mine.load() is None
    mine.save(100, tensors(100), {})
    saved = mine.load()
    assert saved is not None
    assert saved.step == 100
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000100"]
