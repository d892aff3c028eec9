"""The tables of a sweep in every format, compiled by pdflatex."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.sweeps.decisions import TrialState
from jobs.sweeps.records import Sweep
from jobs.sweeps.report.as_json import to_json
from jobs.sweeps.report.choice import choice_of
from jobs.sweeps.report.plots import plot
from jobs.sweeps.report.scores import TrialRecord
from jobs.sweeps.report.summary import SweepSummary, summarise
from jobs.sweeps.report.tables import PAGE_ROWS, render, render_points_csv, render_runs_csv, tables_of
from tests.jobs.sweeps import report_cases as cases

needs_pdflatex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
NASTY = "100% & $x_1$ {\\bf ~^#} [*] --"


def _summary(*trials: TrialRecord, sweep: Sweep | None = None) -> SweepSummary:
    return summarise(sweep or cases.sweep(), trials, cases.results(trials))


def _markdown(*trials: TrialRecord, sweep: Sweep | None = None) -> str:
    summary = _summary(*trials, sweep=sweep)
    return render("sweep.md", summary, choice_of(summary))


def _compile(source: str, folder: Path) -> str:
    """Compile a document beside its plot; the log of pdflatex."""
    (folder / "table.tex").write_text(source, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout.decode("latin-1")[-2000:]
    return (folder / "table.log").read_text(encoding="latin-1")


def test_rows_of_points() -> None:
    """The best is bold; remarks on points not distinguishable from it, below it, and incomplete."""
    lines = _markdown(*cases.some(), cases.trial([512], {}, TrialState.running)).splitlines()
    assert "| 16+64 | **65.3** ± 0.4 | 61.9 to 68.7 | 3/3 | 6 | – | – | – | – | best |" in lines
    assert "| 64 | 65.0 ± 0.3 | 62.0 to 67.9 | 3/3 | 6 | −0.3 | −1.5 to 0.8 | 6 | 0.493 | not distinguishable from the best |" in lines
    assert "| 16 | 58.0 ± 0.6 | 52.9 to 63.1 | 3/3 | 6 | −7.3 | −7.8 to −6.8 | 6 | \\<0.001 | below the best |" in lines
    assert "| 64+256 | 55.0 ± 1.3 | 43.6 to 66.4 | 2/3 | 4 | −6.3 | −7.0 to −5.5 | 4 | – | stopped early |" in lines  # -6.25, half up
    assert "| 16+64+256 | – | – | 0/3 | 0 | – | – | – | – | failed |" in lines
    assert "| 512 | – | – | 0/3 | 0 | – | – | – | – | under way |" in lines
    assert "- 16+64+256: ptapt fold 1: 100% of the loss is NaN\\_" in lines


def test_captions_explain_the_numbers() -> None:
    """What ± is, the number of comparisons, and sentences on this sweep only if they apply."""
    said = _markdown(*cases.some())
    assert "over slots, of the mean over folds" in said
    assert "corrected for 3 comparisons (Holm)" in said
    assert "does not show that a set is as good" in said
    assert "biased upwards" in said
    assert "purity grows with k" in said
    assert "nine standard deviations" in said
    assert "is not tested" in said
    assert "diverged" not in said
    assert "not finished" not in said
    five = replace(cases.sweep(), experiment=replace(cases.sweep().experiment, sweep=replace(cases.sweep().experiment.sweep, seeds=5)))
    assert "nine standard deviations" not in _markdown(*cases.some(), sweep=five)
    assert "is not tested" not in _markdown(*cases.some()[:4])


def test_caption_does_not_mention_tests_that_were_not_made() -> None:
    """A single complete point is compared with stopped ones, without a test; without others there is no comparison."""
    done = cases.trial([16], dict.fromkeys(cases.FOLDS, (60.0, 61.0)))
    stopped = cases.trial([64], {"1": (50.0, 51.0)}, TrialState.stopped)
    said = _markdown(done, stopped)
    assert "Holm" not in said
    assert "because of low first folds" in said
    assert "depend on other folds too" in said
    assert "Difference" not in " ".join(tables_of(_summary(done), choice_of(_summary(done))).caption)
    assert "selected on these speakers" not in _markdown(done)


def test_caption_without_a_best_point() -> None:
    """Nothing is bold, and no difference is printed."""
    said = _markdown(cases.trial([16], {"1": (60.0, 61.0)}, TrialState.running))
    assert "No point is complete, so there is no best." in said
    assert "**" not in said
    assert "Holm" not in said
    assert "No point is complete" in _markdown()


def test_cost_has_gpu_hours_only_with_gpus() -> None:
    """Otherwise only CPU-hours."""
    trials = cases.some()
    on_gpu = summarise(cases.sweep(), trials, cases.results(trials, device="1 x NVIDIA H200"))
    for summary, headings in ((_summary(*trials), ("", "CPU-hours")), (on_gpu, ("", "GPU-hours", "CPU-hours"))):
        assert tables_of(summary, choice_of(summary)).cost.headings == headings
    assert ("Spent by this sweep", "57.00", "0.00") in tables_of(on_gpu, choice_of(on_gpu)).cost.rows


def test_csv_is_not_rounded_and_reads_back() -> None:
    """One row a point with every number of the table; one row for every run that counts."""
    summary = _summary(*cases.some())
    points = list(csv.DictReader(io.StringIO(render_points_csv(summary))))
    assert [row["point"] for row in points] == [point.point.label for point in summary.points]
    assert float(points[1]["mean_ua"]) == summary.points[1].ua.mean
    assert (points[1]["remark"], points[0]["difference"], points[-1]["mean_ua"]) == ("not distinguishable from the best", "", "")
    assert float(points[1]["holm_p"]) == pytest.approx(float(points[1]["t_p"]))
    runs = list(csv.DictReader(io.StringIO(render_runs_csv(summary))))
    assert len(runs) == sum(point.runs for point in summary.points) == 30
    assert runs[0] == {
        **{"point": "16+64", "counts": "16 64", "settings": "", "fold": "1", "slot": "0", "seed": "100"},
        **{"ua": "57.6", "wa": "58.6", "macro_f1": "56.6", "state": "complete"},
    }


def test_json_is_stable() -> None:
    """Keys that programs read; nothing in it is NaN."""
    summary = _summary(*cases.some())
    value = json.loads(json.dumps(to_json(summary, choice_of(summary)), allow_nan=False))
    assert value["schema"] == 1
    assert (value["best"], value["smaller"], value["under_way"]) == ("16+64", "64", False)
    assert value["trials"] == {"complete": 4, "stopped": 2, "failed": 1, "running": 0, "interrupted": 0}
    first, second = value["points"][:2]
    assert first["counts"] == [16, 64]
    assert first["overrides"] == ["recipe.cluster.counts=[16,64]"]
    assert (first["mean_ua"], first["mean_wa"], first["mean_macro_f1"], first["to_best"]) == (65.3, 66.3, 64.3, None)
    assert second["to_best"]["distinguishable"] is False or second["to_best"]["pairs"] == 6
    assert set(first["proxies"]["k"]) == {"16", "64"}
    assert value["cost"]["saved_by_sharing"] == {"gpu_hours": 0.0, "cpu_hours": 24.0}
    assert value["choice"]["grid"].startswith("python launch.py grid exp ")
    assert [found["fold"] for found in value["by_fold"]] == ["1", "2", "3"]
    empty = _summary()
    assert json.loads(json.dumps(to_json(empty, choice_of(empty)), allow_nan=False))["best"] is None


@pytest.mark.slow
@needs_pdflatex
def test_pdflatex_compiles_a_report_with_its_picture(tmp_path: Path) -> None:
    """With special characters in names, on several pages, without overfull lines."""
    (tmp_path / "plot.pdf").write_bytes(plot(_summary(*cases.some()), "pdf"))
    many = tuple(cases.trial([k], dict.fromkeys(cases.FOLDS, (40.0 + k % 7, 41.0))) for k in range(1000, 1000 + PAGE_ROWS + 2))
    nasty = cases.trial([16], {}, TrialState.failed, NASTY, name=NASTY)
    sweep = replace(cases.sweep(), corpus=replace(cases.sweep().corpus, name=NASTY))
    sweep = replace(sweep, experiment=replace(sweep.experiment, name=NASTY))
    summary = _summary(*cases.some(), *many, nasty, sweep=sweep)
    log = _compile(render("sweep.tex", summary, choice_of(summary)), tmp_path)
    assert "plot.pdf" in log
    assert "Overfull" not in log
    assert "Float too large" not in log


@needs_pdflatex
def test_pdflatex_compiles_an_empty_sweep(tmp_path: Path) -> None:
    """Without points there are no tables, and without a picture no figure."""
    _compile(render("sweep.tex", _summary(), choice_of(_summary())), tmp_path)
