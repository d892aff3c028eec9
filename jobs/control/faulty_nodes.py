"""Finds nodes on which several stages fail with the same error while no other node shows it, e.g. without a mount or a GPU. Pure.

An error of the code or the configuration is not retried. A node that raises one in every stage within seconds would so end a whole grid,
because it is always free for the next. Evidence that the node is at fault, from all attempts since the launch, also of stages that are done
by now: at least `ALIKE` stages of a kind failed there with the same error, none failed with it on another node, and another stage of that
kind has got its result on another node. The first such failure of a stage is then one of the node (class `node`): free, and the node is
excluded until the next launch. A stage that fails with an error of the code once more, on whatever node, is stopped. Errors of the file
system are retried anyway, and pass: for them the node is excluded until those stages have their results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from jobs.control.facts import Blamed, StageFacts
from jobs.control.holds import error_pattern
from jobs.experiment.graph import Graph, Node
from jobs.store.failures import FailureClass
from jobs.store.launches import in_launch

ALIKE = 2  # stages of a kind that fail with the same error on a node, and on no other
NOT_RETRIED = (FailureClass.code, FailureClass.refused)
BLAMABLE = (*NOT_RETRIED, FailureClass.storage)
Fault = tuple[str, str, str, str]  # stage, method, error pattern, Slurm node


def fault_of(node: Node, failed: Blamed) -> Fault:
    """What the evidence is collected by: equal for failures of one kind of stage with the same error on the same Slurm node."""
    return node.stage, node.method, error_pattern(failed.error), failed.node


def faulty_nodes(graph: Graph, failed: Mapping[str, Iterable[Blamed]], facts: Mapping[str, StageFacts], since: float) -> Collection[Fault]:
    """The faults for which there is evidence. `failed`: failures with an error, by key; `since`: time of the last launch."""
    keys: dict[Fault, set[str]] = {}
    for key, failures in failed.items():
        for each in failures:
            if each.error and each.node and in_launch(each.launch, each.started, since):
                keys.setdefault(fault_of(graph.nodes[key], each), set()).add(key)
    if not keys:
        return ()
    nodes = Counter(fault[:3] for fault in keys)
    results: dict[tuple[str, str], set[str]] = {}  # of a kind since the launch -> the nodes that they are from
    for key, node in graph.nodes.items():
        if key in facts and facts[key].done and facts[key].finished >= since:
            results.setdefault((node.stage, node.method), set()).add(facts[key].node)
    return {
        fault
        for fault, alike in keys.items()
        if len(alike) >= ALIKE and nodes[fault[:3]] == 1 and results.get(fault[:2], set()) - {fault[3]}
    }
