"""`predict`: its words, its files, and what it writes while a registry reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jobs.commands.predict import check_format, exported_folder, files_of, finished_run, predict_files, split_words
from jobs.commands.predict_arguments import add_predict_command
from jobs.commands.program import Program
from jobs.errors import UsageError
from jobs.experiment.basic_registry import BasicRegistry
from tests.jobs.bundle_cases import compute
from tests.jobs.local_launch import new_session


def read(model: Any, files: Sequence[str]) -> tuple[Sequence[str], Iterator[tuple[Mapping[str, Any], str]]]:
    """A registry's function; files whose name ends in .bad cannot be read."""

    def rows() -> Iterator[tuple[Mapping[str, Any], str]]:
        for file in files:
            bad = file.endswith(".bad")
            yield ({"path": file} if bad else {"path": file, "emotion": "ärger", "p_ärger": 1.0}), "cut off" * bad

    return ("path", "emotion", "p_ärger"), rows()


class Reading(BasicRegistry):
    """A registry that reads files."""

    recipe_schema = dict

    def predict(self, model: Any, files: Sequence[str]) -> tuple[Sequence[str], Iterator[tuple[Mapping[str, Any], str]]]:
        assert (model / "config.json").is_file()
        return read(model, files)


REGISTRY = Reading()


def test_exit_codes(tmp_path: Path) -> None:
    """3 if a file cannot be read, else 0; the model is a folder, whose registry is that of the program."""
    app = typer.Typer()
    add_predict_command(app, Program(tmp_path, f"{__name__}:REGISTRY", "exp"))
    (tmp_path / "config.json").touch()
    for file, code in (("a.wav", 0), ("a.bad", 3)):
        assert CliRunner().invoke(app, [str(tmp_path), "b.wav", file]).exit_code == code


def test_rows_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a file that can be read, a line on stderr for each other one, and progress there too."""
    assert not predict_files(read, tmp_path, ["a,b.wav", "x.bad", "c.wav"], "csv", None)
    written = capsys.readouterr()
    assert written.out.splitlines() == ["path,emotion,p_ärger", '"a,b.wav",ärger,1.0', "c.wav,ärger,1.0"]
    assert {"x.bad: cut off", "predict: 1 file of 3 could not be read", "predict: 3 of 3"} <= set(written.err.splitlines())
    assert predict_files(read, tmp_path, ["a.wav"], "jsonl", tmp_path / "rows")
    assert json.loads((tmp_path / "rows").read_text(encoding="utf-8")) == {"path": "a.wav", "emotion": "ärger", "p_ärger": 1.0}
    assert capsys.readouterr().out == ""


def test_words(tmp_path: Path) -> None:
    """An experiment and a run, a run alone, or a folder; then the files."""
    assert split_words(["exp", "vft/1/0", "a.wav"], "usage") == ("exp", "vft/1/0", ("a.wav",))
    assert split_words(["vft/1/0", "a/b.wav"], "usage") == (None, "vft/1/0", ("a/b.wav",))
    assert split_words([str(tmp_path), "a.wav"], "usage") == (None, str(tmp_path), ("a.wav",))
    for words in (["a.wav"], ["exp", "a.wav"]):
        with pytest.raises(UsageError, match="names no run and no exported folder: usage"):
            split_words(words, "usage")
    assert exported_folder(str(tmp_path)) is None
    (tmp_path / "config.json").touch()
    assert exported_folder(str(tmp_path)) == tmp_path


def test_files(tmp_path: Path) -> None:
    """Given, or one in each line of a file; not both, and not none."""
    listed = tmp_path / "list"
    listed.write_text("a b.wav\n\nc.wav\n")
    assert files_of((), listed, "usage") == ["a b.wav", "c.wav"]
    listed.write_text("\n")
    for given, option, line in (
        ((), listed, "names no files"),
        ((), tmp_path / "none", "none: cannot be read: No such file"),
        (("a.wav",), listed, "name the files in one way"),
        ((), None, "no files: usage"),
    ):
        with pytest.raises(UsageError, match=line):
            files_of(given, option, "usage")
    with pytest.raises(UsageError, match="--format xml: unknown; csv or jsonl"):
        check_format("xml")


def test_a_run_without_a_result(tmp_path: Path) -> None:
    """A finished run is described by its stage and folders; any other is refused."""
    session = new_session(tmp_path)
    (node,) = session.launched.graph.nodes.values()
    with pytest.raises(UsageError, match="vft/1/0: predict needs its finished stages, and finetune vft fold 1"):
        finished_run(session, "vft/1/0")
    compute(session.launched.layout, node)
    found = finished_run(session, "vft/1/0")
    assert (found["stage"], found["upstream"], found["output"].name) == ("finetune", {}, "output")
