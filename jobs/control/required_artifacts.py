"""Artifacts that stages read of finished upstream stages and that an earlier version of these did not write: found before a launch.

A stage names them in the entry `reads` of its runtime: role -> names. A version that only adds an artifact has the same keys, so results of
before count, and nothing computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Node
from jobs.store.layout import Layout
from jobs.store.records import read_result
from jobs.text import counted

READS = "reads"


@dataclass(frozen=True)
class Lacking:
    """A finished stage without artifacts that a stage to be computed reads."""

    node: Node
    reader: Node
    names: tuple[str, ...]


def lacking_artifacts(graph: Graph, layout: Layout) -> tuple[Lacking, ...]:
    """Finished stages, each once, whose results lack artifacts that a stage without a result reads, in the order of the graph."""
    found: dict[str, Lacking] = {}
    for node in graph.nodes.values():
        reads = node.runtime.get(READS)
        if not reads or read_result(layout.stage(node.stage, node.key), node.key) is not None:
            continue
        for role, names in reads.items():
            parent = graph.nodes[node.upstream[role]]
            result = read_result(layout.stage(parent.stage, parent.key), parent.key)
            missing = () if result is None else tuple(name for name in names if name not in result.artifacts)
            if missing:
                found.setdefault(parent.key, Lacking(parent, node, missing))
    return tuple(found[key] for key in graph.nodes if key in found)


def require_artifacts(graph: Graph, layout: Layout) -> None:
    """UsageError with one line for each kind of stage that lacks artifacts, with the command that makes it be computed again."""
    by_stage: dict[str, list[Lacking]] = {}
    for each in lacking_artifacts(graph, layout):
        by_stage.setdefault(each.node.stage, []).append(each)
    if by_stage:
        raise UsageError("\n".join(_line(stage, lacking, layout) for stage, lacking in by_stage.items()))


def _line(stage: str, lacking: list[Lacking], layout: Layout) -> str:
    first, keys = lacking[0], [each.node.key for each in lacking]
    chosen = keys[0] if len(keys) == 1 else f"{{{','.join(keys)}}}"
    return (
        f"{first.reader.method} reads {', '.join(first.names)}, which an earlier version did not write: "
        f"{counted(len(lacking), f'finished stage {stage}', f'finished stages {stage}')} without it, the first {first.node.name}; "
        f"to compute them again with the same keys and seeds run `rm -r {layout.root / 'store' / stage}/{chosen}`, "
        "or launch with another --results"
    )
