"""The files that `collect` writes, and those that it refuses to write or to overwrite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Run
from jobs.store.layout import Layout
from jobs.tables.as_json import to_json
from jobs.tables.collect import FORMATS, collect, summary_of
from tests.jobs.table_cases import graph, published, result


def test_collect_writes_every_format(tmp_path: Path) -> None:
    """All files of an experiment lie where the layout says, and agree with each other."""
    layout, made = Layout(tmp_path, "demo"), graph()
    results = {run.key: result(run, ((3 + run.slot, 1), (0, 4)), ("a", "b")) for run in made.runs}
    report = collect(layout, made, results, {}, published(None))
    assert report.complete
    assert report.missing == ()
    assert [path.relative_to(tmp_path / "demo").as_posix() for path in report.paths] == [
        "tables/table1.tex",
        "tables/table1-differences.tex",
        "tables/table1-details.tex",
        "tables/tables.tex",
        "tables/table.md",
        "tables/runs.csv",
        "tables/methods.csv",
        "tables/summary.json",
        *(f"confusion/{method}.{kind}" for method in ("vft", "tapt", "ptapt") for kind in ("csv", "png")),
    ]
    assert all(path.is_file() for path in report.paths)
    values = json.loads((layout.tables / "summary.json").read_text(encoding="utf-8"))
    assert values == {**to_json(summary_of("demo", made, results, {})), "settings_table": None}
    assert values["code"] == {
        "commits": ["0123456789abcdef"],
        "modified": False,
        "packages": {"torch": ["2.13.0"], "transformers": ["5.23.0"]},
        "weights": [],
    }
    frame = pd.read_csv(layout.tables / "runs.csv")
    assert frame.groupby("method").ua.mean().to_dict() == pytest.approx(
        {method["method"]: method["mean_ua"] for method in values["methods"]}
    )


@pytest.mark.slow
def test_no_file_has_runs_of_an_earlier_collect(tmp_path: Path) -> None:
    """Fewer seeds and methods: formats that are there are written anew, matrices of other runs are removed, other files stay."""
    layout, many, few = Layout(tmp_path, "demo"), graph(slots=3), graph(methods=("vft",), slots=2)

    def collected(made: Graph, *formats: str) -> None:
        results = {run.key: result(run, ((3 + run.slot, 1), (0, 4)), ("a", "b")) for run in made.runs}
        collect(layout, made, results, {}, published(None), formats=formats, force=True)

    confusion = layout.folder / "confusion"
    collected(many, "markdown", "csv", "json")
    own = [confusion / "notes.csv", confusion / "mine.png"]
    for path in own:
        path.write_text("mine")
    assert (confusion / "tapt.csv").is_file()
    (layout.tables / "table2.tex").write_text("of another corpus")
    collected(few, "json")
    assert not (layout.tables / "table2.tex").exists()
    assert not (layout.tables / FORMATS["latex"]).exists()
    assert "TAPT" not in (layout.tables / FORMATS["markdown"]).read_text().partition("Published")[0]
    assert set(pd.read_csv(layout.tables / "runs.csv").slot) == {0, 1}
    left = {path.relative_to(confusion).as_posix() for path in confusion.rglob("*.*")}
    assert {name for name in left if "tapt" in name or "slot_2" in name} == set()
    assert {"vft.csv", "vft.png", "notes.csv", "mine.png"} <= left
    assert len(left) == 4 + len(few.runs)


def test_predictions_of_all_runs_are_one_file(tmp_path: Path) -> None:
    """CSV artifacts joined by name, the run before each row, formulas quoted; a run whose file is gone is named, a run without is not."""
    layout, made = Layout(tmp_path, "demo"), graph(methods=("vft",), folds=("1",), slots=4)
    results = {run.key: result(run, ((3, 1), (0, 4)), ("a", "b")) for run in made.runs}
    for run in made.runs[:3]:
        artifacts = {"predictions.csv": "0" * 64, "tensorboard/events": "0" * 64, "runs.csv": "0" * 64}
        results[run.key] = replace(results[run.key], artifacts=artifacts)
        output = layout.stage("finetune", run.key).attempt(results[run.key].attempt).output
        output.mkdir(parents=True)
        if run.slot < 2:
            (output / "predictions.csv").write_text(f"id,label,p_a\n=one,a,0.{run.slot}5\ntwo,b,1e-05\n")
    report = collect(layout, made, results, {}, published(None))
    assert layout.tables / "predictions.csv" in report.paths
    assert (layout.tables / "predictions.csv").read_text().splitlines() == [
        "corpus,method,fold,slot,seed,id,label,p_a",
        "demo,vft,1,0,100,'=one,a,0.05",
        "demo,vft,1,0,100,two,b,1e-05",
        "demo,vft,1,1,101,'=one,a,0.15",
        "demo,vft,1,1,101,two,b,1e-05",
    ]
    assert "status" in (layout.tables / "runs.csv").read_text().splitlines()[0], "an artifact never replaces a table"
    (line,) = report.gaps
    assert line.endswith("without 1 run whose predictions.csv cannot be read, the first vft/1/2")
    collect(layout, made, results, {}, published(None), formats=["json"], out=tmp_path / "other")
    assert not (tmp_path / "other" / "predictions.csv").exists()


def test_collect_marks_what_is_missing(tmp_path: Path) -> None:
    """With runs missing the files are written and marked, and the report names the runs and their states."""
    made = graph(methods=("vft",), folds=("1",), slots=3)
    first, second, _ = made.runs
    report = collect(
        Layout(tmp_path, "demo"),
        made,
        {first.key: result(first, ((3, 1), (0, 4)), ("a", "b"))},
        {second.key: "failed"},
        published(None),
        formats=["markdown"],
        out=tmp_path / "elsewhere",
    )
    assert not report.complete
    assert report.missing == ("vft/1/1 (failed)", "vft/1/2 (pending)")
    assert "87.5 (1/3)†" in (tmp_path / "elsewhere" / FORMATS["markdown"]).read_text(encoding="utf-8")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_complete_tables_are_not_overwritten_with_fewer_runs(tmp_path: Path) -> None:
    """After a change of the code nothing has a result: the files stay unless forced. More runs, or a complete experiment, replace them."""
    layout, made = Layout(tmp_path, "demo"), graph(slots=2)

    def collected(made: Graph, finished: Sequence[Run], force: bool = False) -> tuple[str, bytes]:
        results = {run.key: result(run, ((3 + run.slot, 1), (0, 4)), ("a", "b")) for run in finished}
        report = collect(layout, made, results, {}, published(None), force=force)
        assert bool(report.paths) is not bool(report.kept)
        return report.kept, b"".join(path.read_bytes() for path in sorted(layout.folder.rglob("*.*")))

    kept, complete = collected(made, made.runs)
    assert not kept
    larger = graph(slots=3)
    for fewer in ((), larger.runs[:11]):
        assert len(fewer) < len(made.runs)
        kept, files = collected(larger, fewer)
        assert f"complete tables of 12 runs are not overwritten with incomplete ones of {len(fewer)}" in kept
        assert files == complete
    kept, files = collected(larger, larger.runs[:12])
    assert not kept
    assert files != complete
    assert not collected(made, made.runs)[0]
    fewer_slots = graph(slots=1)
    assert not collected(fewer_slots, fewer_slots.runs)[0], "complete with fewer runs, as launched"
    assert collected(fewer_slots, ())[0]
    assert not collected(fewer_slots, (), force=True)[0]


def test_collect_without_any_result(tmp_path: Path) -> None:
    """An experiment that has not begun gives tables of dashes, and no pictures."""
    report = collect(Layout(tmp_path, "demo"), graph(), {}, {}, published("iemocap_table1"))
    assert not report.complete
    assert len(report.missing) == len(graph().runs)
    assert len(report.paths) == len(FORMATS) + 5  # four fragments beside the document, and methods beside runs


def test_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A format that is not known leaves no half of the files."""
    with pytest.raises(UsageError, match=r"'pdf'.*latex, markdown, csv, json"):
        collect(Layout(tmp_path, "demo"), graph(), {}, {}, published(None), formats=["csv", "pdf"])
    assert not (tmp_path / "demo").exists()
