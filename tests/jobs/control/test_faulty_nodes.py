"""When a failure is due to the node: the evidence, and what follows for the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from jobs.control.facts import Blamed, StageFacts
from jobs.control.failure_policy import blamed_nodes, judge_stages
from jobs.control.faulty_nodes import faulty_nodes
from jobs.control.observe import Observation, PassContext, StageRecords
from jobs.store.attempts import AttemptFiles
from jobs.store.failures import FailureClass
from jobs.store.records import Claim, Ending, Outcome
from tests.jobs.fake_registry import make_graph

LAUNCH = 100.0
GRAPH = make_graph(methods=("vft",), folds=("1",), seeds=4)
KEYS = [run.key for run in GRAPH.runs]
FAILED = Blamed("n1", LAUNCH + 1, LAUNCH, "no corpus at /data/7")
DONE = StageFacts(done=True, finished=LAUNCH + 1, node="n2")
CODE, REFUSED, STORAGE, MEMORY = FailureClass.code, FailureClass.refused, FailureClass.storage, FailureClass.memory


def faults(*failed: Blamed, result: StageFacts = DONE) -> set[str]:
    """The faulty nodes. The stages of `failed` have one failure each, the last one has the result."""
    return {
        fault[3] for fault in faulty_nodes(GRAPH, {key: [each] for key, each in zip(KEYS, failed, strict=False)}, {KEYS[3]: result}, LAUNCH)
    }


def test_a_node_on_which_two_stages_failed_alike_is_at_fault() -> None:
    """There is a result from elsewhere; numbers in the errors may differ."""
    assert faults(FAILED, replace(FAILED, error="no corpus at /data/12")) == {"n1"}
    assert faults(FAILED, FAILED, replace(FAILED, node="n2", error="division by zero")) == {"n1"}
    assert faults(FAILED, FAILED, result=replace(DONE, node="")) == {"n1"}, "computed outside of Slurm"


@pytest.mark.parametrize(
    "failed",
    [
        (FAILED,),
        (FAILED, replace(FAILED, error="division by zero")),
        (FAILED, FAILED, replace(FAILED, node="n2")),  # the same error elsewhere
        (replace(FAILED, node=""),) * 2,  # not on Slurm
        (replace(FAILED, launch=LAUNCH - 1),) * 2,  # before the launch
        (replace(FAILED, error=""),) * 2,  # the node failed by Slurm's word
    ],
)
def test_without_evidence_no_node_is_at_fault(failed: tuple[Blamed, ...]) -> None:
    """One failure, different errors or different nodes are none."""
    assert not faults(*failed)


@pytest.mark.parametrize("result", [StageFacts(), replace(DONE, finished=LAUNCH - 1), replace(DONE, node="n1")])
def test_without_a_result_from_another_node_the_program_may_be_at_fault(result: StageFacts) -> None:
    """A result of an earlier program tells nothing, nor does one of the same node."""
    assert not faults(FAILED, FAILED, result=result)


def records(*attempts: tuple[FailureClass, str]) -> StageRecords:
    """Failed attempts of a stage: class and node of each."""
    files = []
    for number, (failure, node) in enumerate(attempts, 1):
        claim = Claim(number, node, 1, "", LAUNCH + number, f"{number}_0", node)
        ending = Ending.refused if failure is REFUSED else Ending.failed
        outcome = Outcome(number, ending, "Error", f"{failure.value} {number}", "", node, 1.0, claim.slurm_job, failure.name)
        files.append(AttemptFiles(number, claim, outcome, alive=False, published=False))
    return StageRecords(tuple(files))


def judged(first: StageRecords, second: StageRecords, *, evidence: Mapping[str, tuple[Blamed, ...]] | None = None) -> list[StageFacts]:
    """The facts of two stages without a result; the other two have theirs from n2."""
    facts = {KEYS[0]: StageFacts(), KEYS[1]: StageFacts(), KEYS[2]: DONE, KEYS[3]: DONE}
    observed = Observation(facts, {KEYS[0]: first, KEYS[1]: second}, evidence or {})
    found = judge_stages(GRAPH, observed, PassContext(since=LAUNCH))
    return [found[key] for key in KEYS]


@pytest.mark.parametrize("failure", [CODE, REFUSED])
def test_a_first_error_on_a_faulty_node_is_a_failure_of_the_node(failure: FailureClass) -> None:
    """Tried again, free of charge, and the node is excluded once two stages blame it."""
    for fact in judged(records((failure, "n1")), records((failure, "n1")))[:2]:
        assert (fact.stopped, fact.failures, fact.failure, fact.bad_nodes) == ("", 0, FailureClass.node, ("n1",))
        assert fact.faulty_nodes == ("n1",)
        assert fact.error == f"Error: {failure.value} 1"


def test_what_else_failed_counts() -> None:
    """Attempts beside the one that the node is at fault for are charged as ever, and bounded."""
    first, second = judged(records((MEMORY, "n2"), (CODE, "n1")), records((CODE, "n1"), (MEMORY, "n2")))[:2]
    assert [(fact.stopped, fact.failures, fact.request.relief) for fact in (first, second)] == [("", 1, 1)] * 2
    stopped = judged(records(*[(MEMORY, "n2")] * 3, (CODE, "n1")), records((CODE, "n1")))[0]
    assert "memory ran out 3 times" in stopped.stopped


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_second_error_of_a_stage_is_final(node: str) -> None:
    """On the same node or elsewhere; the other stage is tried again as long as the errors are not the same elsewhere."""
    first, second = judged(records((CODE, "n1"), (REFUSED, node)), records((CODE, "n1")))[:2]
    assert (first.stopped, first.failures) == ("Error: refused 2", 1)
    assert not second.stopped
    first, second = judged(records((CODE, "n1"), (CODE, "n2")), records((CODE, "n1")))[:2]
    assert (first.failures, second.failures) == (2, 1)
    assert first.stopped
    assert second.stopped


def test_a_stage_that_got_its_result_elsewhere_remains_evidence() -> None:
    """The node is excluded by it too."""
    evidence = {KEYS[2]: (Blamed("n1", LAUNCH + 1, LAUNCH, "Error: code 1"),)}
    first, _, third, _ = judged(records((CODE, "n1")), StageRecords(), evidence=evidence)
    assert (first.stopped, first.bad_nodes, third.bad_nodes) == ("", ("n1",), ("n1",))
    assert third.faulty_nodes == ("n1",)
    first, _, third, _ = judged(records((CODE, "n1")), StageRecords(), evidence={KEYS[2]: (replace(evidence[KEYS[2]][0], error="other"),)})
    assert (first.stopped, first.bad_nodes, third.bad_nodes) == ("Error: code 1", (), ())


@pytest.mark.parametrize("failure", [CODE, STORAGE])
def test_what_is_kept_of_a_finished_stage(failure: FailureClass) -> None:
    """Errors of the code on a node; those of a file system pass, and would exclude the node of a long experiment for ever."""
    kept = blamed_nodes(records((failure, "n1")), "exp")
    assert [(each.node, each.error) for each in kept] == ([("n1", "Error: code 1")] if failure is CODE else [])


def test_after_errors_of_the_file_system_the_node_is_avoided_and_the_pause_stays() -> None:
    """They are tried again anyway; the bound on such attempts still stops a stage."""
    first, second = judged(records((STORAGE, "n1")), records(*[(STORAGE, "n1")] * 15))[:2]
    assert first.failure is STORAGE
    assert first.not_before > LAUNCH
    assert first.bad_nodes == ("n1",)
    assert "the file system failed under 15 attempts" in second.stopped
