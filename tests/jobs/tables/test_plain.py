"""Tables beside the main one: methods by settings with a row of ratios, and prior work; in every format, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import scipy.stats
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.errors import UsageError
from jobs.experiment.config import load_experiment
from jobs.experiment.recipes import method_recipes
from jobs.statistics import holm, round_half_up
from jobs.store.scores import Score, Terms
from jobs.tables.collect import text_of
from jobs.tables.display import print_tables, tables_of
from jobs.tables.latex import PLAIN, fragments
from jobs.tables.plain import plain_tables, settings_json
from jobs.tables.published import load_published
from jobs.tables.ratio import gain_ratio, ratio
from jobs.tables.summary import Status, Summary, summarise
from ser_core.settings.recipe import Recipe
from tests.jobs.table_cases import CONFIGS, entry, paper_like, published, summary

SUBSETS = ("8th", "4th", "half", "")


def efficiency() -> Summary:
    """Two slots of one fold, a point apart: V-FT 60, 64, 66, 67; TAPT 2 higher; P-TAPT 4 higher, but equal to V-FT on everything."""
    base = dict(zip(SUBSETS, (60.0, 64.0, 66.0, 67.0), strict=True))
    return summary(
        tuple(
            entry(f"{method}-{part}".rstrip("-"), "5", slot, ua + (gain if part or method != "ptapt" else 0.0) + slot)
            for method, gain in (("vft", 0.0), ("tapt", 2.0), ("ptapt", 4.0))
            for part, ua in base.items()
            for slot in range(2)
        )
    )


def test_methods_by_settings_have_the_shape_of_table_4() -> None:
    """Rows of methods, a column for each part of the data, ratios below; and the published figures with theirs, as in the paper."""
    [table] = plain_tables(efficiency(), published("iemocap_table4"))
    assert table.columns == ("", "1/8", "1/4", "1/2", "all (5.44 h)")
    ours, theirs = table.blocks
    assert ours[0] == ("V-FT", "60.5 ± 0.7", "64.5 ± 0.7", "66.5 ± 0.7", "67.5 ± 0.7")
    assert "mean ± sd over slots; runs of each cell: n = 2." in table.caption[0]
    assert ours[3] == ("TAPT / P-TAPT", *["50.0 % (50.0 to 50.0)"] * 3, "–")
    assert theirs[0] == ("V-FT, published", "56.8", "60.9", "66.4", "67.3")
    assert theirs[3] == ("TAPT / P-TAPT, published", "65.0 %", "62.5 %", "80.6 %", "81.3 %")
    found = settings_json(efficiency(), published("iemocap_table4"))
    assert found is not None
    assert found["ratio"] == [50.0, 50.0, 50.0, None]
    assert found["ratio_interval_95"] == [[50.0, 50.0]] * 3 + [None]
    assert found["denominator_interval_95"] == [[4.0, 4.0]] * 3 + [[0.0, 0.0]]
    assert "not above zero: all (5.44 h) 0.0 (0.0 to 0.0)." in " ".join(table.caption)
    assert found["mean_ua"]["P-TAPT"] == [64.5, 68.5, 70.5, 67.5]


def test_published_figures_are_compared_with_our_intervals() -> None:
    """In each column that has one: two slots a tenth of a point apart, with an interval of 1.3 points."""
    means = {"vft-8th": 50.0, "vft-4th": 70.0, "vft": 67.2, "ptapt-half": 70.0}
    found = summary(tuple(entry(method, "5", slot, ua + slot / 10) for method, ua in means.items() for slot in range(2)))
    [table] = plain_tables(found, published("iemocap_table4"))
    assert table.caption[-1] == (
        "A published figure lies inside, below or above our 95 % interval over seeds (no test: it has no spread): "
        "V-FT 1/8 above, 1/4 below, all (5.44 h) inside; P-TAPT 1/2 inside."
    )
    [table] = plain_tables(efficiency(), published("iemocap_table4"))
    assert table.caption[-1].endswith("; TAPT / P-TAPT 1/8 above, 1/4 above, 1/2 above.")
    assert "no test" not in " ".join(plain_tables(found, published("emodb_subsets"))[0].caption)


def test_dropped_runs_are_named_beside_the_means_without_them() -> None:
    """In the tables by settings and of prior work too: mean and sd over all runs of each cell that has dropped ones, and their number."""
    runs = [entry(method, "5", slot, 60.0 + slot) for method in ("vft", "tapt-8th") for slot in range(2)]
    runs += [entry("vft", "5", slot, 50.0, Status.outlier, seed=99) for slot in range(2)]
    [table] = plain_tables(summary(tuple(runs)), published("iemocap_table4"))
    what = "Means ± sd over all runs, dropped ones (their number) included: V-FT all (5.44 h) 55.3 ± 0.4 (2); no other run was dropped."
    assert what in table.caption
    [table] = plain_tables(summary(tuple(runs)), published("iemocap_table1"))
    assert "dropped ones (their number) included: V-FT 55.3 ± 0.4 (2); no other" in " ".join(table.caption)
    assert "No run was dropped." in plain_tables(efficiency(), published("iemocap_table4"))[0].caption


@pytest.mark.slow
def test_parts_of_the_data_are_compared_with_the_same_part_only() -> None:
    """Of twelve methods 12 pairs in place of 66, and each p-value is corrected for these; without their recipes all pairs are compared."""
    experiment = load_experiment("iemocap-subsets", ["table=null"], configs=CONFIGS, recipe_schema=Recipe)
    variants = {name: variant.method for name, variant in experiment.variants.items()}
    recipes = method_recipes(experiment.recipes, CONFIGS, variants)
    entries = [
        entry(method, fold, slot, 60.0 + 3.7 * number + 0.7 * math.sin(9 * slot + number + int(fold)))
        for number, method in enumerate(experiment.methods)
        for fold in "12"
        for slot in range(4)
    ]
    some, every = (summarise(entries, experiment="subsets", recipes=known) for known in (recipes, ()))
    parts = {(each.first.partition("-")[2], each.second.partition("-")[2]) for each in some.comparisons}
    assert parts == {(part, part) for part in ("8th", "4th", "half", "")}
    assert (len(some.comparisons), len(every.comparisons)) == (12, 66)
    raw = [each.over_pairs.t_p for each in some.comparisons]
    assert tuple(each.corrected.pairs_t for each in some.comparisons) == holm(raw)
    [table] = tables_of(some, published(None))
    assert len(table.differences) == 12
    assert table.differences_caption[-1] == "Compared are methods with the same recipe.training_fraction."
    assert tables_of(every, published(None))[0].differences_caption[-1] != table.differences_caption[-1]


def test_ratios_are_of_unrounded_means() -> None:
    """81.25 prints as 81.3, of published means and of ours; without a gain of the second there is none; a loss of the first is negative."""
    exact = ratio(67.3, 72.5, 73.7)
    assert exact == 81.25
    assert round_half_up(exact) == "81.3"
    assert gain_ratio(pairs(67.2, 67.4), pairs(72.4, 72.6), pairs(73.6, 73.8)).percent == 81.25
    assert [ratio(60.0, 61.0, to) for to in (60.0, 59.0)] == [None, None]
    assert ratio(60.0, 59.0, 62.0) == -50.0


def pairs(*values: float) -> dict[tuple[str, int], float]:
    return {("5", slot): value for slot, value in enumerate(values)}


def p_of_ratio(base: Sequence[float], of: Sequence[float], to: Sequence[float], percent: float) -> float:
    """The paired t-test of scipy that the ratio is `percent`: that (of - base) - percent / 100 * (to - base) has mean zero."""
    rest = [second - first - percent / 100 * (third - first) for first, second, third in zip(base, of, to, strict=True)]
    return float(scipy.stats.ttest_1samp(rest, 0.0).pvalue)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0.2, 20.0))
def test_the_interval_of_a_ratio_is_where_its_test_does_not_reject(seed: int, n: int, gain: float) -> None:
    """Fieller's interval: p is 0.05 at both ends. There is a ratio exactly if scipy's interval of the denominator is above zero."""
    draw = Random(seed)
    base, of, to = ([mean + draw.gauss(0, 1.5) for _ in range(n)] for mean in (60.0, 60.0 + gain / 2, 60.0 + gain))
    found = gain_ratio(pairs(*base), pairs(*of), pairs(*to))
    gains = [after - before for before, after in zip(base, to, strict=True)]
    low, high = scipy.stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    assert found.gain_interval == pytest.approx((low, high))
    assert (found.percent is None) == (found.interval is None) == (low <= 0)
    if found.percent is not None and found.interval is not None:
        assert found.interval.low <= found.percent <= found.interval.high
        assert [p_of_ratio(base, of, to, end) for end in found.interval] == pytest.approx([0.05, 0.05], rel=1e-3)


def test_a_ratio_whose_denominator_may_be_zero_is_a_dash() -> None:
    """As it was found on EmoDB: a gain of 0.4 points, with runs that vary by 4, gave -3195 %. The caption has the gain and its interval."""
    ua = {"vft": (34.0, 30.1, 32.8), "tapt": (20.1, 18.0, 22.5), "ptapt": (28.1, 36.4, 33.6)}
    found = summary(tuple(entry(method, "5", slot, value) for method, values in ua.items() for slot, value in enumerate(values)))
    [table] = plain_tables(found, published("iemocap_table4"))
    assert table.blocks[0][3][1:] == ("–",) * 4
    what = (
        "There is no ratio where the 95 % interval of the gain of P-TAPT, in points, is not above zero: all (5.44 h) +0.4 (−14.8 to 15.6)."
    )
    assert what in table.caption
    json_of = settings_json(found, published("iemocap_table4"))
    assert json_of is not None
    assert json_of["ratio"] == [None] * 4
    assert json_of["denominator_interval_95"][:3] == [None] * 3
    assert gain_ratio(pairs(60.0), pairs(61.0), pairs(64.0)).percent is None, "one pair has no interval"


def test_an_unfinished_cell_is_marked() -> None:
    """A method with some runs has their number, or none of them; a method that the experiment does not have is a dash. One note each."""
    runs = (entry("vft", "5", 0, 60.0), entry("vft", "5", 1, None), entry("tapt", "5", 0, None), entry("tapt", "5", 1, None))
    [table] = plain_tables(summary(runs), published("iemocap_table4"))
    assert table.blocks[0][0] == ("V-FT", "–", "–", "–", "60.0 (1/2)†")
    assert table.blocks[0][1] == ("TAPT", "–", "–", "–", "– (0/2)†")
    assert table.blocks[0][3][1:] == ("–",) * 4
    assert [sentence for sentence in table.caption if sentence.startswith(("–", "†", "‡"))] == [
        "–: no such method in this experiment.",
        "† Incomplete: finished / expected runs; such a column has no ratio.",
    ]


def test_a_cell_that_cannot_exist_is_named_by_null(tmp_path: Path) -> None:
    """A method that a backbone refuses, for example: `null` in its place is a dash with the note, in the cell and in the row of ratios."""
    loaded = yaml.safe_load((CONFIGS / "published.yaml").read_text(encoding="utf-8"))
    loaded["tables"]["emodb_subsets"]["settings"]["rows"][1]["methods"][0] = None
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(loaded), encoding="utf-8")
    [table] = plain_tables(efficiency(), load_published(tmp_path / "published.yaml", "emodb_subsets"))
    assert [row[1] for row in table.blocks[0]] == ["60.5 ± 0.7", "–", "64.5 ± 0.7", "–"]
    assert [sentence for sentence in table.caption if sentence.startswith("–")] == ["–: no such method in this experiment."]
    assert not any(sentence.startswith("–") for sentence in plain_tables(efficiency(), published("emodb_subsets"))[0].caption)


def test_captions_have_the_words_of_the_registry() -> None:
    """Of a table by settings, and of prior work."""
    found = dataclasses.replace(efficiency(), score=Score("accuracy", "accuracy", "Recognised digits"), terms=Terms(examples="images"))
    by_settings, *_ = plain_tables(found, published("emodb_subsets"))
    assert "All stages of a run train on the same part of the training images; smaller parts" in " ".join(by_settings.caption)
    prior = next(table for table in plain_tables(found, published("iemocap_table1")) if table.name == "prior-work")
    assert prior.caption[0].startswith("Recognised digits (accuracy, %) beside prior work")
    assert prior.columns[2] == "accuracy"


def test_prior_work_has_our_methods_among_it() -> None:
    """The six published rows with their features, then ours with mean, sd, n and the interval over folds and seeds."""
    [table] = plain_tables(summary(paper_like("iemocap_table1")), published("iemocap_table1"))
    theirs, ours = table.blocks
    assert [row[2] for row in theirs] == ["63.9", "64.3", "66.9", "66.3", "72.1", "75.9"]
    assert [row[0] for row in ours] == ["V-FT", "TAPT", "P-TAPT"]
    assert ours[0] == ("V-FT", "this experiment", "69.9 ± 0.2 (n 25)", "64.9 to 74.9")
    assert "no paired comparison" in " ".join(table.caption)


def test_an_experiment_without_an_entry_has_none() -> None:
    """Nothing is asked for: no table, null in the JSON."""
    assert plain_tables(efficiency(), published("savee_table2")) == ()
    assert json.loads(text_of("json", efficiency(), published(None), PLAIN))["settings_table"] is None


def test_plain_tables_are_in_every_format() -> None:
    """Markdown, LaTeX (a fragment of its own), JSON, and what is printed."""
    found, beside = efficiency(), published("iemocap_table4")
    rows = [line for line in text_of("markdown", found, beside, PLAIN).splitlines() if line.startswith("| V-FT, published")]
    assert rows == ["| V-FT, published | 56.8 | 60.9 | 66.4 | 67.3 |"]
    assert r"V-FT, published & 56.8 & 60.9 & 66.4 & 67.3 \\" in fragments(found, beside, PLAIN)["settings.tex"]
    assert json.loads(text_of("json", found, beside, PLAIN))["settings_table"]["columns"] == ["1/8", "1/4", "1/2", "all (5.44 h)"]
    text = io.StringIO()
    print_tables(found, beside, Console(file=text, width=200, highlight=False))
    assert "V-FT, published  " in text.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"label": "a", "methods": ["x"]}]}, "row a: expected a method and a figure for each of the columns 1, 2"),
        (
            {"rows": [{"label": "a", "methods": ["x", "y"], "ua": [1]}]},
            "row a: expected a method and a figure for each of the columns 1, 2",
        ),
        ({"ratio": {"label": "r", "base": "a", "of": "b", "to": "c"}}, "ratio: of rows that are not there"),
        ({"rows": [{"methods": ["x", "y"]}]}, "'label'"),
    ],
)
def test_a_malformed_table_by_settings_is_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    """The file, the entry and what is wrong."""
    settings = {"title": "t", "columns": ["1", "2"], "rows": [{"label": "a", "methods": ["x", "y"]}], **change}
    entries = {"t": {"title": "t", "folds": [], "columns": [], "rows": [], "settings": settings}}
    file = tmp_path / "published.yaml"
    file.write_text(yaml.safe_dump({"methods": {}, "source": "s", "tables": entries}), encoding="utf-8")
    with pytest.raises(UsageError) as error:
        load_published(file, "t")
    assert f"{file}: tables.t: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["iemocap-subsets", "emodb-subsets"])
def test_the_shipped_experiments_fill_their_table(name: str) -> None:
    """Every cell of the table is a method of the experiment, and each method is in one cell."""
    experiment = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    wanted = load_published(CONFIGS / "published.yaml", experiment["table"]).settings
    assert wanted is not None
    assert sorted(method for row in wanted.rows for method in row.methods) == sorted(experiment["methods"])
    fractions = {name: variant["recipe"]["training_fraction"] for name, variant in experiment["variants"].items()}
    for row in wanted.rows:
        assert [fractions.get(method, 1) for method in row.methods] == [0.125, 0.25, 0.5, 1]
