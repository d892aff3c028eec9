"""Tables in every format: golden files, what is bold or marked, and a pdflatex that really compiles them."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.control.outliers import rule_in_words
from jobs.errors import UsageError
from jobs.statistics import Interval, mean, round_half_up
from jobs.tables import published as figures
from jobs.tables.adaptation import render_adaptation_csv
from jobs.tables.as_json import to_json
from jobs.tables.display import (
    CSV_COLUMNS,
    METHOD_COLUMNS,
    print_tables,
    render_csv,
    render_markdown,
    render_methods_csv,
    tables_of,
)
from jobs.tables.format import markdown
from jobs.tables.latex import PLAIN, fragments
from jobs.tables.published import Published, load_published, position
from jobs.tables.summary import Entry, Scores, Status, Summary
from tests.jobs.table_cases import CONFIGS, entry, paper_like, published, summary
from tests.jobs.tables.display_cases import adapted_case, complete_case, incomplete_case, nasty_case

GOLDEN = Path(__file__).parents[1] / "golden" / "tables"
CASES = {"complete": complete_case, "incomplete": incomplete_case}
ADAPTED = ("adaptation.tex", "adaptation-differences.tex", "adaptation.csv", "table.md")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["table1.tex", "table1-differences.tex", "table.md", "runs.csv", "methods.csv", "terminal.txt"])
def test_text_formats_are_golden(case: str, name: str) -> None:
    """Every character of a table is as it was when somebody last looked at it."""
    found, beside = CASES[case]()
    assert rendered(found, beside, name) == (GOLDEN / case / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ADAPTED)
def test_tables_of_adapted_methods_are_golden(name: str) -> None:
    """Sources and corpora, before and after, and the paired differences."""
    assert rendered(*adapted_case(), name) == (GOLDEN / "adapted" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_json_is_golden(case: str) -> None:
    """The JSON keeps its keys and values; numbers may differ in the last digits between builds of scipy."""
    found, beside = CASES[case]()
    assert_close(
        json.loads(rendered(found, beside, "summary.json")), json.loads((GOLDEN / case / "summary.json").read_text(encoding="utf-8"))
    )


def rendered(found: Summary, beside: Published, name: str) -> str:
    if name.endswith(".tex"):
        return fragments(found, beside, PLAIN)[name]
    if name == "table.md":
        return render_markdown(found, beside)
    if name == "runs.csv":
        return render_csv(found)
    if name == "adaptation.csv":
        return render_adaptation_csv(found)
    if name == "methods.csv":
        return render_methods_csv(found)
    if name == "summary.json":
        return json.dumps(to_json(found, figures.to_json(beside)), indent=1, sort_keys=True, allow_nan=False) + "\n"
    text = io.StringIO()
    print_tables(found, beside, Console(file=text, width=80, force_terminal=False, highlight=False))
    return text.getvalue()


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    else:
        assert found == expected


def test_best_is_bold_with_every_tie_on_printed_digits() -> None:
    """Two means that print alike are both the best, and one that prints lower is not."""
    runs = (entry("vft", "1", 0, 70.04), entry("tapt", "1", 0, 69.96), entry("ptapt", "1", 0, 69.94))
    [table] = tables_of(summary(runs), published(None))
    assert [(row.cells[0].mean, row.cells[0].best) for row in table.blocks[0].rows] == [("70.0", True), ("70.0", True), ("69.9", False)]


def test_best_is_compared_as_a_number() -> None:
    """100.0 is better than 99.9, whatever their texts."""
    [table] = tables_of(summary((entry("vft", "1", 0, 99.9), entry("tapt", "1", 0, 100.0))), published(None))
    assert [row.mean.best for row in table.blocks[0].rows] == [False, True]


def test_a_column_with_an_incomplete_cell_has_no_best() -> None:
    """A column with a missing run has no winner; its cell says how many runs are in, and the other columns are as ever."""
    runs = (
        *(entry("vft", fold, slot, 60.0 + slot) for fold in "12" for slot in range(2)),
        *(entry("tapt", fold, slot, None if fold == "2" and slot else 70.0 + slot) for fold in "12" for slot in range(2)),
    )
    [table] = tables_of(summary(runs), published(None))
    vft, tapt = table.blocks[0].rows
    assert [cell.note for cell in tapt.cells] == ["", "1/2"]
    assert tapt.mean.note == "3/4"
    assert [cell.best for cell in (*tapt.cells, tapt.mean)] == [True, False, False]
    assert not any(cell.best for cell in (*vft.cells, vft.mean))
    assert any("Incomplete" in sentence for sentence in table.caption)


def test_a_single_method_is_not_its_own_best() -> None:
    """Bold says better than another: one method alone has none."""
    [table] = tables_of(summary((entry("vft", "1", 0, 70.0),)), published(None))
    assert not table.blocks[0].rows[0].cells[0].best


def test_human_listeners_do_not_compete() -> None:
    """The human row of SAVEE stands beside the methods without being best, and does not take the place of the best method."""
    _, block = tables_of(summary(paper_like("savee_table2")), published("savee_table2"))[0].blocks
    assert [row.label for row in block.rows] == ["V-FT", "TAPT", "P-TAPT", "Human"]
    assert [[cell.best for cell in row.cells] for row in block.rows] == [
        [False] * 4,
        [False, False, True, True],
        [True, True, False, False],
        [False] * 4,
    ]
    assert [row.mean.best for row in block.rows] == [False, True, False, False]


def test_caption_states_the_conditions() -> None:
    """A caption says what the seeds vary, n, the outlier rule, what was dropped, and the code that computed the runs."""
    found, beside = complete_case()
    [table] = tables_of(found, beside)
    text = " ".join((*table.caption, *table.details))
    for part in (
        "n = 5 runs a cell",
        "Seeds differ in fine-tuning only",
        "Outlier rule: none in force. Dropped: 0 outliers (0 rerun) and 0 diverged runs (0 rerun); 0 unresolved. Share",
        "Share of the variance of a run's UA that folds / seeds / the rest have: V-FT 90 / 0 / 10 %, TAPT",
        "Initial weights: wav2vec 2.0 of revision 2dcc7b7f9b; wav2vec v1 wav2vec_large.pt. Experiment",
        "code at commit 0123456789 with uncommitted changes; torch 2.13.0; transformers 5.22.0/5.23.0.",
    ):
        assert part in text
    found, beside = incomplete_case()
    [table] = tables_of(found, beside)
    assert [(row.n, row.dropped, row.every.mean, row.every.sd) for row in table.blocks[0].rows][:2] == [
        ("2–3", "2", "55.1", "6.8"),
        ("0–3", "0", "71.9", ""),
    ]
    text = " ".join(table.caption)
    assert "n = 0 to 3 runs a cell" in text
    for part in (
        "Outlier rule: pooled: a run further than 2 sigmas from the median of its cell",
        "judged in at most 3 rounds. Dropped: 1 outlier (1 rerun) and 1 diverged run (0 rerun); 1 unresolved.",
        "The rule is applied to a method once all its runs are finished. "
        "‡ Unresolved: outliers that were not replaced and are kept in the mean (P-TAPT 1 run).",
    ):
        assert part in text


def test_published_means_over_other_folds_are_told_apart() -> None:
    """With fewer folds than the paper the caption says so, and figures stand under their own fold."""
    runs = (entry("vft", "4", 0, 70.0), entry("vft", "2", 0, 70.0))
    [table] = tables_of(summary(runs), published("iemocap_table1"))
    assert table.columns == ("Session 4", "Session 2")
    assert [cell.mean for cell in table.blocks[1].rows[0].cells] == ["68.7", "76.2"]
    assert any("over all 5 folds of the paper, ours over 2" in sentence for sentence in table.caption)


def test_published_means_stand_beside_our_interval() -> None:
    """Inside, below or above the interval over seeds as printed; without a sentence where our folds are not those of the paper."""
    assert [position(value, Interval(69.96, 72.04)) for value in (69.94, 69.95, 72.04, 72.05)] == ["below", "inside", "inside", "above"]
    [table] = tables_of(*complete_case())
    assert any("our 95 % interval over seeds (no test: it has no spread): V-FT inside" in sentence for sentence in table.caption)
    [table] = tables_of(summary((entry("vft", "4", 0, 70.0), entry("vft", "4", 1, 71.0))), published("iemocap_table1"))
    assert not any("has no spread" in sentence for sentence in table.caption)


@pytest.mark.parametrize("table", ["iemocap_table1", "savee_table2"])
def test_published_means_follow_from_published_cells(table: str) -> None:
    """Every published mean is that of its cells, rounded half up: no figure was mistyped."""
    for row in published(table).rows:
        found = mean(list(row.ua.values()))
        assert found is not None
        assert round_half_up(found) == round_half_up(row.mean_ua)


def test_published_means_without_folds_stand_in_the_column_of_means() -> None:
    """Rows of a benchmark: a mean, dashes for the folds, whatever ours are called; the caption has their own source and what they are."""
    runs = tuple(entry("vft", fold, slot, 60.0 + slot) for fold in ("a", "b") for slot in range(2))
    [table] = tables_of(summary(runs), published("emobox_ravdess"))
    rows = {row.label: row for row in table.blocks[1].rows}
    assert [cell.mean for cell in rows["wav2vec 2.0 base"].cells] == ["–", "–"]
    assert rows["wav2vec 2.0 base"].mean.mean == "54.3"
    assert not any(row.mean.best for row in table.blocks[1].rows)
    assert table.columns == ("Fold a", "Fold b")
    text = " ".join(table.caption)
    assert (
        "Published figures: EmoBox (Ma et al., arXiv 2406.07162), frozen features, no published spread. The published figures are" in text
    )
    assert "of the paper, ours over" not in text


def test_a_single_fold_has_no_interval_over_folds() -> None:
    """Of a fixed split: dashes, and the captions of both tables state it; the interval over seeds is there."""
    runs = tuple(entry(method, "test", slot, 60.0 + slot) for method in ("vft", "tapt") for slot in range(3))
    [table] = tables_of(summary(runs), published(None))
    row = table.blocks[0].rows[0]
    assert row.both == "–"
    assert row.interval == "58.5 to 63.5"
    text = " ".join(table.caption)
    assert "One fold is held out: there is no interval over folds, and every ± and interval is over seeds only." in text
    assert "is for new folds too" not in text
    assert "One fold is held out: there is no interval and no test over folds and seeds." in table.differences_caption
    assert table.differences[0][-4:] == ("–",) * 4
    more = (*runs, *(entry(method, "2", slot, 60.0 + slot) for method in ("vft", "tapt") for slot in range(3)))
    [table] = tables_of(summary(more), published(None))
    assert "One fold" not in " ".join((*table.caption, *table.differences_caption))


def test_captions_state_what_is_known_of_the_corpus() -> None:
    """Under the table of that corpus only, and in the JSON."""
    runs = (entry("vft", "1", 0, 60.0), entry("vft", "1", 0, 70.0, corpus="other"))
    found = replace(summary(runs), corpus_captions={"other": ("The folds of other share speakers.",)})
    own, other = (" ".join(table.caption) for table in tables_of(found, published(None)))
    assert "share speakers" not in own
    assert "The folds of other share speakers." in other
    assert to_json(found)["corpus_captions"] == {"other": ["The folds of other share speakers."]}


def test_published_table_is_looked_up_by_name() -> None:
    """An unknown name is one line that lists the known ones and names the nearest."""
    with pytest.raises(UsageError, match=r"^table 'iemocap_tabel1'.*savee_table2.*\): did you mean 'iemocap_table1'\?$"):
        load_published(CONFIGS / "published.yaml", "iemocap_tabel1")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "methods: {}\nsource: s",
        "a: [",
        "methods: {}\nsource: s\ntables: {t: {title: x, folds: [a, b], columns: [a], rows: []}}",
        "methods: {}\nsource: s\ntables: {t: {title: x, folds: [a], columns: [a], rows: [{method: m, label: l, ua: [1, 2], mean: 1}]}}",
        "methods: {}\nsource: s\ntables: {t: {title: x, folds: [a], columns: [a], rows: [{method: m, ua: [1], mean: 1}]}}",
    ],
)
def test_malformed_published_figures_are_one_line(tmp_path: Path, text: str) -> None:
    """A file of another shape is a usage error that names the file, on one line."""
    file = tmp_path / "published.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        load_published(file, "t")
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_csv_round_trip_through_pandas(tmp_path: Path) -> None:
    """pandas reads back every run with its exact numbers and names."""
    found, _ = incomplete_case()
    file = tmp_path / "runs.csv"
    file.write_text(render_csv(found), encoding="utf-8")
    frame = pd.read_csv(file, dtype={"fold": str})
    assert tuple(frame.columns) == CSV_COLUMNS
    entries = [item for method in found.methods for cell in method.cells for item in cell.runs]
    assert len(frame) == len(entries)
    for row, item in zip(frame.itertuples(index=False), entries, strict=True):
        assert (row.corpus, row.method, row.fold, row.slot, row.seed, row.status) == (
            item.corpus,
            item.method,
            item.fold,
            item.slot,
            item.seed,
            item.status.value,
        )
        scores = item.scores
        expected = (scores.ua, scores.wa, scores.macro_f1) if scores else (None, None, None)
        assert [None if pd.isna(number) else number for number in (row.ua, row.wa, row.macro_f1)] == list(expected)
    [out] = frame[frame.out.notna()].itertuples(index=False)
    assert (out.method, out.fold, out.slot, out.out, out.centre, out.scale) == ("ptapt", "DC", 2, True, 70.5, 1.5)


def test_csv_of_methods_states_the_rule() -> None:
    """One row per method holds the means over kept and over all runs, what was dropped, and the rule in words."""
    found, _ = incomplete_case()
    frame = pd.read_csv(io.StringIO(render_methods_csv(found)))
    assert tuple(frame.columns) == METHOD_COLUMNS
    assert set(frame.outlier_rule) == {rule_in_words("pooled", 2.0, 3)}
    assert frame[["method", "outliers", "outliers_rerun", "diverged", "diverged_rerun", "unresolved", "complete"]].to_numpy().tolist() == [
        ["vft", 1, 1, 1, 0, 0, False],
        ["tapt", 0, 0, 0, 0, 0, False],
        ["ptapt", 0, 0, 0, 0, 1, False],
    ]
    assert frame.mean_ua_all_runs[0] == found.methods[0].mean_ua_all_runs
    assert frame.sd_ua_all_runs[0] == found.methods[0].sd_ua_all_runs


def test_unresolved_runs_are_marked() -> None:
    """A method with a run that is still out carries a mark in every format, and no other method does."""
    found, beside = incomplete_case()
    [table] = tables_of(found, beside)
    assert [row.mean.unresolved for row in table.blocks[0].rows] == [False, False, True]
    assert render_markdown(found, beside).count("‡") == 2  # the mean and its note
    assert fragments(found, beside, PLAIN)["table1.tex"].count(r"\ddagger") == 2
    text = io.StringIO()
    print_tables(found, beside, Console(file=text, width=200, highlight=False))
    assert text.getvalue().count("‡") == 2


def test_csv_keeps_awkward_names() -> None:
    """Names with commas, quotes and line breaks come back as they were."""
    odd = Entry('co,"r', "me\nthod", "fo'ld;", 0, 0, Scores(0.1 + 0.2, 1.0, 1.0), Status.accepted)
    frame = pd.read_csv(io.StringIO(render_csv(summary((odd,)))))
    assert (frame.corpus[0], frame.method[0], frame.fold[0], frame.ua[0]) == ('co,"r', "me\nthod", "fo'ld;", 0.1 + 0.2)


def test_markdown_rows_are_of_one_width() -> None:
    """Every row of a Markdown table has as many cells as its header, whatever the names hold."""
    text = render_markdown(*nasty_case())
    rows = [re.sub(r"\\.", "", line) for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[: rows.index(next(line for line in rows if "Difference" in line))]} == {9}


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_escaped_markdown_prints_itself(text: str) -> None:
    """Dropping the backslashes gives the text back, on one line; no special character is left bare."""
    source = markdown(text)
    assert "\n" not in source
    plain = " ".join(text.split())
    assert re.sub(r"\\(.)", r"\1", source) == "".join(
        "\ufffd" if ord(character) < 32 or 127 <= ord(character) < 160 else character for character in plain
    )
    assert not re.search(r"[*_`|<\[]", re.sub(r"\\.", "", source))


def test_terminal_never_cuts_a_number() -> None:
    """On a narrow terminal cells break between words; every mean and sd is still there in full."""
    found, beside = complete_case()
    text = io.StringIO()
    print_tables(found, beside, Console(file=text, width=60, force_terminal=True, color_system=None))
    printed = text.getvalue()
    assert "…" not in printed
    for row in tables_of(found, beside)[0].blocks[0].rows:
        for cell in (*row.cells, row.mean):
            assert cell.mean in printed
            assert cell.sd in printed


def test_heavy_packages_are_imported_late() -> None:
    """Importing the table modules costs neither pandas nor scipy nor matplotlib nor jinja2."""
    heavy = ("pandas", "scipy", "numpy", "matplotlib", "jinja2", "rich")
    code = f"import sys, jobs.tables.collect; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def write_golden() -> None:
    """Render all golden files again, then check the difference.

    python -c 'from tests.jobs.tables.test_display import write_golden; write_golden()'
    """
    for case, make in CASES.items():
        found, beside = make()
        for name in ("table1.tex", "table1-differences.tex", "table.md", "runs.csv", "methods.csv", "terminal.txt", "summary.json"):
            path = GOLDEN / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rendered(found, beside, name), encoding="utf-8")
    for name in ADAPTED:
        path = GOLDEN / "adapted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rendered(*adapted_case(), name), encoding="utf-8")
