"""A corpus in EmoBox's layout: from its lists to a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.end_to_end.grids import read_json
from tests.ser_core.corpora.emobox_source import recorded


@pytest.mark.slow
def test_emobox_from_prepare_to_a_table_of_one_fold(emodb_source: Path, tmp_path: Path) -> None:
    """Recorded speech with one split that shares a speaker: the table states both, with published means below."""
    run = CommandLine(tmp_path / "data", tmp_path / "results")
    file, audio = recorded(tmp_path, emodb_source, {"train": ["13", "14", "11"], "valid": ["16"], "test": ["11", "15"]}, "WT")
    prepared = run("prepare", "emobox", "--meta", str(file), "--audio", str(audio), "--name", "boxed", "--shared-speakers")
    assert prepared.returncode == 0, prepared.stderr
    assert "boxed: 12 utterances" in prepared.stdout
    assert "label anger is read as Anger" in prepared.stderr
    settings = (
        "corpus=boxed",
        "table=emobox_savee",
        "methods=[vft]",
        "seeds=2",
        "recipe.finetune.epochs=15",
        "recipe.finetune.batch_size=6",
    )
    done = run("grid", "emodb", *settings, "name=boxed")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (run.results / "boxed" / "tables" / "table.md").read_text()
    assert "The folds of boxed share speakers (in the training and the test part of a fold: 1 of 5)" in text
    assert "One fold is held out: there is no interval over folds" in text
    assert "| wav2vec 2.0 base | – | 44.9 |" in text
    summary = read_json(run.results / "boxed" / "tables" / "summary.json")
    assert summary["complete"]
    assert [cell["fold"] for cell in summary["methods"][0]["cells"]] == ["test"]
    assert summary["methods"][0]["over_folds_and_seeds"] is None
