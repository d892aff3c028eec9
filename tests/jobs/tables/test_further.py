"""Metrics beside the score, which recipes name: means of the runs that count, in every format and of several experiments."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from jobs.experiment.graph import Graph, Run
from jobs.experiment.recipes import MethodRecipe, MetricColumn
from jobs.report.material import Source, material_of
from jobs.report.write import report_text
from jobs.statistics import mean, sd
from jobs.store.layout import Layout
from jobs.store.records import Result
from jobs.tables.collect import collect, summary_of
from jobs.tables.latex import PLAIN, fragments
from jobs.tables.plain import plain_tables
from jobs.tables.several import Part, joint_summary
from jobs.tables.summary import Summary
from tests.jobs.table_cases import graph, published, result

VALENCE = MetricColumn("ccc_valence", "CCC valence", 3, "CCC: agreement.")
LIKING = MetricColumn("liking", "Liking", 1, "Liking: none.")
RECIPES = (MethodRecipe("vft", "paper", ()), MethodRecipe("tapt", "paper", (), metrics=(VALENCE, LIKING)))


def value(run: Run) -> float:
    return (0.25 if run.fold == "1" else 0.75) + 0.125 * run.slot


def finished() -> tuple[Graph, dict[str, Result]]:
    """Three runs on each of two folds; the second method has a metric; a dropped run of it has a far value."""
    found = graph(("vft", "tapt"))
    dropped = Run("tapt", "1", 0, 7, "d" * 20, 0)
    nodes = {**found.nodes, dropped.key: dataclasses.replace(found.nodes[found.runs[-1].key], key=dropped.key)}
    both = dataclasses.replace(found, nodes=nodes, superseded=(dropped,))
    results = {
        run.key: result(
            run, ((3, 1), (0, 4)), ("angry", "sad"), metrics={"ccc_valence": value(run), "other": 1.0} if run.method == "tapt" else {}
        )
        for run in both.runs
    }
    results[dropped.key] = result(dropped, ((3, 1), (0, 4)), ("angry", "sad"), metrics={"ccc_valence": -9.0})
    return both, results


@pytest.fixture(scope="module")
def summary() -> Summary:
    both, results = finished()
    return summary_of("demo", both, results, {}, recipes=RECIPES)


def test_means_are_those_of_a_score(summary: Summary) -> None:
    """Mean of the cell means, sd over slots of the mean over folds; a dropped run, and a metric that no recipe names, count for nothing."""
    valence, liking = summary.further
    assert (valence.method, valence.n, liking.n, liking.mean) == ("tapt", 6, 0, None)
    by_slot = [0.5 + 0.125 * slot for slot in range(3)]
    assert valence.mean == pytest.approx(mean(by_slot))
    assert valence.sd == pytest.approx(sd(by_slot))
    assert summary.complete


def test_the_table_has_a_row_for_the_method_that_has_the_metric(summary: Summary) -> None:
    """And no column of a metric that no run has."""
    [table] = plain_tables(summary, published(None))
    assert table.columns == ("", "CCC valence", "n")
    assert table.blocks == ((("TAPT", "0.625 ± 0.125", "6"),),)
    assert table.caption[1:] == ("CCC: agreement.",)


def test_metrics_that_no_run_has_are_left_out() -> None:
    """As for scripted and improvised turns of a corpus whose names do not tell them apart: no table, no file."""
    both, results = finished()
    without = {key: dataclasses.replace(each, metrics={"other": 1.0}) for key, each in results.items()}
    found = summary_of("demo", both, without, {}, recipes=RECIPES)
    assert found.further == ()
    assert plain_tables(found, published(None)) == ()


@pytest.mark.slow
def test_it_is_in_every_format(summary: Summary, tmp_path: Path) -> None:
    """LaTeX, Markdown, CSV, JSON and report; without such a recipe none of them."""
    both, results = finished()
    report = collect(Layout(tmp_path, "demo"), both, results, {}, published(None), recipes=RECIPES)
    folder = report.paths[0].parent
    assert "TAPT & 0.625" in fragments(summary, published(None), PLAIN)["metrics.tex"]
    assert "| TAPT | 0.625 ± 0.125 |" in (folder / "table.md").read_text()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "corpus": "demo", "method": "tapt", "fold": "1", "slot": "0", "seed": "100", "metric": "ccc_valence", "value": "0.25",
    }  # fmt: skip
    assert len(rows) == 6
    stored = json.loads((folder / "summary.json").read_text())
    first = stored["further_metrics"][0]
    assert (first["metric"], first["mean"], first["n"]) == ("ccc_valence", pytest.approx(0.625), 6)
    assert first["cells"][0]["runs"][1] == {"slot": 1, "seed": 101, "value": 0.375}
    source = Source(both, results, Layout(tmp_path, "demo"))
    assert "0.625 ± 0.125" in report_text(material_of(summary, published(None), [source]))
    without = collect(Layout(tmp_path, "other"), both, results, {}, published(None), recipes=RECIPES[:1])
    assert not {"metrics.csv", "metrics.tex"} & {path.name for path in without.paths}
    assert "further_metrics" not in (without.paths[0].parent / "summary.json").read_text()


def test_several_experiments_are_one_table() -> None:
    """The same method of two experiments on one corpus is a row for each."""
    both, results = finished()
    parts = [Part(name, both, results, {}, "none", None, RECIPES) for name in ("a", "b")]
    joined, _ = joint_summary(parts)
    assert {each.method: each.mean for each in joined.further if each.n} == pytest.approx({"tapt@a": 0.625, "tapt@b": 0.625})
