"""Scores before and after adaptation: paired differences, a table of sources and corpora in every format, golden files."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from jobs.experiment.recipes import Adaptation, MethodRecipe, MetricColumn
from jobs.statistics import mean, paired_test
from jobs.tables.adaptation import ADAPTATION_COLUMNS, adaptations_of, render_adaptation_csv
from jobs.tables.further import further_of
from jobs.tables.latex import PLAIN, fragments
from jobs.tables.plain import plain_tables
from jobs.tables.summary import Status, Summary, summarise
from tests.jobs.table_cases import entry
from tests.jobs.tables.display_cases import adapted_case


def numbers(found: Summary, method: str, corpus: str = "natural") -> list[float]:
    """The scores of a method in the order of fold and slot."""
    [own] = [each for each in found.methods if (each.method, each.corpus) == (method, corpus)]
    return [run.scores.ua for cell in own.cells for run in cell.runs if run.scores and run.status is Status.accepted]


def test_differences_are_paired_by_fold_and_slot() -> None:
    """After is the score of the run, before the metric in its unit; both are of the same run, and of runs that count."""
    found, _ = adapted_case()
    first = adaptations_of(found)[0]
    assert (first.source, first.corpus, first.method) == ("acted", "natural", "two-stage")
    before = [value for by_slot in first.before.values() for value in by_slot.values()]
    after = numbers(found, "two-stage")
    assert len(before) == len(after) == 6
    assert first.difference.over_pairs == paired_test(before, after)
    assert first.mean_before == pytest.approx(mean(before))
    assert first.difference.crossed is not None
    assert first.difference.crossed.mean == pytest.approx(mean([b - a for a, b in zip(before, after, strict=True)]))
    assert first.difference.corrected.pairs_t == pytest.approx(min(1, 2 * (first.difference.over_pairs.t_p or 1)))


def test_rows_are_sources_and_columns_are_corpora() -> None:
    """A method without a source has a dash there and before; a pair that no experiment has is two dashes."""
    table, differences = plain_tables(*adapted_case())[:2]
    assert table.columns == ("Source", "", "natural, before", "natural, after", "phone, before", "phone, after")
    assert [row[:2] for row in table.blocks[0]] == [("acted", "Two stages"), ("read", "read first"), ("–", "direct")]
    acted, read, direct = table.blocks[0]
    assert read[4:] == ("–", "–")
    assert direct[2] == direct[4] == "–"
    assert acted[2] == "45.0"  # no spread: the seeds of a fold share the first stage
    assert [row[:2] for row in differences.blocks[0]] == [
        ("acted to natural", "Two stages"),
        ("read to natural", "read first"),
        ("acted to phone", "Two stages"),
    ]
    assert all(len(row) == len(differences.columns) for row in differences.blocks[0])


def test_it_is_in_csv_and_latex() -> None:
    """CSV has a row per run with its seed; LaTeX a file for each of the two tables."""
    case = adapted_case()
    rows = list(csv.DictReader(io.StringIO(render_adaptation_csv(case[0]))))
    assert tuple(rows[0]) == ADAPTATION_COLUMNS
    assert len(rows) == 18
    assert rows[1] == {
        **{"source": "acted", "corpus": "natural", "method": "two-stage", "fold": "1", "slot": "1", "seed": "1"},
        **{"before": "40.0", "after": str(numbers(case[0], "two-stage")[1])},
    }
    assert {"adaptation.tex", "adaptation-differences.tex"} <= set(fragments(*case, PLAIN))


def test_without_a_source_or_a_score_before_there_is_no_table() -> None:
    """Of results of before, or of methods trained on one corpus."""
    found, beside = adapted_case()
    assert adaptations_of(replace(found, recipes=())) == ()
    assert adaptations_of(replace(found, further=())) == ()
    assert not any(table.name.startswith("adaptation") for table in plain_tables(replace(found, recipes=(), further=()), beside))


def test_a_dropped_run_has_no_difference() -> None:
    """Its slot is not a pair."""
    column = MetricColumn("before", "before", 3, "Before.")
    recipes = (MethodRecipe("m", "paper", (), metrics=(column,), adaptation=Adaptation("acted", "before", 100.0)),)
    runs = [entry("m", "1", 0, 60.0), entry("m", "1", 1, 10.0, Status.outlier), entry("m", "1", 2, 70.0)]
    found = summarise(runs, experiment="e", recipes=recipes)
    metrics = {(run.corpus, "m", "1", run.slot, run.seed): {"before": 0.5} for run in runs}
    [only] = adaptations_of(replace(found, further=further_of(found, metrics)))
    assert only.after == {"1": {0: 60.0, 2: 70.0}}
    assert (only.difference.over_pairs.pairs, only.difference.over_pairs.mean) == (2, 15.0)
