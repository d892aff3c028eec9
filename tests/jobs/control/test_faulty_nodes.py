"""When a failure is due to the node: the evidence, and what follows for the stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.control.facts import StageFacts
from jobs.control.faulty_nodes import without_faulty_nodes
from jobs.store.failures import FailureClass
from tests.jobs.fake_registry import make_graph

LAUNCH = 100.0
GRAPH = make_graph(methods=("vft",), folds=("1",), seeds=4)
KEYS = [run.key for run in GRAPH.runs]
FAILED = StageFacts(failures=1, stopped="no corpus", error="no corpus", failure=FailureClass.refused, failed_on="n1", attempts=1)
DONE = StageFacts(done=True, finished=LAUNCH + 1)


def judged(*facts: StageFacts) -> list[StageFacts]:
    before = dict(zip(KEYS, facts, strict=True))
    after = {**before, **without_faulty_nodes(GRAPH, before, LAUNCH)}
    return [after[key] for key in KEYS]


def test_stages_that_failed_once_on_a_faulty_node_are_tried_elsewhere() -> None:
    """Two with the same error there and a result from elsewhere; numbers in the errors may differ."""
    found = judged(replace(FAILED, error="no corpus 12"), replace(FAILED, error="no corpus 7"), DONE, StageFacts())
    assert [(each.stopped, each.request.exclude, each.bad_nodes) for each in found[:2]] == [("", ("n1",), ("n1",))] * 2
    assert found[2:] == [DONE, StageFacts()]


@pytest.mark.parametrize(
    "facts",
    [
        (FAILED, FAILED, StageFacts(), StageFacts()),  # no result: the program may be at fault
        (FAILED, FAILED, replace(DONE, finished=LAUNCH - 1), StageFacts()),  # a result of an earlier program
        (FAILED, StageFacts(), DONE, StageFacts()),  # one failure
        (FAILED, replace(FAILED, error="division by zero"), DONE, StageFacts()),
        (FAILED, FAILED, DONE, replace(FAILED, failed_on="n2")),  # the same error elsewhere
        (replace(FAILED, failed_on=""), replace(FAILED, failed_on=""), DONE, StageFacts()),  # no attempt, or not on Slurm
        (replace(FAILED, failures=2), replace(FAILED, failures=2), DONE, StageFacts()),  # tried again before
        (replace(FAILED, failure=FailureClass.time_limit),) * 2 + (DONE, StageFacts()),
    ],
)
def test_without_evidence_nothing_changes(facts: tuple[StageFacts, ...]) -> None:
    """What was stopped stays so."""
    assert judged(*facts) == list(facts)


def test_after_errors_of_the_file_system_the_node_is_avoided_and_the_pause_stays() -> None:
    """They are tried again anyway; the bound on such attempts still stops a stage."""
    storage = replace(FAILED, failures=0, failure=FailureClass.storage, error="Input/output error", stopped="", not_before=500.0)
    found = judged(storage, replace(storage, stopped="14 attempts"), DONE, StageFacts())
    assert [(each.stopped, each.not_before, each.request.exclude) for each in found[:2]] == [
        ("", 500.0, ("n1",)),
        ("14 attempts", 500.0, ("n1",)),
    ]
