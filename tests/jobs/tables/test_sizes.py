"""Parameters that methods train: a column where they differ, a sentence where they do not, nothing for results without them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from jobs.tables.as_json import to_json
from jobs.tables.collect import summary_of
from jobs.tables.display import render_markdown, render_methods_csv, tables_of
from jobs.tables.latex import PLAIN, Style, Width, fragments
from jobs.tables.sizes import ModelSize, count_text, size_of
from jobs.tables.summary import Summary
from tests.jobs.table_cases import graph, published, result

FULL = {"trained_parameters": 90_195_072, "parameters": 94_374_788}
LORA = {"trained_parameters": 445_444, "parameters": 94_817_156}


def measured(metrics: Mapping[str, Mapping[str, Any]]) -> Summary:
    """An experiment of the methods in `metrics`, whose runs all have these in their results."""
    made = graph(methods=tuple(metrics), folds=("1", "2"), slots=2)
    results = {run.key: result(run, ((3, 1), (0, 4)), ("a", "b"), metrics=dict(metrics[run.method])) for run in made.runs}
    return summary_of("demo", made, results, {})


def test_a_column_where_methods_differ() -> None:
    """In every format; a method whose results are older has a dash, and null in JSON."""
    summary, beside = measured({"vft": FULL, "tapt": LORA, "ptapt": {}}), published(None)
    [table] = tables_of(summary, beside)
    assert [row.trained for row in table.blocks[0].rows] == ["90.2 M (96 %)", "445 k (0.47 %)", "–"]
    assert any(sentence.startswith("Trained: parameters that a run trains") for sentence in table.caption)
    text = render_markdown(summary, beside)
    assert "| All runs | Trained |\n|:---|---:" in text
    assert "| 445 k (0.47 %) |\n" in text
    tex = fragments(summary, beside, PLAIN)["table1.tex"]
    assert " & All runs & Trained \\\\" in tex
    assert " & 445 k (0.47 \\%) \\\\" in tex
    assert "trained 445 k (0.47 \\%)" in fragments(summary, beside, Style(width=Width.column))["table1.tex"]
    assert [method["size"] for method in to_json(summary)["methods"]] == [
        {"trained": 90_195_072, "parameters": 94_374_788},
        {"trained": 445_444, "parameters": 94_817_156},
        None,
    ]
    assert [line.rsplit(",", 2)[1:] for line in render_methods_csv(summary).splitlines()] == [
        ["trained_parameters", "parameters"],
        ["90195072", "94374788"],
        ["445444", "94817156"],
        ["", ""],
    ]


def test_a_sentence_where_methods_agree() -> None:
    """No column; nothing at all for results that do not state it, as those of earlier versions."""
    agreed = measured({"vft": FULL, "tapt": FULL})
    [table] = tables_of(agreed, published(None))
    assert not table.sized
    assert "Every run trains 90.2 M of 94.4 M parameters (96 %)." in table.caption
    assert "Trained |" not in render_markdown(agreed, published(None))
    [table] = tables_of(measured({"vft": {}, "tapt": {}}), published(None))
    assert not any("trains" in sentence or "Trained" in sentence for sentence in table.caption)


def test_runs_of_a_method_that_differ_have_no_size() -> None:
    """No number is printed that not every run of the row has."""
    made = graph(methods=("vft",), folds=("1",), slots=2)
    metrics = dict(zip((run.key for run in made.runs), (FULL, LORA), strict=True))
    results = {run.key: result(run, ((1, 0), (0, 1)), ("a", "b"), metrics=metrics[run.key]) for run in made.runs}
    summary = summary_of("demo", made, results, {})
    assert summary.methods[0].size is None
    json.dumps(to_json(summary), allow_nan=False)


@pytest.mark.parametrize(
    ("trained", "text"),
    [(0, "0"), (13, "13"), (999, "999"), (3_076, "3.08 k"), (999_999, "1000 k"), (1_192_708, "1.19 M"), (90_195_072, "90.2 M")],
)
def test_counts(trained: int, text: str) -> None:
    """Three significant digits."""
    assert count_text(trained) == text


def test_what_is_no_size() -> None:
    """Metrics of other stages, of earlier versions, and values that cannot be numbers of parameters."""
    for metrics in ({}, {"parameters": 5}, {"trained_parameters": 6, "parameters": 5}, {"trained_parameters": "a", "parameters": 5}):
        assert size_of(metrics) is None
    assert size_of({"trained_parameters": 3.0, "parameters": 30_000.0}) == ModelSize(3, 30_000)
    assert ModelSize(3, 30_000).text == "3 (0.010 %)"
