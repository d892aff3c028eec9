"""Dependencies between arrays: exact for every element, whatever the shapes."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from jobs.control.facts import InFlight, Phase
from jobs.slurm.dependencies import Dependency, make_dependency, upstream_jobs, with_singleton
from tests.jobs.slurm_cases import batch_of, graph_of, node


def sets(*jobs: Iterable[str]) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(one) for one in jobs)


def test_nothing_to_wait_for() -> None:
    """No dependency at all."""
    assert make_dependency(sets([], [])) == Dependency()


def test_all_wait_for_the_same() -> None:
    """One dependency, numbers in order."""
    assert make_dependency(sets(["9_10", "9_2"], ["9_2", "9_10"])) == Dependency("afterok:9_2:9_10")


def test_one_to_one() -> None:
    """Slurm's own `aftercorr`, also of several arrays."""
    assert make_dependency(sets(["9_0"], ["9_1"])) == Dependency("aftercorr:9", (((0, 1), "aftercorr:9"),))
    both = "aftercorr:9,aftercorr:11"
    assert make_dependency(sets(["9_0", "11_0"], ["9_1", "11_1"])) == Dependency(both, (((0, 1), both),))


def test_shapes_that_differ() -> None:
    """All of them first, then each group of elements its own; an element without upstream waits for nothing."""
    found = make_dependency(sets(["9_0"], ["9_0"], ["9_1"], [], ["9_1", "7_3"]))
    assert found.initial == "afterok:7_3:9_0:9_1"
    assert found.refined == (((0, 1), "afterok:9_0"), ((2,), "afterok:9_1"), ((3,), ""), ((4,), "afterok:7_3:9_1"))


@given(st.lists(st.frozensets(st.integers(0, 4).map(lambda index: f"9_{index}"), max_size=3), min_size=1, max_size=12).map(tuple))
def test_no_element_is_forgotten(waits: tuple[frozenset[str], ...]) -> None:
    """Whatever is asked, each element ends up waiting for exactly its own jobs, and before the refinement for no less."""

    def jobs(option: str, index: int) -> frozenset[str]:
        found: set[str] = set()
        for clause in filter(None, option.split(",")):
            kind, *numbers = clause.split(":")
            found |= {f"{number}_{index}" for number in numbers} if kind == "aftercorr" else set(numbers)
        return frozenset(found)

    made = make_dependency(waits)
    own = {index: option for indices, option in made.refined for index in indices}
    for index, wanted in enumerate(waits):
        assert jobs(made.initial, index) >= wanted
        assert jobs(own.get(index, made.initial), index) == wanted
    assert len(made.refined) <= len(set(waits))


def test_what_a_task_waits_for() -> None:
    """Upstream stages in flight of all its stages, but not those of its own task, nor those that are done."""
    nodes = [
        node("a", "states"),
        node("b", "states"),
        node("c", "finetune", {"x": "a"}),
        node("d", "finetune", {"x": "b", "y": "c"}),
        node("e", "finetune", {"x": "a"}),
    ]
    held = {"a": InFlight(Phase.running, "9_0"), "c": InFlight(Phase.queued, "10_0")}
    assert upstream_jobs(batch_of(nodes[2:], 2), graph_of(nodes), held) == sets(["9_0"], ["9_0"])


def test_singleton() -> None:
    assert with_singleton("") == "singleton"
    assert with_singleton("afterok:1") == "afterok:1,singleton"
