"""The plot of a sweep: deterministic, and drawn for any summary."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.plots import Dot, _range, _spread, plot
from jobs.sweeps.report.scores import TrialRecord
from jobs.sweeps.report.summary import SweepSummary, summarise
from tests.jobs.sweeps import report_cases as cases

DONE = dict.fromkeys(cases.FOLDS, (60.0, 61.0))
CASES: dict[str, tuple[TrialRecord, ...]] = {
    "nothing has begun": (),
    "no fold is done": (cases.trial([16], {}, TrialState.running),),
    "one point": (cases.trial([16], DONE),),
    "no set of one count": (cases.trial([16, 64], DONE), cases.trial([64, 256], {"1": (50.0,)}, TrialState.stopped)),
    "one size": tuple(cases.trial([k], dict.fromkeys(cases.FOLDS, (50.0 + k / 10,))) for k in (16, 17, 32)),
    "none complete": (cases.trial([16], {"1": (50.0, 51.0)}, TrialState.running),),
    "many counts": tuple(cases.trial([k], dict.fromkeys(cases.FOLDS, (40.0 + k % 7,))) for k in range(2, 20)),
    "settings of one set": tuple(cases.trial([16], DONE, ptapt__learning_rate=rate) for rate in (0.1, 0.01)),
}


def _summary(*trials: TrialRecord) -> SweepSummary:
    return summarise(cases.sweep(), trials, {})


def _texts(summary: SweepSummary) -> set[str]:
    """The texts of its SVG."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        drawn = plot(summary, "svg").decode()
    return {re.sub(r"<[^>]*>", "", text).strip() for text in re.findall(r"<text[^>]*>.*?</text>", drawn, re.DOTALL)}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_plot_of_any_summary(case: str) -> None:
    """Without a warning, with both axes named."""
    texts = _texts(_summary(*CASES[case]))
    assert {"Validation UA (%)", "k, number of clusters (log scale)", "ensemble size (numbers of clusters in a set)"} <= texts
    assert ("no fold is done yet" in texts) == (case in ("nothing has begun", "no fold is done"))
    assert any(text.startswith("this k alone") for text in texts) == (
        case not in ("nothing has begun", "no fold is done", "no set of one count")
    )
    assert ("the best" in texts) == (case not in ("nothing has begun", "no fold is done", "none complete"))


def test_legend_names_what_is_drawn() -> None:
    """The best is labelled with its set, axes have each k and each size, and hollow points are explained if there are any."""
    texts = _texts(_summary(*cases.some()))
    assert {"16+64", "16", "64", "256", "1", "2", "not every fold done"} <= texts
    assert "not every fold done" not in _texts(_summary(*cases.some()[:4]))


@pytest.mark.slow
def test_labels_are_not_parsed_as_formulas() -> None:
    """Settings may hold any text; one too long for the picture is cut."""
    assert '16, name="$x_1$"' in {text.replace("&quot;", '"') for text in _texts(_summary(cases.trial([16], DONE, name="$x_1$")))}
    assert any(text.endswith("…") for text in _texts(_summary(cases.trial([16], DONE, name="x" * 40))))


@pytest.mark.slow
def test_the_same_sweep_gives_the_same_bytes() -> None:
    """A report without changes does not change the file."""
    first, second = (_summary(*trials) for trials in (cases.some(), tuple(reversed(cases.some()))))
    assert plot(first, "pdf") == plot(second, "pdf")
    assert Image.open(io.BytesIO(plot(first, "png"))).size == (1440, 680)


def test_points_of_one_size_stand_apart_and_near_it() -> None:
    """The first in the middle; none at the position of another, or closer to the next size."""
    summary = _summary(*CASES["many counts"])
    dots = [Dot(point, 50.0) for point in summary.points]
    places = _spread(dots)
    assert places[0] == 1.0
    assert len(set(places)) == len(places)
    assert all(abs(place - 1) <= 0.25 for place in places)
    low, high = _range(dots)
    assert low < 50 < high
