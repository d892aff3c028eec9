"""Which stages are held because others of their kind show that they would fail too: the user is told instead of every run computed. Pure.

Two rules. The first stages of a kind all failed with the same error of the code or the configuration; or the first runs of a method
diverged, so that its recipe does not learn. What is running is not stopped; what is queued is withdrawn. A hold follows from the results
at every pass: it ends when they no longer call for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from jobs.control.facts import StageFacts
from jobs.experiment.graph import Graph, with_upstream
from jobs.store.failures import FailureClass

ALIKE = 3  # stages of a kind that all fail with the same error before the rest of them is held
FIRST = 3  # runs of a method that all diverge before the rest of them is held
FIRST_RUNS = 10  # or more than half of so many, or of all that have ended
_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8,}|[0-9]+")  # what differs between equal errors: counts, addresses, keys
_BLANK = StageFacts()


def held_stages(
    graph: Graph, facts: Mapping[str, StageFacts], needed: Collection[str], since: float, *, diverging: bool = True
) -> dict[str, str]:
    """Key -> why the stage is held. `since`: time of the last launch, seconds since the epoch; `diverging`: apply the second rule."""
    alike = _alike(graph, facts, needed, since)
    nodes = ((key, graph.nodes[key]) for key in needed) if alike else ()
    found = {key: alike[node.stage, node.method] for key, node in nodes if (node.stage, node.method) in alike}
    methods = diverging_methods(graph, facts) if diverging else {}
    if methods:
        others = set(with_upstream(graph, (run.key for run in graph.runs if run.method not in methods)))
        for run in graph.runs:
            if run.method in methods:
                found.update(dict.fromkeys(set(with_upstream(graph, [run.key])) - others, methods[run.method]))
    return found


def diverging_methods(graph: Graph, facts: Mapping[str, StageFacts]) -> dict[str, str]:
    """Method -> why it is held: all of its runs that have ended diverged, at least `FIRST`, or more than half of the first ten.

    While fewer than ten have ended, more than five that diverged are enough; later the share of all that have ended counts.
    """
    ended: dict[str, list[str]] = {}
    for run in (*graph.superseded, *graph.runs):
        fact = facts.get(run.key, _BLANK)
        if fact.done or fact.diverged:
            ended.setdefault(run.method, []).append(fact.diverged)
    found: dict[str, str] = {}
    for method, outcomes in ended.items():
        reasons = [reason for reason in outcomes if reason]
        if len(reasons) == len(outcomes) >= FIRST or 2 * len(reasons) > max(FIRST_RUNS, len(outcomes)):
            found[method] = (
                f"held: {len(reasons)} of the first {len(outcomes)} runs of {method} diverged ({reasons[0]}): its recipe does not learn; "
                "change it, or set policy.hold_diverging=false, and launch again"
            )
    return found


def error_pattern(error: str) -> str:
    """What equal errors have in common: counts, addresses and keys are replaced."""
    return _NUMBER.sub("#", error)


def _alike(graph: Graph, facts: Mapping[str, StageFacts], needed: Iterable[str], since: float) -> dict[tuple[str, str], str]:
    """(stage, method) -> why the rest of them is held: the first ones all failed with the same error."""
    failed: dict[tuple[str, str], list[str]] = {}
    succeeded: set[tuple[str, str]] = set()
    for key in needed:
        node, fact = graph.nodes[key], facts.get(key, _BLANK)
        if fact.done and fact.finished >= since:
            succeeded.add((node.stage, node.method))
        elif fact.stopped and fact.failure in (FailureClass.code, FailureClass.refused):
            failed.setdefault((node.stage, node.method), []).append(fact.error)
    found: dict[tuple[str, str], str] = {}
    for kind, errors in failed.items():
        if kind not in succeeded and len(errors) >= ALIKE and len(set(map(error_pattern, errors))) == 1:
            found[kind] = f"held: the first {len(errors)} of {kind[0]} {kind[1]} all failed alike ({errors[0]}); fix that and launch again"
    return found
