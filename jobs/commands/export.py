"""`export`: what a finished run has trained, written by the registry in a format that other programs load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jobs.commands.console import note, print_lines, warn_if_changed
from jobs.commands.model_facts import model_facts
from jobs.errors import InternalError, UsageError
from jobs.experiment.lookup import find_target
from jobs.store.records import read_result, result_intact
from jobs.worker.processes import limit_threads
from jobs.worker.task import compute, read_corpus_digest, stage_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs.commands.session import Session
    from jobs.experiment.graph import Graph, Node
    from jobs.store.layout import Layout
    from jobs.store.records import Result
    from jobs.worker.task import Workplace


def export_run(
    session: Session,
    run: str,
    out: Path,
    exporter: Callable[..., Sequence[str]],
    *,
    merged: bool = False,
    onnx: bool = False,
    licence: str = "",
) -> None:
    """Export a finished run into a new or empty folder, and print what is there. After an error the folder is as it was.

    `exporter`: `export` of the experiment's registry (jobs.experiment.plugin.PluginRegistry). InternalError if it had to train the run
    again, and the model does not predict what the run did.
    """
    warn_if_changed(session)
    report = session.look(ask_slurm=False)
    target = find_target(report.graph, run)
    node = target.node
    explained = session.hints.of("explain", run)
    result, output, upstream = finished_stages(session, report.graph, node, f"{run}: export needs its finished stages", explained)
    folder = out.absolute()
    with _filled(folder, f"--out {out}"), _computed_again(session.place, node, result, upstream, folder) as again:
        try:
            lines = exporter(
                node.stage,
                settings=node.settings,
                runtime=node.runtime,
                upstream=upstream,
                output=output,
                folder=folder,
                merged=merged,
                facts=model_facts(session, report, target, result, licence),
                train_again=again,
                onnx=onnx,
            )
        except Exception as error:
            if getattr(error, "not_reproduced", False):
                raise InternalError(f"{run}: {error}") from error
            raise
    print_lines((str(folder), *lines))


def finished_stages(session: Session, graph: Graph, node: Node, what: str, explained: str) -> tuple[Result, Path, dict[str, Path]]:
    """The result of a stage, the folder of its artifacts, and those of its upstream stages by role. UsageError as of `_finished`."""
    layout = session.launched.layout
    result, output = _finished(graph, layout, node.key, what, explained)
    return result, output, {role: _finished(graph, layout, key, what, explained)[1] for role, key in node.upstream.items()}


def _finished(graph: Graph, layout: Layout, key: str, what: str, explained: str) -> tuple[Result, Path]:
    """The result of a stage and the folder of its artifacts. UsageError if it has none, or its artifacts are not those of its result."""
    node = graph.nodes[key]
    stage = layout.stage(node.stage, key)
    result = read_result(stage, key)
    if result is None:
        raise UsageError(f"{what}, and {node.name} has no result; {explained} shows where it stands")
    if not result_intact(stage, result):
        raise UsageError(f"{what}, and files of {node.name} are missing or changed; {explained} lists them")
    return result, stage.attempt(result.attempt).output


@contextmanager
def _computed_again(
    place: Workplace, node: Node, result: Result, upstream: Mapping[str, Path], folder: Path
) -> Iterator[Callable[[Mapping[str, Any]], Path]]:
    """A function that computes a finished stage once more, in this process and beside `folder`, with entries of its runtime changed.

    It takes as many threads as the result states, on which the rounding of sums depends. What it wrote is removed at the end of the block.
    """
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:

        def again(changed: Mapping[str, Any]) -> Path:
            if read_corpus_digest(place) != place.corpus_digest:
                raise UsageError(f"corpus {place.corpus}: prepared anew since the launch, so that {node.name} cannot be trained again")
            limit_threads(int(result.provenance.get("threads") or 1))
            note(f"{node.name}: its weights were not kept; it is trained again here")
            folders = {"output": Path(name) / "output", "checkpoint": Path(name) / "checkpoint"}
            for each in folders.values():
                each.mkdir()
            relief = int(result.provenance.get("relief") or 0)
            changed_node = replace(node, runtime={**node.runtime, **changed})
            compute(stage_request(changed_node, place, upstream=upstream, **folders, relief=relief, attempt=0), None, lambda: False, note)
            return folders["output"]

        yield again


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
