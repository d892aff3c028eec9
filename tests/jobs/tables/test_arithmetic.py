"""Device and precision of runs: named in captions and JSON, with a warning for cells that mix them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.experiment.graph import Graph
from jobs.store.records import Result
from jobs.tables.arithmetic import Arithmetic, MixedCell, arithmetic_of
from jobs.tables.as_json import to_json
from jobs.tables.collect import summary_of
from jobs.tables.display import render_markdown
from jobs.tables.latex import PLAIN, document, fragments
from jobs.tables.published import Published
from tests.jobs.table_cases import graph, result

CONFUSION, CLASSES = ((3, 1), (0, 4)), ("angry", "sad")
GPU = {"device": "NVIDIA H200", "precision": "bfloat16"}
CPU = {"device": "cpu", "precision": "float32"}


def results(made: Graph, provenance: Mapping[str, Mapping[str, Any]]) -> dict[str, Result]:
    """A result of every run; `provenance`: run -> its own, otherwise that of a GPU."""
    return {
        run.key: result(run, CONFUSION, CLASSES, provenance=provenance.get(run.name, {"arithmetic": GPU, "runtime": {"weights": "base"}}))
        for run in made.runs
    }


def test_one_device_and_precision_are_named() -> None:
    """Once for all runs."""
    made = graph(methods=("vft",), folds=("1", "2"), slots=2)
    found = arithmetic_of(made, results(made, {}))
    assert found == Arithmetic({"device": ("NVIDIA H200",), "precision": ("bfloat16",), "weights": ("base",)})
    assert found.sentences == ("Runs were computed with device NVIDIA H200, precision bfloat16.",)
    assert found.warnings == ()


def test_cells_that_mix_are_named() -> None:
    """Per property, with the values; a difference between cells is no mixed cell."""
    made = graph(methods=("vft", "tapt"), folds=("1", "2"), slots=2)
    other = {"arithmetic": CPU, "runtime": {"weights": "base"}}
    found = arithmetic_of(made, results(made, {"vft/1/1": other, "tapt/2/0": other, "tapt/2/1": other}))
    assert found.mixed == (
        MixedCell("vft", "1", "device", ("NVIDIA H200", "cpu")),
        MixedCell("vft", "1", "precision", ("bfloat16", "float32")),
    )
    assert found.warnings == (
        "Runs of one cell differ in device: vft/1 (NVIDIA H200; cpu).",
        "Runs of one cell differ in precision: vft/1 (bfloat16; float32).",
    )


def test_initial_weights_that_differ_within_a_cell_are_named() -> None:
    """Results of two launches between which a branch of the hub moved."""
    made = graph(methods=("vft",), folds=("1",), slots=2)
    found = arithmetic_of(made, results(made, {"vft/1/0": {"arithmetic": GPU, "runtime": {"weights": "large"}}}))
    assert found.warnings == ("Runs of one cell differ in weights: vft/1 (base; large).",)


def test_results_of_earlier_versions_state_nothing() -> None:
    """They have no record of it; missing results neither."""
    made = graph(methods=("vft",), folds=("1",), slots=2)
    assert arithmetic_of(made, results(made, {"vft/1/0": {}, "vft/1/1": {"arithmetic": "?", "runtime": []}})) == Arithmetic()
    assert arithmetic_of(made, {}) == Arithmetic()


def test_tables_and_json_state_them() -> None:
    """In every caption, and with the mixed cells in the JSON."""
    made = graph(methods=("vft",), folds=("1", "2"), slots=2)
    summary = summary_of("e", made, results(made, {"vft/2/1": {"arithmetic": CPU}}), {})
    for text in (document(fragments(summary, Published(), PLAIN), PLAIN, inline=True), render_markdown(summary, Published())):
        assert "Runs were computed with device NVIDIA H200 and cpu, precision bfloat16 and float32." in text
        assert "Runs of one cell differ in device: vft/2 (NVIDIA H200; cpu)." in text
    stated = to_json(summary)["arithmetic"]
    assert stated["values"]["precision"] == ["bfloat16", "float32"]
    assert {"method": "vft", "fold": "2", "name": "device", "values": ("NVIDIA H200", "cpu")} in stated["mixed"]
