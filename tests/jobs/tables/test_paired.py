"""Methods side by side that differ in one setting: their differences by scipy, what is missing, golden files, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import scipy.stats
import yaml

from jobs.errors import UsageError
from jobs.experiment.recipes import MethodRecipe, MetricColumn
from jobs.statistics import holm, mean, round_half_up
from jobs.tables.collect import text_of
from jobs.tables.latex import PLAIN, fragments
from jobs.tables.metrics import FurtherMetric, MetricCell
from jobs.tables.paired import PAIRED_COLUMNS, paired_differences, render_paired_csv
from jobs.tables.plain import plain_tables
from jobs.tables.published import PairedTable, load_published
from jobs.tables.summary import Status, Summary, summarise
from tests.command_line import ROOT
from tests.jobs.table_cases import entry, published

GOLDEN = Path(__file__).parents[1] / "golden" / "tables" / "paired"
FOLDS = ("1", "2", "3", "4", "5")
SCRIPTED = MetricColumn("ua_scripted", "UA scripted", 3, "UA scripted: of scripted turns.")
MEANS = {"vft": 70.0, "vft-disjoint": 69.5, "text": 95.0, "text-disjoint": 50.0, "concat": 96.0, "concat-disjoint": 69.0}


def noise(method: str, fold: str, slot: int) -> float:
    return round(2 * math.sin(7 * slot + 3 * int(fold) + len(method)), 2)


def value(method: str, fold: str, slot: int) -> float:
    return round(MEANS[method] + noise(method, fold, slot), 2)


def two_protocols() -> Summary:
    """V-FT, text and a fusion, twice; UA of scripted turns of text alone, 2 points above; a run of text is dropped."""
    entries = [entry(method, fold, slot, value(method, fold, slot)) for method in MEANS for fold in FOLDS for slot in range(3)]
    entries.append(entry("text", "1", 0, 10.0, Status.outlier, seed=99))
    recipes = [MethodRecipe(method, "paper", (), compared_within=("protocol=scripts_disjoint",) * ("dis" in method)) for method in MEANS]
    found = summarise(entries, experiment="leak", recipes=recipes)
    further = [
        FurtherMetric(
            "iemocap",
            method,
            SCRIPTED,
            tuple(MetricCell(fold, tuple((slot, slot, value(method, fold, slot) / 100 + 0.02) for slot in range(3))) for fold in FOLDS),
        )
        for method in ("text", "text-disjoint")
    ]
    return dataclasses.replace(found, further=tuple(further))


def pairs_wanted() -> PairedTable:
    wanted = published("protocols").paired
    assert wanted is not None
    return wanted


def test_differences_are_of_pairs_that_no_other_test_has() -> None:
    """Second minus first over (fold, slot), by scipy; p-values corrected within this table; the main table has none of them."""
    found = two_protocols()
    assert len(found.comparisons) == 6
    assert all(("disjoint" in each.first) == ("disjoint" in each.second) for each in found.comparisons)
    vft, text, scripted, layer = paired_differences(found, pairs_wanted())
    assert [(each.label, each.heading) for each in (vft, text, scripted)] == [("V-FT", "UA"), ("Text", "UA"), ("Text", "scripted")]
    assert (text.first.method, text.second.method, text.over_pairs.pairs) == ("text", "text-disjoint", 15)
    sides = [[value(method, fold, slot) for fold in FOLDS for slot in range(3)] for method in ("text", "text-disjoint")]
    before = mean(sides[0])
    assert before is not None
    assert text.first.mean == pytest.approx(before)
    tested = scipy.stats.ttest_rel(sides[1], sides[0])
    assert text.over_pairs.t_p == pytest.approx(tested.pvalue)
    assert text.over_pairs.interval == pytest.approx(tuple(tested.confidence_interval(0.95)))
    assert scripted.first.mean == pytest.approx(before + 2)
    assert scripted.over_pairs.mean == pytest.approx(text.over_pairs.mean)
    assert text.crossed is not None
    assert (text.crossed.folds, text.crossed.seeds) == (5, 3)
    assert (layer.label, layer.first.method, layer.second.method) == ("Audio + text, layer", "concat", "concat-disjoint")
    four = (vft, text, scripted, layer)
    assert tuple(each.t_p_holm for each in four) == holm([each.over_pairs.t_p for each in four])
    assert tuple(each.crossed_p_holm for each in four) == holm([each.crossed.p if each.crossed else None for each in four])


def test_the_table_states_what_is_missing() -> None:
    """A method without runs is a dash without a difference, a pair without any is left out; dropped and missing runs are named."""
    whole = two_protocols()
    [table] = [each for each in plain_tables(whole, published("protocols")) if each.name == "paired"]
    assert [[row[:2] for row in rows] for rows in table.blocks] == [
        [("V-FT", "UA")],
        [("Text", "UA"), ("Text", "scripted")],
        [("Audio + text, layer", "UA")],
    ]
    text = " ".join(table.caption)
    assert "which is part of the difference" in text
    assert "Means ± sd over all runs, dropped ones (their number) included: Text, sessions 91.0 ± 5.1 (1); no other run" in text
    assert "Incomplete" not in text
    some = [each for method in whole.methods for cell in method.cells for each in cell.runs if each.method != "text-disjoint"]
    some = [dataclasses.replace(each, scores=None, status=Status.pending) if each.name == "vft/1/0" else each for each in some]
    [table] = [each for each in plain_tables(summarise(some, experiment="leak"), published("protocols")) if each.name == "paired"]
    (vft,), (alone,), _ = table.blocks
    assert vft[6] == "14"
    assert alone[3:] == ("–", "–", "–", "0", "–", "–", "–", "–", "–")
    assert "Incomplete, with their runs: V-FT, sessions 14." in table.caption
    nothing = summarise([entry("other", "1", 0, 50.0)], experiment="leak")
    assert plain_tables(nothing, published("protocols")) == ()


@pytest.mark.parametrize("name", ["iemocap-text", "script-leak"])
def test_every_method_of_both_protocols_has_a_row(name: str) -> None:
    """A method that a shipped experiment runs under both protocols, with the label of the table of methods."""
    experiment = yaml.safe_load((ROOT / "configs" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    disjoint = {each: variant["method"] for each, variant in experiment["variants"].items() if "protocol" in variant["recipe"]}
    found = published(experiment["table"])
    expected = [(method, each) for each, method in disjoint.items() if each in experiment["methods"]]
    assert found.paired == pairs_wanted()
    rows = {row.methods: row.label for row in found.paired.rows}
    assert {pair: rows.get(pair) for pair in expected} == {pair: found.labels[pair[0]] for pair in expected}


@pytest.mark.parametrize("name", ["paired.tex", "table.md"])
def test_text_formats_are_golden(name: str) -> None:
    assert rendered(name) == (GOLDEN / name).read_text(encoding="utf-8")


def test_csv_and_json_have_the_same_numbers() -> None:
    """Not rounded; golden but for the last digits, which differ between builds of scipy."""
    rows, golden = (list(csv.DictReader(io.StringIO(text))) for text in (rendered("paired.csv"), (GOLDEN / "paired.csv").read_text()))
    assert tuple(rows[0]) == PAIRED_COLUMNS
    for row, expected in zip(rows, golden, strict=True):
        for name in PAIRED_COLUMNS[:5]:
            assert row[name] == expected[name]
        assert [float(row[name]) for name in PAIRED_COLUMNS[5:]] == pytest.approx([float(expected[name]) for name in PAIRED_COLUMNS[5:]])
    stored = json.loads(text_of("json", two_protocols(), published("protocols"), PLAIN))["paired_table"]
    assert [float(row["difference"]) for row in rows] == [each["over_pairs"]["mean_difference"] for each in stored]
    assert round_half_up(stored[1]["first"]["mean"]) == "95.3"
    assert "paired_table" not in text_of("json", two_protocols(), published(None), PLAIN)


def rendered(name: str) -> str:
    found, beside = two_protocols(), published("protocols")
    if name.endswith(".tex"):
        return fragments(found, beside, PLAIN)[name]
    return render_paired_csv(found, pairs_wanted()) if name.endswith(".csv") else text_of("markdown", found, beside, PLAIN)


@pytest.mark.parametrize("rows", ["[{label: a, methods: [a]}]", "[{label: a}]"])
def test_pairs_of_another_shape_are_refused(rows: str, tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    entry_text = f"{{title: x, folds: [], columns: [], rows: [], paired: {{title: x, columns: [a, b], rows: {rows}}}}}"
    file.write_text(f"methods: {{}}\nsource: s\ntables: {{t: {entry_text}}}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"published.yaml: tables\.t: "):
        load_published(file, "t")


def write_golden() -> None:
    """Render the golden files again, then check the difference.

    python -c 'from tests.jobs.tables.test_paired import write_golden; write_golden()'
    """
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in ("paired.tex", "table.md", "paired.csv"):
        (GOLDEN / name).write_text(rendered(name), encoding="utf-8")
