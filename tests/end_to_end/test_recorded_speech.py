"""Recorded speech: a corpus of the literature from its own files to a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine


@pytest.mark.slow
def test_recorded_speech_from_prepare_to_confusion_matrix(emodb_source: Path, tmp_path: Path) -> None:
    """EmoDB goes from its own files to a table and a matrix of seven classes whose counts are the held-out speakers' utterances."""
    run = CommandLine(tmp_path / "data", tmp_path / "results")
    prepared = run("prepare", "emodb", "--source", str(emodb_source))
    assert prepared.returncode == 0, prepared.stderr
    assert "535 utterances" in prepared.stdout
    done = run("grid", "emodb", "methods=[vft]", "folds=[03-08]", "seeds=1", "recipe.finetune.epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (matrix,) = (run.results / "emodb" / "confusion" / "vft").glob("*.csv")
    rows = [line.split(",") for line in matrix.read_text().splitlines()]
    assert rows[0][1:] == ["angry", "boredom", "disgust", "fear", "happy", "neutral", "sad"]
    held_out = [path for path in (emodb_source / "audio").iterdir() if path.name[:2] in ("03", "08")]
    assert sum(int(count) for row in rows[1:] for count in row[1:]) == len(held_out)
