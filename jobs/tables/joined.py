"""CSV files that runs leave as artifacts (predictions), joined: one file for all runs, with the run in front of each row."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from jobs.experiment.graph import Graph, Run
from jobs.store.layout import Layout
from jobs.store.records import Result, write_text
from jobs.tables.format import csv_text
from jobs.text import counted

RUN_COLUMNS = ("corpus", "method", "fold", "slot", "seed")


def write_joined(
    folder: Path, layout: Layout, graph: Graph, results: Mapping[str, Result], reserved: Collection[str] = ()
) -> tuple[list[Path], list[str]]:
    """Write one file into `folder` for each name of a CSV artifact of the runs that fill the slots, the names in `reserved` left out.

    Its columns are `RUN_COLUMNS` and those of the artifacts, in the order in which they appear. Returns the paths, and a line for each
    file that lacks a run whose artifact is gone.
    """
    finished = [run for run in graph.runs if run.key in results]
    names = dict.fromkeys(name for run in finished for name in results[run.key].artifacts if _is_csv(name) and name not in reserved)
    paths, lines = [], []
    for name in names:
        rows: list[dict[str, str]] = []
        gone: list[Run] = []
        for run in (run for run in finished if name in results[run.key].artifacts):
            node, result = graph.nodes[run.key], results[run.key]
            file = layout.stage(node.stage, run.key).attempt(result.attempt).output / name
            first = dict(zip(RUN_COLUMNS, (graph.corpus, run.method, run.fold, str(run.slot), str(run.seed)), strict=True))
            try:
                rows.extend({**row, **first} for row in _rows(file))
            except OSError:
                gone.append(run)
        columns = list(dict.fromkeys((*RUN_COLUMNS, *(column for row in rows for column in row))))
        paths.append(folder / name)
        write_text(paths[-1], csv_text(columns, ([row.get(column, "") for column in columns] for row in rows)))
        if gone:
            lines.append(f"{paths[-1]}: without {counted(len(gone), 'run')} whose {name} cannot be read, the first {gone[0].name}")
    return paths, lines


def _is_csv(name: str) -> bool:
    return PurePosixPath(name).suffix == ".csv" and "/" not in name


def _rows(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        yield from csv.DictReader(text)
