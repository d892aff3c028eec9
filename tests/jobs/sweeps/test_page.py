"""The HTML report of a sweep."""

from __future__ import annotations

import base64
from dataclasses import replace

from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.choice import choice_of
from jobs.sweeps.report.page import render_page
from jobs.sweeps.report.summary import summarise
from tests.jobs.report.cases import HOSTILE
from tests.jobs.report.test_page import Elements
from tests.jobs.sweeps import report_cases as cases

PLOT = b"\x89PNG"


def test_the_page_has_the_tables_of_the_sweep() -> None:
    """Points to sort with the best in bold, the embedded plot, proxies, folds, cost, files and commands; names are escaped."""
    nasty = cases.trial([16], {}, TrialState.failed, HOSTILE, name=HOSTILE)
    trials = (*cases.some(), nasty)
    sweep = replace(cases.sweep(), corpus=replace(cases.sweep().corpus, name=HOSTILE))
    summary = summarise(sweep, trials, cases.results(trials))
    text = render_page(summary, choice_of(summary), PLOT)
    page = Elements(text)
    assert page.open == []
    assert page.tags["script"] == text.count("<script>") == 1
    assert page.values("src") == [f"data:image/png;base64,{base64.b64encode(PLOT).decode()}"]
    assert page.values("download") == ["trials.csv", "runs.csv", "summary.json"]
    assert "<b>65.3 ± 0.4</b>" in text
    assert [each for each in page.values("id") if each.endswith("-heading")] == [
        f"{name}-heading" for name in ("result", "failed", "proxies", "folds", "cost", "next")
    ]
    assert text == render_page(summary, choice_of(summary), PLOT)


def test_a_sweep_without_points() -> None:
    """It says what there is to do, without empty tables."""
    summary = summarise(cases.sweep(), (), cases.results(()))
    page = Elements(render_page(summary, choice_of(summary), PLOT))
    assert page.tags["table"] == page.tags["img"] == 0
