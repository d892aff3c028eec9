"""The corpus whose scripts decide the class: what its experiment needs of it."""

from __future__ import annotations

import csv
from pathlib import Path

import yaml

from benchmarks.script_leak import CLASSES, FILLERS, SCRIPTS, SPECIAL, write_corpus
from ser_core.corpora import scripts
from ser_core.corpora.manifest import Utterance
from tests.command_line import ROOT


def test_each_fold_is_tested_on_scripts_of_both_classes_and_kinds(tmp_path: Path) -> None:
    """Otherwise a recall would be missing; a script has one class; all words are in the vocabulary of the encoder."""
    with write_corpus(tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all((tmp_path / row["path"]).is_file() for row in rows)
    turns = [Utterance(Path(row["path"]).stem, "", 1, row["label"], row["speaker"], row["fold"], text=row["text"]) for row in rows]
    assert len({(scripts.script_of(each), each.label) for each in turns}) == len(SCRIPTS)
    folds = ("1", "2", "3", "4", "5")
    for fold in folds:
        tested = scripts.tested_scripts(turns, folds, fold)
        own = [each for each in turns if each.fold == fold and scripts.script_of(each) in tested]
        assert {(scripts.kind_of(each), each.label) for each in own} == {(kind, label) for kind in scripts.KINDS for label in CLASSES}
        assert len(own) == 16
    settings = yaml.safe_load((ROOT / "configs" / "experiment" / "script-leak.yaml").read_text())
    assert settings["recipe"]["text"]["encoder"]["config"]["vocab_size"] == len(SPECIAL) + len(FILLERS) + len(SCRIPTS)
    assert {word for each in turns for word in (each.text or "").split()} <= {*FILLERS, *SCRIPTS}
