"""Records and one look at the queue, taken together."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from jobs.control.facts import Departure, InFlight, Phase
from jobs.slurm.parse import QueuedElement
from jobs.slurm.queue import departures_of, failed_launches, find_holdings, flights, held_twice, stuck_keys, withdrawable
from jobs.slurm.submissions import State, Submission


def record(job: str, *tasks: tuple[str, ...], name: str = "", **facts: object) -> Submission:
    known = Submission(name or f"trial.{job}", "finetune", "vft", tasks, 100.0, State.submitted if job else State.intent, job)
    return replace(known, **facts)  # type: ignore[arg-type]


def element(job: str, state: str = "PENDING", reason: str = "None", name: str = "") -> QueuedElement:
    return QueuedElement(job, state, reason, name or f"trial.{job.partition('_')[0]}")


def test_a_number_that_slurm_gave_to_another_job() -> None:
    """An array that Slurm forgot is not found again in somebody else's with its number; a second one of its name is ours."""
    forgotten = [record("12", ("a",), name="trial.x")]
    assert find_holdings(forgotten, [element("12_0", "RUNNING", name="other")]) == ()
    twice = [record("13", ("a",), name="trial.x+13")]
    assert len(find_holdings(twice, [element("13_0", name="trial.x")])) == 1


def test_who_holds_what() -> None:
    """Elements of submitted records, all of an unknown outcome; somebody else's jobs, and indices that no record has, are nobody's."""
    records = [record("12", ("a", "b"), ("c",), ("d",)), record("", ("e",), name="trial.x")]
    queue = [element("12_0", "RUNNING"), element("12_1"), element("12_9"), element("13_0"), element("12"), element("7_0")]
    holdings = find_holdings(records, queue)
    assert [holding.element.job for holding in holdings] == ["12_0", "12_1"]
    running, queued = InFlight(Phase.running, "12_0"), InFlight(Phase.queued, "12_1")
    assert flights(records, holdings) == {"a": running, "b": running, "c": queued, "e": InFlight(Phase.queued, "?trial.x")}


def test_what_runs_is_named_before_what_waits() -> None:
    """Of two that hold one stage others depend on the one that stays; what is being withdrawn comes last."""
    records = [record("12", ("a",), cancelled=(0,)), record("13", ("a",)), record("14", ("a",))]
    found = flights(records, find_holdings(records, [element("12_0"), element("13_0"), element("14_0", "RUNNING")]))
    assert found == {"a": InFlight(Phase.running, "14_0")}
    found = flights(records, find_holdings(records, [element("12_0"), element("14_0"), element("13_0")]))
    assert found == {"a": InFlight(Phase.queued, "13_0")}


def test_withdrawable() -> None:
    """What waits and holds nothing else; what has been given a node is left."""
    records = [record("12", ("a", "b"), ("c",), ("d",), ("e",))]
    queue = [element("12_0"), element("12_1", "RUNNING"), element("12_2"), element("12_3", "CONFIGURING")]
    holdings = find_holdings(records, queue)
    assert [each.element.job for each in withdrawable(holdings, ["a", "c", "d", "e"])] == ["12_2"]
    assert [each.element.job for each in withdrawable(holdings, ["a", "b"])] == ["12_0"]


KEYS = st.sets(st.sampled_from("abcd"), min_size=1, max_size=3).map(lambda keys: tuple(sorted(keys)))
ELEMENTS = st.lists(st.tuples(KEYS, st.sampled_from(["PENDING", "RUNNING", "COMPLETING"])), max_size=8)


@given(ELEMENTS)
def test_what_is_held_twice_is_given_up_once(elements: list[tuple[tuple[str, ...], str]]) -> None:
    """However stages are spread over elements: only what waits is withdrawn, no stage loses its last holder, one pass is enough."""
    records = [record(str(number), keys) for number, (keys, _) in enumerate(elements, 1)]
    holdings = find_holdings(records, [element(f"{number}_0", state) for number, (_, state) in enumerate(elements, 1)])
    gone = held_twice(holdings)
    left = [each for each in holdings if each not in gone]
    assert all(each.waits for each in gone)
    assert {key for each in left for key in each.keys} == {key for each in holdings for key in each.keys}
    running = {key for each in left if not each.waits for key in each.keys}
    assert all(any(key not in running for key in each.keys) for each in left if each.waits)
    assert held_twice(left) == ()


def test_the_younger_one_goes() -> None:
    """Of two that wait the higher number; one that runs stays, whatever its number."""
    records = [record("9", ("a",)), record("10", ("a",))]
    (gone,) = held_twice(find_holdings(records, [element("9_0"), element("10_0")]))
    assert gone.element.job == "10_0"
    (gone,) = held_twice(find_holdings(records, [element("9_0"), element("10_0", "RUNNING")]))
    assert gone.element.job == "9_0"
    assert held_twice(find_holdings(records, [element("9_0", "RUNNING"), element("10_0", "RUNNING")])) == ()


def test_stuck() -> None:
    """Every stage of the element, with the reason."""
    records = [record("12", ("a", "b"), ("c",), ("d",))]
    queue = [element("12_0", reason="BadConstraints"), element("12_1", reason="Priority"), element("12_2", reason="JobHeldUser")]
    found = stuck_keys(find_holdings(records, queue))
    assert found == {
        "a": "no node fits its request (BadConstraints)",
        "b": "no node fits its request (BadConstraints)",
        "d": "held by you: `scontrol release` lets it start (JobHeldUser)",
    }


def test_departures() -> None:
    """One for each stage of each element that has left, oldest first, open and closed records alike; only of what is asked for."""
    first = record("12", ("a", "b"), ("c",), left={"0": 130.0, "1": 140.0}, ended={"0": "NODE_FAIL", "1": "FAILED"}, cancelled=(1,))
    second = record("13", ("a",), ("d",), created=200.0, left={"0": 230.0})
    assert departures_of([second, first], {"a", "c", "x"}) == {
        "a": (Departure("a", "12_0", "NODE_FAIL", 100.0, 130.0), Departure("a", "13_0", "", 200.0, 230.0)),
        "c": (Departure("c", "12_1", "FAILED", 100.0, 140.0, withdrawn=True),),
    }


def test_where_launches_failed() -> None:
    """The last time of every node, where it is known."""
    first = record("12", ("a",), ("b",), left={"0": 130.0, "1": 140.0}, nodes={"0": "n1", "1": ""})
    second = record("13", ("a",), ("b",), left={"0": 230.0, "1": 50.0}, nodes={"0": "n1", "1": "n2"})
    assert failed_launches([first, second], since=100.0) == {"n1": 230.0}


def test_a_hundred_thousand_stages() -> None:
    """Half of them in the queue, half gone: every one is found."""
    records = [
        record(str(number), *((f"{number}.{index}",) for index in range(500)), left={str(index): 1.0 for index in range(250)})
        for number in range(1, 201)
    ]
    queue = [element(f"{number}_{index}") for number in range(1, 201) for index in range(250, 500)]
    holdings = find_holdings(records, queue)
    held = flights(records, holdings)
    gone = departures_of(records, {key for each in records for task in each.tasks for key in task})
    assert (len(held), len(gone), len(held_twice(holdings))) == (50_000, 50_000, 0)
