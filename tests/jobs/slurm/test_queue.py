"""Submission records joined with one reading of the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.control.facts import Departure, InFlight, Phase
from jobs.slurm.parse import QueuedElement
from jobs.slurm.queue import cancellable, departures_of, duplicates, failed_launches, own_elements, stages_in_flight, stuck_keys
from jobs.slurm.submissions import State, Submission


def record(job: str, *tasks: tuple[str, ...], name: str = "", **facts: object) -> Submission:
    known = Submission(name or f"trial.{job}", "finetune", "vft", tasks, 100.0, State.submitted if job else State.intent, job)
    return replace(known, **facts)  # type: ignore[arg-type]


def element(job: str, state: str = "PENDING", reason: str = "None", name: str = "") -> QueuedElement:
    return QueuedElement(job, state, reason, name or f"trial.{job.partition('_')[0]}")


def test_a_job_id_that_slurm_reused_for_another_job() -> None:
    """An array that Slurm forgot is not mistaken for another job with its id; a second array of its name is ours."""
    forgotten = [record("12", ("a",), name="trial.x")]
    assert own_elements(forgotten, [element("12_0", "RUNNING", name="other")]) == ()
    twice = [record("13", ("a",), name="trial.x+13")]
    assert len(own_elements(twice, [element("13_0", name="trial.x")])) == 1


def test_which_element_computes_a_stage() -> None:
    """Elements of submitted records, and all stages of an intent; jobs of others and indices that no record has are ignored."""
    records = [record("12", ("a", "b"), ("c",), ("d",)), record("", ("e",), name="trial.x")]
    queue = [element("12_0", "RUNNING"), element("12_1"), element("12_9"), element("13_0"), element("12"), element("7_0")]
    elements = own_elements(records, queue)
    assert [own.element.job for own in elements] == ["12_0", "12_1"]
    running, queued = InFlight(Phase.running, "12_0"), InFlight(Phase.queued, "12_1")
    assert stages_in_flight(records, elements) == {"a": running, "b": running, "c": queued, "e": InFlight(Phase.queued, "?trial.x")}


def test_a_running_element_is_preferred_to_a_pending_one() -> None:
    """Of several elements with one stage, others depend on the one that is kept; a withdrawn one comes last."""
    records = [record("12", ("a",), cancelled=(0,)), record("13", ("a",)), record("14", ("a",))]
    found = stages_in_flight(records, own_elements(records, [element("12_0"), element("13_0"), element("14_0", "RUNNING")]))
    assert found == {"a": InFlight(Phase.running, "14_0")}
    found = stages_in_flight(records, own_elements(records, [element("12_0"), element("14_0"), element("13_0")]))
    assert found == {"a": InFlight(Phase.queued, "13_0")}


def test_cancellable() -> None:
    """Pending elements that compute no other stage; one that has a node is left."""
    records = [record("12", ("a", "b"), ("c",), ("d",), ("e",))]
    queue = [element("12_0"), element("12_1", "RUNNING"), element("12_2"), element("12_3", "CONFIGURING")]
    elements = own_elements(records, queue)
    assert [each.element.job for each in cancellable(elements, ["a", "c", "d", "e"])] == ["12_2"]
    assert [each.element.job for each in cancellable(elements, ["a", "b"])] == ["12_0"]


KEYS = st.sets(st.sampled_from("abcd"), min_size=1, max_size=3).map(lambda keys: tuple(sorted(keys)))
ELEMENTS = st.lists(st.tuples(KEYS, st.sampled_from(["PENDING", "RUNNING", "COMPLETING"])), max_size=8)


@given(ELEMENTS)
def test_of_duplicates_one_element_is_kept(drawn: list[tuple[tuple[str, ...], str]]) -> None:
    """However stages are spread over elements: only pending ones are withdrawn, every stage keeps an element, one pass is enough."""
    records = [record(str(number), keys) for number, (keys, _) in enumerate(drawn, 1)]
    elements = own_elements(records, [element(f"{number}_0", state) for number, (_, state) in enumerate(drawn, 1)])
    gone = duplicates(elements)
    left = [each for each in elements if each not in gone]
    assert all(each.pending for each in gone)
    assert {key for each in left for key in each.keys} == {key for each in elements for key in each.keys}
    running = {key for each in left if not each.pending for key in each.keys}
    assert all(any(key not in running for key in each.keys) for each in left if each.pending)
    assert duplicates(left) == ()


def test_the_younger_duplicate_is_withdrawn() -> None:
    """Of two pending ones the higher job id; a running one stays, whatever its id."""
    records = [record("9", ("a",)), record("10", ("a",))]
    (gone,) = duplicates(own_elements(records, [element("9_0"), element("10_0")]))
    assert gone.element.job == "10_0"
    (gone,) = duplicates(own_elements(records, [element("9_0"), element("10_0", "RUNNING")]))
    assert gone.element.job == "9_0"
    assert duplicates(own_elements(records, [element("9_0", "RUNNING"), element("10_0", "RUNNING")])) == ()


def test_stuck() -> None:
    """Every stage of the element, with the reason."""
    records = [record("12", ("a", "b"), ("c",), ("d",))]
    queue = [element("12_0", reason="BadConstraints"), element("12_1", reason="Priority"), element("12_2", reason="JobHeldUser")]
    found = stuck_keys(own_elements(records, queue))
    assert found == {
        "a": "no node fits its request (BadConstraints)",
        "b": "no node fits its request (BadConstraints)",
        "d": "held by you: `scontrol release` lets it start (JobHeldUser)",
    }


def test_departures() -> None:
    """One for each stage of each element that has left, oldest first, open and closed records alike; only of what is asked for."""
    first = record("12", ("a", "b"), ("c",), left={"0": 130.0, "1": 140.0}, ended={"0": "NODE_FAIL", "1": "FAILED"}, cancelled=(1,))
    second = record("13", ("a",), ("d",), created=200.0, left={"0": 230.0})
    assert departures_of([second, first], {"a", "c", "x"}, 1000) == {
        "a": (Departure("a", "12_0", "NODE_FAIL", 100.0, 130.0), Departure("a", "13_0", "", 200.0, 230.0)),
        "c": (Departure("c", "12_1", "FAILED", 100.0, 140.0, withdrawn=True),),
    }
    placed = record("14", ("a",), left={"0": 1.0}, ended={"0": "FAILED"}, nodes={"0": "n3"})
    assert [each.node for each in departures_of([placed], {"a"}, 1000)["a"]] == ["n3"]


def test_where_launches_failed() -> None:
    """The last time of every node, where it is known."""
    first = record("12", ("a",), ("b",), left={"0": 130.0, "1": 140.0}, nodes={"0": "n1", "1": ""})
    second = record("13", ("a",), ("b",), left={"0": 230.0, "1": 50.0}, nodes={"0": "n1", "1": "n2"})
    failed = record("14", ("a",), left={"0": 230.0}, ended={"0": "FAILED"}, nodes={"0": "n3"})  # started, and failed by itself
    assert failed_launches([first, second, failed], since=100.0) == {"n1": 230.0}


@pytest.mark.slow
def test_a_hundred_thousand_stages() -> None:
    """Half of them in the queue, half gone: every one is found."""
    records = [
        record(str(number), *((f"{number}.{index}",) for index in range(500)), left={str(index): 1.0 for index in range(250)})
        for number in range(1, 201)
    ]
    queue = [element(f"{number}_{index}") for number in range(1, 201) for index in range(250, 500)]
    elements = own_elements(records, queue)
    held = stages_in_flight(records, elements)
    gone = departures_of(records, {key for each in records for task in each.tasks for key in task}, 1000)
    assert (len(held), len(gone), len(duplicates(elements))) == (50_000, 50_000, 0)
