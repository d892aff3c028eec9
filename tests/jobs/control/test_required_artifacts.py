"""Finished stages of an earlier version that lack an artifact which a stage to be computed reads: refused before a launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.required_artifacts import lacking_artifacts, require_artifacts
from jobs.errors import UsageError
from jobs.experiment.graph import Node
from jobs.store.layout import Layout
from jobs.store.records import Result, write_result
from tests.jobs.slurm_cases import graph_of, node


def finish(layout: Layout, done: Node, *names: str) -> None:
    """A result with artifacts of these names."""
    digests = dict.fromkeys(names, "0" * 64)
    write_result(
        layout.stage(done.stage, done.key),
        Result(done.key, done.stage, 1, done.fold, 0, "test", "0" * 64, {}, done.upstream, 1, {}, {}, digests),
    )


def test_only_a_stage_that_is_to_be_computed_needs_them(tmp_path: Path) -> None:
    """One line names the reader, the number, the first stage and a command; nothing where there is nothing to compute."""
    layout = Layout(tmp_path, "exp")
    first, second = (node(name * 20, "finetune", fold=fold) for name, fold in (("a", "1"), ("b", "2")))
    readers = [
        replace(node(name * 20, "concat", {"audio": parent.key}, method="concat"), runtime={"reads": {"audio": ["pooled"]}})
        for name, parent in (("c", first), ("d", second))
    ]
    graph = graph_of([first, second, *readers])
    require_artifacts(graph, layout)
    finish(layout, first, "predictions.csv")
    finish(layout, second, "predictions.csv")
    with pytest.raises(UsageError) as caught:
        require_artifacts(graph, layout)
    assert str(caught.value) == (
        "concat reads pooled, which an earlier version did not write: 2 finished stages finetune without it, the first "
        "finetune vft fold 1 seed 0 [aaaaaaaa]; to compute them again with the same keys and seeds run "
        f"`rm -r {tmp_path}/store/finetune/{{{first.key},{second.key}}}`, or launch with another --results"
    )
    finish(layout, readers[0], "predictions.csv")
    assert [each.node for each in lacking_artifacts(graph, layout)] == [second]
    finish(layout, second, "predictions.csv", "pooled")
    require_artifacts(graph, layout)
