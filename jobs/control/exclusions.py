"""Which Slurm nodes the arrays of an experiment exclude because they failed before. Pure.

An array keeps the `--exclude` that it was submitted with until it has ended, so exclusion is for single nodes that fail. Where more than
half of the nodes have failed, the cause is something that they share (power, network, file system), which is repaired for all of them: then
they are not excluded, or what is submitted next would run on the few other nodes alone while those that failed are idle and healthy again.
Slurm itself starts nothing on nodes that are down, and a stage still avoids the nodes on which its own jobs failed to start. Nodes with
evidence that they are faulty (`jobs.control.faulty_nodes`) stay excluded, because their error is one that no other node has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from jobs.control.facts import StageFacts

NODE_FAILURES = 2  # after which a Slurm node is excluded


def excluded_nodes(facts: Mapping[str, StageFacts], nodes: int) -> tuple[str, ...]:
    """Slurm nodes, sorted, that failed `NODE_FAILURES` times under this experiment. `nodes`: as for `unless_shared`."""
    blamed = Counter(node for fact in facts.values() for node in fact.bad_nodes)
    failed = {node for node, times in blamed.items() if times >= NODE_FAILURES}
    faulty = failed & {node for fact in facts.values() for node in fact.faulty_nodes}
    return tuple(sorted(faulty.union(unless_shared(failed - faulty, faulty, nodes))))


def unless_shared(failed: Collection[str], others: Collection[str], nodes: int) -> Collection[str]:
    """The failed nodes, or none if more than half of the nodes would be excluded with them and `others`.

    `nodes`: how many the partition has, in whatever state; 0: not known, all that failed are excluded.
    """
    return failed if not nodes or 2 * len({*failed, *others}) <= nodes else ()
