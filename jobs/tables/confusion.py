"""Confusion matrices: one CSV per run, one CSV and one picture per method. Rows are the true class, columns the predicted one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from jobs.experiment.graph import Graph
from jobs.store.records import Result, write_bytes, write_text
from jobs.store.scores import Confusion, confusion_of, summed
from jobs.tables.format import csv_text
from jobs.text import counted

CORNER = "true\\predicted"


def to_csv(confusion: Confusion) -> str:
    """CSV with a header of predicted classes and one row per true class."""
    rows = [(name, *row) for name, row in zip(confusion.classes, confusion.counts, strict=True)]
    return csv_text([CORNER, *confusion.classes], rows)


def picture(confusion: Confusion, title: str) -> bytes:
    """A PNG: colour is the share of the true class, text the count and the share in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = len(confusion.classes)
    shares = [[count / max(sum(row), 1) for count in row] for row in confusion.counts]
    side = 2.0 + 0.9 * size
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    # Names are data: without parse_math=False a dollar sign in one would be read as a formula.
    axes.set_xticks(range(size), confusion.classes, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(size), confusion.classes, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, parse_math=False)
    for row in range(size):
        for column in range(size):
            share = shares[row][column]
            text = f"{confusion.counts[row][column]}\n{100 * share:.0f} %"
            axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.5 else "black")
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    return data.getvalue()


def write_confusions(folder: Path, graph: Graph, results: Mapping[str, Result], labels: Mapping[str, str]) -> tuple[Path, ...]:
    """METHOD/fold_F_slot_S_seed_N.csv per run, METHOD.csv and METHOD.png per method; returns the paths of the latter two.

    Unchanged files are not written again; files of other runs and methods are removed.
    """
    by_method: dict[str, list[Confusion]] = {}
    current: set[Path] = set()
    for run in graph.runs:
        confusion = confusion_of(results[run.key]) if run.key in results else None
        if confusion is not None:
            by_method.setdefault(run.method, []).append(confusion)
            name = f"fold_{file_name(run.fold)}_slot_{run.slot}_seed_{run.seed}.csv"
            current.add(folder / file_name(run.method) / name)
            _write_changed(folder / file_name(run.method) / name, to_csv(confusion))
    written: list[Path] = []
    for method, found in by_method.items():
        total = summed(found)
        table = folder / f"{file_name(method)}.csv"
        image = table.with_name(f"{file_name(method)}.png")
        if _write_changed(table, to_csv(total)) or not image.is_file():
            write_bytes(image, picture(total, f"{labels.get(method, method)}, {counted(len(found), 'run')}"))
        written.extend((table, image))
    _remove_others(folder, {*current, *written})
    return tuple(written)


def file_name(text: str) -> str:
    """A name from a configuration as part of a file name: letters, digits, `_`, `-`, `.`, the rest percent-encoded."""
    encoded = quote(text, safe="")
    return encoded.replace(".", "%2E", 1) if encoded.startswith(".") else encoded


def _remove_others(folder: Path, current: set[Path]) -> None:
    """Remove the matrices of runs and methods that are not in `current`, with their pictures; any other file stays."""
    for path in (*folder.glob("*/fold_*_slot_*_seed_*.csv"), *folder.glob("*.csv")):
        if path not in current and path.read_text(encoding="utf-8", errors="replace").startswith(f"{CORNER},"):
            path.unlink(missing_ok=True)
            path.with_suffix(".png").unlink(missing_ok=True)


def _write_changed(path: Path, text: str) -> bool:
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True
