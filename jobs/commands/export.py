"""`export`: what a finished run has trained, written by the registry in a format that other programs load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.console import print_lines, warn_if_changed
from jobs.errors import UsageError
from jobs.experiment.lookup import find_target
from jobs.store.records import read_result, result_intact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs.commands.session import Session
    from jobs.experiment.graph import Graph
    from jobs.store.layout import Layout


def export_run(session: Session, run: str, out: Path, exporter: Callable[..., Sequence[str]], *, merged: bool) -> None:
    """Export a finished run into a new or empty folder, and print what is there. After an error the folder is as it was.

    `exporter`: `export` of the experiment's registry (jobs.experiment.plugin.PluginRegistry).
    """
    warn_if_changed(session)
    graph = session.look(ask_slurm=False).graph
    node = find_target(graph, run).node
    explained = session.hints.of("explain", run)
    outputs = {
        key: _output(graph, session.launched.layout, key, f"{run}: export needs its finished stages", explained)
        for key in (node.key, *node.upstream.values())
    }
    folder = out.absolute()
    with _filled(folder, f"--out {out}"):
        lines = exporter(
            node.stage,
            settings=node.settings,
            runtime=node.runtime,
            upstream={role: outputs[key] for role, key in node.upstream.items()},
            output=outputs[node.key],
            folder=folder,
            merged=merged,
        )
    print_lines((str(folder), *lines))


def _output(graph: Graph, layout: Layout, key: str, what: str, explained: str) -> Path:
    """The folder with the artifacts of a finished stage. UsageError if it has no result, or its artifacts are not those of its result."""
    node = graph.nodes[key]
    stage = layout.stage(node.stage, key)
    result = read_result(stage, key)
    if result is None:
        raise UsageError(f"{what}, and {node.name} has no result; {explained} shows where it stands")
    if not result_intact(stage, result):
        raise UsageError(f"{what}, and files of {node.name} are missing or changed; {explained} lists them")
    return stage.attempt(result.attempt).output


@contextmanager
def _filled(folder: Path, option: str) -> Iterator[None]:
    """Make a folder; if the block fails, remove what is in it. UsageError for one that is not empty."""
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{option}: not an empty folder; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        raise
