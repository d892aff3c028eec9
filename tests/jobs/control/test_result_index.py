"""The index of results: it saves reading results, and never contradicts the files."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.controller import read_facts
from jobs.control.facts import Departure, StageFacts
from jobs.control.observe import PassContext
from jobs.control.result_index import ENOUGH, ResultIndex, cached_index, index_of
from jobs.experiment.graph import Graph, Node
from jobs.store.attempts import new_claim
from jobs.store.layout import AttemptFolder, Layout
from jobs.store.records import Result, claim_attempt, read_result_file, write_result
from tests.jobs.fake_registry import make_graph


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "results", "exp")


@pytest.fixture
def graph() -> Graph:
    return make_graph(methods=("vft",), folds=("1",), seeds=ENOUGH + 1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the results that were opened."""
    opened: list[str] = []

    def read(path: Path | str, key: str) -> Result | None:
        opened.append(key)
        return read_result_file(path, key)

    monkeypatch.setattr("jobs.control.result_index.read_result_file", read)
    return opened


def finish(layout: Layout, node: Node, *, attempt: int = 1, ua: float = 0.5, diverged: str = "") -> Path:
    folder = layout.stage(node.stage, node.key)
    folder.path.mkdir(parents=True, exist_ok=True)
    metrics = {"ua": ua}
    result = Result(node.key, node.stage, 1, node.fold, node.seed, "fake", "d1", {}, {}, attempt, metrics, {"seconds": 2.5})
    write_result(folder, replace(result, diverged=diverged))
    return folder.result


def finish_all(layout: Layout, graph: Graph) -> None:
    """Results of all stages, of different scores; one has diverged."""
    for number, node in enumerate(graph.nodes.values()):
        folder = layout.stage(node.stage, node.key)
        folder.path.mkdir(parents=True)
        result = Result(node.key, node.stage, 1, node.fold, node.seed, "fake", "d1", {}, {}, 1, {"ua": number / 200}, {"seconds": 2.5})
        value = {"schema": 1, **vars(result), "diverged": "" if number else "loss at the prior"}
        folder.result.write_text(json.dumps(value))


def in_new_process(graph: Graph, layout: Layout) -> dict[str, StageFacts]:
    """Facts as a process reads them that has only the stored index."""
    cached_index.cache_clear()
    return read_facts(graph, layout)


def test_indexed_results_are_not_read_again(layout: Layout, graph: Graph, reads: list[str]) -> None:
    """A second pass, in this process or in another one with the stored index, opens no result and gives the same facts."""
    finish_all(layout, graph)
    facts = in_new_process(graph, layout)
    assert sorted(reads) == sorted(graph.nodes)
    reads.clear()
    assert read_facts(graph, layout) == facts
    index_of(layout).store()
    assert in_new_process(graph, layout) == facts
    assert not reads
    assert {fact.ua for fact in facts.values()} == {number / 2 for number in range(ENOUGH + 1)}
    assert [fact.diverged for fact in facts.values() if fact.diverged] == ["loss at the prior"]


@pytest.mark.parametrize("stored", [False, True])
def test_a_withdrawn_result_is_withdrawn(layout: Layout, graph: Graph, stored: bool) -> None:
    """A result or a whole stage folder that was deleted is not done, in this process and in the next."""
    finish_all(layout, graph)
    in_new_process(graph, layout)
    first, second, third, *_ = graph.nodes.values()
    if stored:
        index_of(layout).store()
        cached_index.cache_clear()
    layout.stage(first.stage, first.key).result.unlink()
    shutil.rmtree(layout.stage(second.stage, second.key).path)
    facts = read_facts(graph, layout)
    assert [facts[node.key].done for node in (first, second, third)] == [False, False, True]
    shutil.rmtree(layout.root / "store")
    assert not any(fact.done for fact in read_facts(graph, layout).values())


@pytest.mark.parametrize("stored", [False, True])
def test_another_result_of_the_same_size_and_time_is_read(layout: Layout, graph: Graph, stored: bool, reads: list[str]) -> None:
    """A result that was replaced by one as long, with the time of the old one, is another file; the rest is not read for it."""
    finish_all(layout, graph)
    node = list(graph.nodes.values())[5]
    file = finish(layout, node, ua=0.25)
    before = file.stat()
    assert in_new_process(graph, layout)[node.key].ua == 25.0
    if stored:
        index_of(layout).store()
        cached_index.cache_clear()
    reads.clear()
    finish(layout, node, ua=0.75)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert read_facts(graph, layout)[node.key].ua == 75.0
    assert reads == [node.key]


@pytest.mark.parametrize("stored", [False, True])
def test_an_overwritten_result_is_read(layout: Layout, graph: Graph, stored: bool) -> None:
    """The same file with other bytes of the same number, and one that is torn now."""
    finish_all(layout, graph)
    first, second = list(graph.nodes.values())[5:7]
    files = [finish(layout, node, ua=0.25) for node in (first, second)]
    for file in files:
        os.utime(file, ns=(1, 1))
    in_new_process(graph, layout)
    if stored:
        index_of(layout).store()
        cached_index.cache_clear()
    files[0].write_text(files[0].read_text().replace("0.25", "0.75"))
    files[1].write_text(files[1].read_text()[:40])
    facts = read_facts(graph, layout)
    assert facts[first.key].ua == 75.0
    assert not facts[second.key].done


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\x80\x81",
        lambda text: b"[]\n[]",
        lambda text: text.replace(b'"schema": ', b'"schema": 9'),
        lambda text: text.replace(b"25.0", b"75.0"),
        lambda text: text + b" ",
    ],
)
def test_a_damaged_index_is_ignored(layout: Layout, graph: Graph, damage: object, reads: list[str]) -> None:
    """Torn, empty, of another schema or with other numbers in it: results are read, and the index is rebuilt."""
    finish_all(layout, graph)
    facts = in_new_process(graph, layout)
    index_of(layout).remember({("vft", "1", 3): 1})
    index_of(layout).store()
    text = layout.index.read_bytes()
    assert callable(damage)
    layout.index.write_bytes(damage(text))
    assert layout.index.read_bytes() != text
    reads.clear()
    assert in_new_process(graph, layout) == facts
    assert len(reads) == len(graph.nodes)
    assert not index_of(layout).generations
    index_of(layout).remember({("vft", "1", 3): 1})
    index_of(layout).store()
    assert layout.index.read_bytes() == text


def test_the_index_is_stored_when_enough_has_changed(layout: Layout, graph: Graph) -> None:
    """Reading stores nothing; the controller does once a hundred results are new; if it cannot, it continues."""
    finish_all(layout, graph)
    first, *rest = graph.nodes.values()
    few = ResultIndex(layout.index)
    for node in rest[: ENOUGH - 1]:
        few.facts(node.key, str(layout.stage(node.stage, node.key).path))
    few.store()
    assert not layout.index.exists()
    few.facts(first.key, str(layout.stage(first.stage, first.key).path))
    layout.folder.parent.mkdir(exist_ok=True)
    layout.folder.write_text("in the way")
    few.store()
    layout.folder.unlink()
    many = ResultIndex(layout.index)
    for node in graph.nodes.values():
        many.facts(node.key, str(layout.stage(node.stage, node.key).path))
    many.remember({("vft", "1", 3): 2})
    many.store()
    assert ResultIndex(layout.index).generations == {("vft", "1", 3): 2}
    written = layout.index.stat().st_ino
    many.store()
    assert layout.index.stat().st_ino == written


def test_a_result_of_another_stage_does_not_count(layout: Layout, graph: Graph) -> None:
    """A result that was copied into the folder of another key counts for neither."""
    first, second, *_ = graph.nodes.values()
    file = finish(layout, first)
    other = layout.stage(second.stage, second.key)
    other.path.mkdir(parents=True)
    shutil.copy(file, other.result)
    facts = in_new_process(graph, layout)
    assert facts[first.key].done
    assert not facts[second.key].done


def retry(layout: Layout, node: Node) -> AttemptFolder:
    """A stage that got its result by attempt 2, and the folder of attempt 1, which ran on n1 and has no outcome."""
    folder = layout.stage(node.stage, node.key)
    finish(layout, node, attempt=2)
    for number in (1, 2):
        claim = replace(new_claim(number), slurm_job=f"{number}_0", node=f"n{number}", host="elsewhere", process_start="")
        assert claim_attempt(folder, number, claim)
        os.utime(folder.attempt(number).claim, (1.0, 1.0))  # the last heartbeat
    return folder.attempt(1)


@pytest.mark.parametrize("stored", [False, True])
def test_attempts_of_finished_stages_are_read_once(layout: Layout, graph: Graph, stored: bool) -> None:
    """A pass costs as much after retries as without; what Slurm reports later of a job is still taken into account."""
    node = next(iter(graph.nodes.values()))
    finish_all(layout, graph)
    first = retry(layout, node)
    state = ["FAILED"]
    context = PassContext(departures=lambda keys: {node.key: (Departure(node.key, "1_0", state[0], 0.0, 1.0),)})

    def bad_nodes() -> tuple[str, ...]:
        found = read_facts(graph, layout, context)[node.key].bad_nodes
        if stored:
            index_of(layout)._changes += ENOUGH  # as many changes as make it worth a write
            index_of(layout).store()
            cached_index.cache_clear()
        return found

    assert bad_nodes() == ()
    state[0] = "NODE_FAIL"
    assert bad_nodes() == ("n1",)
    shutil.rmtree(first.path)
    assert bad_nodes() == ("n1",)  # not read again
    finish(layout, node, attempt=3)
    assert bad_nodes() == ()  # another result
