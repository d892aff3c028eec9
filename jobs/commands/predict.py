"""`predict`: what a finished run or an exported model makes of files, as rows of CSV or JSON lines."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jobs.commands.console import note, warn_if_changed, with_progress
from jobs.commands.export import finished_stages
from jobs.errors import UsageError
from jobs.experiment.lookup import find_target, names_run
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.commands.session import Session

FORMATS = ("csv", "jsonl")
EXPORTED = "config.json"  # a folder with this file is an exported model
Model = Path | Mapping[str, Any]
Predict = Callable[[Model, Sequence[str]], tuple[Sequence[str], Iterator[tuple[Mapping[str, Any], str]]]]


def check_format(form: str) -> None:
    """UsageError for an unknown format."""
    if form not in FORMATS:
        raise UsageError(f"--format {form}: unknown; csv or jsonl")


def split_words(words: Sequence[str], usage: str) -> tuple[str | None, str, tuple[str, ...]]:
    """The experiment, if one is named, the run or folder, and the files. UsageError if the words name no run and no folder."""
    if names_run(words[0]) or Path(words[0]).is_dir():
        return None, words[0], tuple(words[1:])
    if len(words) < 2 or not names_run(words[1]):
        raise UsageError(f"predict: {words[0]!r} names no run and no exported folder: {usage}")
    return words[0], words[1], tuple(words[2:])


def files_of(given: Sequence[str], listed: Path | None, usage: str) -> list[str]:
    """The files to predict: those given, or those that a file lists, one in each line. UsageError if there are none, or both."""
    if given and listed is not None:
        raise UsageError(f"predict: --list {listed} and {given[0]}: name the files in one way")
    if listed is None:
        if not given:
            raise UsageError(f"predict: no files: {usage}")
        return list(given)
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--list {listed}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    files = [line for line in lines if line.strip()]
    if not files:
        raise UsageError(f"--list {listed}: names no files")
    return files


def exported_folder(model: str) -> Path | None:
    """The folder of an exported model; None if the text is no such folder."""
    folder = Path(model)
    return folder.absolute() if (folder / EXPORTED).is_file() else None


def finished_run(session: Session, run: str) -> dict[str, Any]:
    """The stage of a finished run, as a registry's `predict` takes it. UsageError if it has no result, or its files have changed."""
    warn_if_changed(session)
    graph = session.look(ask_slurm=False).graph
    node = find_target(graph, run).node
    explained = session.hints.of("explain", run)
    _, output, upstream = finished_stages(session, graph, node, f"{run}: predict needs its finished stages", explained)
    return {"stage": node.stage, "settings": node.settings, "runtime": node.runtime, "upstream": upstream, "output": output}


def predict_files(predict: Predict, model: Model, files: Sequence[str], form: str, out: Path | None) -> bool:
    """Write a row for each file as soon as it is known; a line on stderr for each that cannot be read. Returns whether all could."""
    columns, rows = predict(model, files)
    with _stream(out) as stream:
        # Taken before the progress bar, which redirects sys.stdout to the terminal.
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if form == "csv":
            writer.writeheader()

        def write(tick: Callable[[int, int], None]) -> int:
            failed = 0
            for number, (row, problem) in enumerate(rows, 1):
                if problem:
                    failed += 1
                    note(f"{row['path']}: {problem}")
                elif form == "csv":
                    writer.writerow(row)
                else:
                    stream.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
                stream.flush()
                tick(number, len(files))
            return failed

        failed = with_progress("predict", write)
    if failed:
        note(f"predict: {counted(failed, 'file')} of {len(files)} could not be read")
    return not failed


@contextmanager
def _stream(out: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file."""
    if out is None:
        yield sys.stdout
        return
    with out.open("w", encoding="utf-8", newline="") as file:
        yield file
