"""Excludes nodes on which several stages fail with the same error while no other node shows it, e.g. without a mount or a GPU. Pure.

An error of the code or the configuration is not retried. A node that raises one in every stage within seconds would so end a whole grid,
because it is always free for the next. Evidence that the node is at fault: at least `ALIKE` stages of a kind failed there with the same
error, none failed with it on another node, and another stage of that kind has got its result since the launch. Their next attempt excludes
the node; one that then fails with an error of the code anywhere is stopped, as it has failed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jobs.control.facts import StageFacts
from jobs.control.holds import error_pattern
from jobs.experiment.graph import Graph
from jobs.store.failures import FailureClass

ALIKE = 2  # stages of a kind that fail with the same error on a node, and on no other
BLAMABLE = (FailureClass.code, FailureClass.refused, FailureClass.storage)


def without_faulty_nodes(graph: Graph, facts: Mapping[str, StageFacts], since: float) -> dict[str, StageFacts]:
    """The facts of stages that failed on a faulty node, changed so that they are tried elsewhere. `since`: time of the last launch."""
    failed: dict[tuple[str, str, str], dict[str, list[str]]] = {}  # stage, method and error -> node -> keys
    for key, fact in facts.items():
        if fact.failed_on and fact.failure in BLAMABLE and key in graph.nodes:
            node = graph.nodes[key]
            failed.setdefault((node.stage, node.method, error_pattern(fact.error)), {}).setdefault(fact.failed_on, []).append(key)
    alike = {kind: of_nodes for kind, of_nodes in failed.items() if len(of_nodes) == 1 and len(next(iter(of_nodes.values()))) >= ALIKE}
    if not alike:
        return {}
    succeeded = {(graph.nodes[key].stage, graph.nodes[key].method) for key, fact in facts.items() if fact.done and fact.finished >= since}
    return {
        key: _tried_elsewhere(facts[key])
        for (stage, method, _), of_nodes in alike.items()
        if (stage, method) in succeeded
        for keys in of_nodes.values()
        for key in keys
    }


def _tried_elsewhere(fact: StageFacts) -> StageFacts:
    """The facts without the reason to stop if this was the stage's only failure, and with its node excluded."""
    if fact.failed_on in fact.request.exclude:
        return fact
    final = fact.failure is not FailureClass.storage
    if final and fact.failures > 1:
        return fact
    return replace(
        fact,
        stopped="" if final else fact.stopped,
        request=replace(fact.request, exclude=tuple(sorted({*fact.request.exclude, fact.failed_on}))),
        bad_nodes=(*fact.bad_nodes, fact.failed_on),
    )
