"""The score that a registry states: its name, unit and direction in tables, files, report, messages and the index of results."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.control.outliers import verdict_in_words
from jobs.control.result_index import facts_of, index_of
from jobs.control.rounds import replay
from jobs.errors import UsageError
from jobs.experiment.config import OutlierRule, Policy
from jobs.experiment.graph import Graph, build_graph, seeds_of_slots
from jobs.report.material import Source, material_of
from jobs.report.write import report_text
from jobs.store.layout import Layout
from jobs.store.records import Result
from jobs.store.scores import RECORDED, UNWEIGHTED, Score, Terms, score_of, terms_of
from jobs.tables.collect import collect
from jobs.tables.several import Part, joint_summary
from ser_core.registry import REGISTRY
from tests.jobs import fake_registry
from tests.jobs.table_cases import graph, published, result

ERROR = Score("rmse", "RMSE", "Root mean square error", unit="mm", scale=1000.0, higher_is_better=False)
FAR = 0.75


def finished() -> tuple[Graph, dict[str, Result]]:
    """Six runs a method in metres; `tapt` has the lower error but for one run that is far off."""
    made = dataclasses.replace(graph(("vft", "tapt"), slots=6), score=ERROR, terms=Terms(groups="walls"))
    results = {}
    for run in made.runs:
        value = (0.25 if run.method == "vft" else 0.125) + 0.001 * run.slot
        results[run.key] = result(run, (), (), metrics={"rmse": FAR if run.name == "tapt/1/0" else value})
    return made, results


def test_a_score_is_read_from_a_result_in_its_unit() -> None:
    """A percentage is exact, and from a confusion matrix where the score names it; values out of range or not finite are none."""
    [run] = graph(("vft",), ("1",), 1).runs

    def value(score: Score, confusion: tuple[tuple[int, ...], ...] = (), **metrics: float) -> float | None:
        return score.of(result(run, confusion, ("a", "b") if confusion else (), metrics=metrics))

    matrix = ((3, 1), (0, 2))
    assert (value(UNWEIGHTED, matrix, ua=0.1), value(UNWEIGHTED, ua=0.57), value(UNWEIGHTED, ua=57.0)) == (87.5, 57.0, None)
    accuracy = Score("accuracy", "accuracy", "Accuracy", of_confusion="wa")
    assert value(accuracy, matrix) == pytest.approx(100 * 5 / 6)
    assert (value(ERROR, matrix, rmse=0.25), value(ERROR, rmse=float("inf")), value(ERROR, ua=0.5)) == (250.0, None, None)


def test_the_score_is_that_of_the_registry() -> None:
    """By its attributes, whatever its class; without one it is UA. What cannot be a score is one line."""
    assert score_of(REGISTRY) == UNWEIGHTED == score_of(fake_registry.REGISTRY)
    assert terms_of(REGISTRY) == RECORDED
    stated = SimpleNamespace(name="rmse", label="RMSE", title="Root mean square error", unit="mm", scale=1000.0, higher_is_better=False)
    registry = fake_registry.FakeRegistry()
    registry.score = stated  # type: ignore[attr-defined]
    slots = seeds_of_slots(("vft",), ("1",), seeds=1, first_seed=0)
    built = build_graph(registry, {}, corpus="fake", corpus_digest="d1", methods=("vft",), folds=("1",), seeds=slots)
    assert built.score == ERROR
    for wrong, expected in (
        ({"name": "macro f1"}, "name 'macro f1'"),
        ({"name": "wa"}, "name 'wa'"),
        ({"of_confusion": "kappa"}, "known are ua, wa, macro_f1"),
        ({"unit": "%"}, "scale 1000"),
    ):
        with pytest.raises(UsageError, match=expected):
            score_of(SimpleNamespace(score=SimpleNamespace(**{**vars(stated), **wrong})))
    with pytest.raises(UsageError, match="title"):
        score_of(SimpleNamespace(score=SimpleNamespace(name="rmse", label="RMSE")))


def test_tables_files_and_report_name_it_and_mark_the_lowest(tmp_path: Path) -> None:
    """The lowest mean is the best of a column, methods are ordered from the lowest, and no file uses terms of speech."""
    made, results = finished()
    layout = Layout(tmp_path, "walls")
    written = collect(layout, made, results, {}, published(None))
    markdown = (layout.tables / "table.md").read_text()
    assert "Root mean square error (RMSE, mm) on demo" in markdown
    assert "Lower RMSE is better." in markdown
    assert "Differences of RMSE between methods" in markdown
    assert re.findall(r"\*\*([\d.]+)\*\*", markdown) == ["231.7", "127.5", "179.6"]
    assert (layout.tables / "runs.csv").read_text().splitlines()[0].split(",")[5] == "rmse"
    assert (layout.tables / "methods.csv").read_text().splitlines()[0].split(",")[2:4] == ["mean_rmse", "sd_rmse"]
    summary = json.loads((layout.tables / "summary.json").read_text())
    assert summary["score"]["label"] == "RMSE"
    assert summary["methods"][0]["mean_rmse"] == pytest.approx(252.5)
    assert summary["methods"][0]["cells"][0]["runs"][1]["rmse"] == pytest.approx(251.0)
    report = report_text(material_of(written.summary, published(None), [Source(made, results, layout)]))
    assert "Lowest mean RMSE on demo: TAPT with 179.6 mm" in report
    speech = re.compile("UA|mean_ua|speaker|utterance|fine-tun")
    assert not [line for text in (markdown, report, json.dumps(summary)) for line in text.splitlines() if speech.search(line)]
    assert "Pairs of one fold share walls and upstream stages" in markdown
    assert "Do seeds or walls matter?" in report


def test_a_result_without_the_score_names_the_metrics_that_it_has(tmp_path: Path) -> None:
    """The stage is to be corrected under another version: its result would be used again."""
    made, results = finished()
    first = made.runs[0].key
    results[first] = dataclasses.replace(results[first], metrics={"mse": 0.5})
    with pytest.raises(UsageError, match=r"no rmse in its metrics: its metrics are mse; .* increase the version of the stage"):
        collect(Layout(tmp_path, "walls"), made, results, {}, published(None))


def test_the_outlier_rule_is_two_sided_and_names_the_score() -> None:
    """A far higher error is dropped as a far lower one would be."""
    made, results = finished()
    facts = {key: facts_of(each, 0, ERROR) for key, each in results.items()}
    judged = replay(made, facts, Policy(outliers=OutlierRule.pooled))
    assert [(each.method, each.fold, each.slot) for each in judged.dropped] == [("tapt", "1", 0)]
    assert judged.dropped[0].reason.startswith("RMSE 750.0 lies ")
    verdict = judged.verdicts["tapt", "1", 0, 0]
    assert verdict_in_words(OutlierRule.pooled, verdict).startswith("UA 750.0 lies ")


def test_experiments_with_different_scores_are_no_joint_table() -> None:
    made, results = finished()
    graphs = {"a": made, "b": dataclasses.replace(made, score=UNWEIGHTED)}
    parts = [Part(name, each, results, {}, "none", None, ()) for name, each in graphs.items()]
    with pytest.raises(UsageError, match=r"a has RMSE \(mm\), b has UA \(%\)"):
        joint_summary(parts)


def test_an_index_is_of_one_score(tmp_path: Path) -> None:
    """Facts that were computed under another definition of the score are not read again; UA has the file that it always had."""
    layout = Layout(tmp_path, "walls")
    files = [index_of(layout, score)._file for score in (UNWEIGHTED, ERROR, dataclasses.replace(ERROR, scale=1.0))]
    assert files[0] == layout.index
    assert len(set(files)) == 3
