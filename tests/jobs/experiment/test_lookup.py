"""The run or stage that a text names: `METHOD/FOLD/SLOT` or the start of a key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, build_graph, seeds_of_slots
from jobs.experiment.lookup import find_target
from tests.jobs.fake_registry import REGISTRY, make_graph


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vfd/1/0", "did you mean 'vft'"),
        ("vft/9/0", "no fold '9'"),
        ("vft/1/7", "no slot '7'"),
        ("vft", "METHOD/FOLD/SLOT"),
        ("abc", "at least 6 digits"),
        ("ffffff", "no key of this experiment starts so"),
        ("/", "no method ''"),
    ],
)
def test_a_wrong_name_of_a_run_is_a_usage_error(text: str, expected: str) -> None:
    """One line: what is wrong, and the known names."""
    graph = _small()
    with pytest.raises(UsageError) as caught:
        find_target(graph, text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fold_may_contain_a_slash_and_a_key_names_an_upstream_stage() -> None:
    """Method and slot are the first and last part; a key also finds stages that are not the last of a run."""
    slots = seeds_of_slots(("tapt",), ("a/b",), seeds=2, first_seed=0)
    graph = build_graph(REGISTRY, {}, corpus="fake", corpus_digest="d1", methods=("tapt",), folds=("a/b",), seeds=slots)
    target = find_target(graph, "tapt/a/b/1")
    assert target.run is not None
    assert (target.run.fold, target.run.slot) == ("a/b", 1)
    upstream = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    found = find_target(graph, upstream[:8])
    assert found.run is None
    assert found.node.stage == "tapt"


def test_a_prefix_of_two_keys_is_a_usage_error() -> None:
    """Neither of the two stages is guessed."""
    graph = _small()
    (first, node), (_, other) = list(graph.nodes.items())[:2]
    nodes = {f"{first[:7]}0": node, f"{first[:7]}1": other}
    with pytest.raises(UsageError, match="2 keys start so"):
        find_target(replace(graph, nodes=nodes), first[:7])


def _small() -> Graph:
    return make_graph(methods=("vft",), folds=("1",), seeds=2)
