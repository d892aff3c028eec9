"""`list` and `du`: the experiments of a results folder, the space of each, and the results that no experiment needs. They only look."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.console import print_lines, say
from jobs.control.cleaning import leftovers, only_of, unneeded
from jobs.store.layout import STORE, Layout
from jobs.store.usage import Size, StoredStage, size_of, stored_stages
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.commands.owners import Experiments, Launch, Opening

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Row:
    """One experiment: its last launch, its stages in the store, and its space."""

    launch: Launch
    stages: int  # in the store, that it needs or has computed
    size: Size  # of these and of its folder
    folder: Size  # logs, snapshots, tables, records
    alone: Size  # what no other experiment needs, with its folder


@dataclass(frozen=True)
class Usage:
    """The space of a results folder."""

    rows: tuple[Row, ...]
    store: Size
    stages: int
    cache: Size
    unneeded: Size | None  # stages that no experiment needs; None: not known
    leftovers: Size  # checkpoints and outputs that nothing continues


def print_list(root: Path, opening: Opening, *, as_json: bool = False) -> None:
    """A line for each experiment."""
    from jobs.commands.owners import read_experiments

    experiments = read_experiments(root, opening)
    rows = rows_of(root, experiments, tuple(stored_stages(root)))
    if as_json:
        say(json.dumps({"schema": 1, "experiments": [_row_to_json(row) for row in rows]}, indent=1))
        return
    print_lines(list_lines(rows) or [f"no experiment in {root}"])


def print_usage(root: Path, opening: Opening, *, as_json: bool = False) -> None:
    """The space of each experiment, of the store, and of the results that no experiment needs."""
    from jobs.commands.owners import read_experiments

    experiments = read_experiments(root, opening)
    usage = usage_of(root, experiments, tuple(stored_stages(root)))
    if as_json:
        parts = {"store": usage.store, "cache": usage.cache, "unneeded": usage.unneeded, "leftovers": usage.leftovers}
        sizes = {name: None if size is None else asdict(size) for name, size in parts.items()}
        say(json.dumps({"schema": 1, "experiments": [_row_to_json(row) for row in usage.rows], "stages": usage.stages, **sizes}, indent=1))
        return
    print_lines(usage_lines(usage))


def rows_of(root: Path, experiments: Experiments, stages: Sequence[StoredStage]) -> tuple[Row, ...]:
    """A row for each experiment of a results folder."""
    found: list[Row] = []
    for launch in experiments.launches:
        own = [owner for owner in experiments.owners if owner.experiment == launch.experiment]
        needed = [stage for stage in stages if any(owner.may_need(stage) or owner.has_computed(stage) for owner in own)]
        folder = size_of(Layout(root, launch.experiment).folder)
        alone = only_of(launch.experiment, stages, experiments.owners)
        found.append(Row(launch, len(needed), _total(needed) + folder, folder, _total(alone) + folder))
    return tuple(found)


def usage_of(root: Path, experiments: Experiments, stages: Sequence[StoredStage]) -> Usage:
    """The space of a results folder."""
    now, known = time.time(), not any(owner.unknown for owner in experiments.owners)
    free = unneeded(stages, experiments.owners, before=now)
    left = leftovers(stages, experiments.owners, before=now)
    cache = size_of(Layout(root, STORE).cache)
    return Usage(
        rows_of(root, experiments, stages),
        _total(stages) + cache,
        len(stages),
        cache,
        sum((each.size for each in free), Size()) if known else None,
        sum((each.size for each in left), Size()),
    )


def list_lines(rows: Sequence[Row]) -> list[str]:
    """`NAME  RUNS  SIZE  LAST LAUNCH`, one experiment a line."""
    cells = [("experiment", "runs", "size", "last launch")]
    for row in rows:
        launch = row.launch
        runs = "not known" if launch.unknown else f"{launch.done} of {launch.runs}" if launch.runs else "-"
        when = f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(launch.launched))}, {launch.cluster}" if launch.launched else "-"
        sweeps = f", {counted(launch.sweeps, 'sweep')}" if launch.sweeps else ""
        cells.append((launch.experiment, runs, in_units(row.size), when + sweeps))
    return [*_table(cells), *_unknown_lines(rows)] if rows else []


def usage_lines(usage: Usage) -> list[str]:
    """The space of each experiment, then of the store and what can be freed with which command."""
    cells: list[tuple[str, ...]] = [("experiment", "stages", "size", "its own", "folder", "inodes")]
    for row in usage.rows:
        sizes = [in_units(size) for size in (row.size, row.alone, row.folder)]
        cells.append((row.launch.experiment, str(row.stages), *sizes, str(row.size.inodes)))
    lines = [*_table(cells), *_unknown_lines(usage.rows)] if usage.rows else []
    free = "not known" if usage.unneeded is None else in_units(usage.unneeded)
    store = f"{in_units(usage.store)} in {usage.store.inodes} inodes"
    return [
        *lines,
        f"store: {counted(usage.stages, 'stage')}, {store}, of which the cache {in_units(usage.cache)}",
        f"checkpoints and outputs that nothing continues: {in_units(usage.leftovers)} (`clean` frees them)",
        f"stages that no experiment needs: {free} (`clean --unneeded` frees them)",
    ]


def in_units(size: Size) -> str:
    """`0 B`, `12 kB`, `3.4 GB`: decimal units."""
    value, unit = float(size.bytes), 0
    while value >= 999.5 and unit + 1 < len(UNITS):
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if value >= 10 or not unit else f"{value:.1f} {UNITS[unit]}"


def _total(stages: Iterable[StoredStage]) -> Size:
    return sum((stage.size for stage in stages), Size())


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _unknown_lines(rows: Iterable[Row]) -> list[str]:
    return [f"{row.launch.experiment}: its stages are not known: {row.launch.unknown}" for row in rows if row.launch.unknown]


def _row_to_json(row: Row) -> dict[str, object]:
    sizes = {"size": asdict(row.size), "own": asdict(row.alone), "folder": asdict(row.folder)}
    return {**asdict(row.launch), "stages": row.stages, **sizes}
