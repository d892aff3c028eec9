"""One table of several experiments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.outliers import Verdict
from jobs.control.rounds import Judgements
from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.experiment.recipes import MethodRecipe
from jobs.report.material import material_of
from jobs.report.write import report_text
from jobs.tables.collect import FORMATS, collect_several
from jobs.tables.published import Published
from jobs.tables.several import Part, joint_published, joint_summary
from tests.jobs.table_cases import graph, published, result

LABELS = {"vft": "V-FT", "tapt": "TAPT"}


def part(name: str, made: Graph, right: int, rule: str = "none") -> Part:
    """Every run has `right` of 8 recordings right, and half of them per class."""
    results = {run.key: result(run, ((right, 8 - right), (8 - right, right)), ("a", "b")) for run in made.runs}
    recipes = [MethodRecipe(method, "paper", ()) for method in dict.fromkeys(run.method for run in made.runs)]
    first = made.runs[0]
    out = Verdict(first.fold, first.slot, first.generation, 50.0, 60.0, 2.0, -5.0, out=True)
    return Part(name, made, results, {}, rule, Judgements(unresolved={first.slot_id: out}), recipes, LABELS)


def other(made: Graph) -> Graph:
    """The same runs as another experiment has them, under other keys."""
    runs = tuple(replace(run, key=f"f{run.key[1:]}") for run in made.runs)
    return replace(
        made, runs=runs, nodes={run.key: replace(made.nodes[old.key], key=run.key) for run, old in zip(runs, made.runs, strict=True)}
    )


def test_a_method_of_two_experiments_is_two_rows(tmp_path: Path) -> None:
    """Each under the name of its experiment, and compared over (fold, slot); a method of one experiment keeps its name."""
    one, two = graph(methods=("vft", "tapt"), slots=2), other(graph(methods=("vft",), slots=2))
    summary, labels = joint_summary([part("base", one, 4), part("long", two, 6)])
    beside = joint_published([published(None)] * 2, labels)
    written = collect_several(summary, beside, tmp_path, tuple(FORMATS))
    assert written.complete
    value = json.loads((tmp_path / "summary.json").read_text())
    assert value["experiment"] == "base and long"
    assert {method["method"]: method["mean_ua"] for method in value["methods"]} == {"vft@base": 50.0, "tapt": 50.0, "vft@long": 75.0}
    assert {method["method"]: method["unresolved"] for method in value["methods"]} == {"vft@base": 1, "tapt": 0, "vft@long": 1}
    assert [recipe["method"] for recipe in value["recipes"]] == ["vft@base", "tapt", "vft@long"]
    pairs = {(each["first"], each["second"]): each["over_pairs"]["mean_difference"] for each in value["comparisons"]}
    assert pairs["vft@base", "vft@long"] == pytest.approx(25.0)
    assert beside.labels == {"vft@base": "V-FT (base)", "tapt": "TAPT", "vft@long": "V-FT (long)"}
    assert "V-FT (long)" in (tmp_path / "table.md").read_text()


def test_a_fold_that_only_one_experiment_has_is_a_dash(tmp_path: Path) -> None:
    """With one note, and neither missing nor incomplete; the means are over other folds, so that none is the best, nor the first."""
    one, two = graph(methods=("vft",), slots=2), other(graph(methods=("tapt", "ptapt"), folds=("1",), slots=2))
    summary, labels = joint_summary([part("base", one, 4), part("long", two, 6)])
    beside = joint_published([published(None)] * 2, labels)
    assert collect_several(summary, beside, tmp_path, tuple(FORMATS)).complete
    text = (tmp_path / "table.md").read_text()
    assert "| TAPT | **75.0** ± 0.0 | – | 75.0 ± 0.0‡ | 75.0 to 75.0 | – | 2 | 0 | 75.0 ± 0.0 |" in text
    assert "–: no such runs in this experiment; a mean is over the folds that a method has (TAPT 1 of 2, ptapt 1 of 2)." in text
    assert "0/0" not in text
    material = material_of(summary, beside)
    assert all(found.complete for found in material.by_metric.values())
    assert "different folds, so their means are not compared" in report_text(material)


def test_experiments_on_other_corpora_have_a_table_each() -> None:
    """A method keeps its name; rules that differ are listed by experiment."""
    one, two = graph(methods=("vft",)), other(graph(methods=("vft",), corpus="other"))
    stated = replace(part("long", two, 6, "none"), corpus_caption=("Speakers are shared.",))
    summary, labels = joint_summary([part("base", one, 4, "pooled: a"), stated])
    assert summary.corpus_captions == {"other": ("Speakers are shared.",)}
    assert [(method.corpus, method.method) for method in summary.methods] == [("demo", "vft"), ("other", "vft")]
    assert summary.outlier_rule == "base: pooled: a; long: none"
    assert labels == {"vft": "V-FT"}


def test_published_figures_are_those_of_all_experiments_or_none(tmp_path: Path) -> None:
    """A table of two corpora has none beside it; an unknown format is refused."""
    table = published("iemocap_table1")
    assert joint_published([table, table], LABELS).rows == table.rows
    assert joint_published([table, Published()], LABELS).rows == ()
    assert joint_published([table, Published()], LABELS).labels == LABELS
    summary, _ = joint_summary([part("base", graph(methods=("vft",)), 4), part("long", other(graph(methods=("vft",))), 6)])
    with pytest.raises(UsageError, match="docx"):
        collect_several(summary, table, tmp_path, ["docx"])
