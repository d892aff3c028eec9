"""Tables in every format: golden files, what is bold or marked, and a pdflatex that really compiles them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.control.outliers import rule_in_words
from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Run
from jobs.statistics import mean, round_half_up
from jobs.store.layout import Layout
from jobs.tables import published as figures
from jobs.tables.collect import FORMATS, collect, summary_of
from jobs.tables.display import (
    CSV_COLUMNS,
    METHOD_COLUMNS,
    print_tables,
    render,
    render_csv,
    render_methods_csv,
    tables_of,
)
from jobs.tables.format import latex, markdown
from jobs.tables.published import Published, PublishedRow, load_published
from jobs.tables.summary import CodeFacts, Entry, Scores, Status, Summary, summarise, to_json
from tests.jobs.table_cases import CONFIGS, entry, graph, paper_like, published, result, summary

GOLDEN = Path(__file__).parents[1] / "golden" / "tables"
NASTY = "a_b%c&d\\e{f}g#h$i~j^k|l<m>n`o'p\"q--r*[s] ±×– é ĩ ß 喜\t\nu"
CODE = CodeFacts(
    ("0123456789abcdef",),
    True,
    {"torch": ("2.13.0",), "transformers": ("5.22.0", "5.23.0"), "unlisted": ("1",)},
    ("wav2vec 2.0 of revision 2dcc7b7f9b", "wav2vec v1 wav2vec_large.pt"),
)
needs_pdflatex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")


def complete_case() -> tuple[Summary, Published]:
    return replace(summary(paper_like("iemocap_table1")), code=CODE), published("iemocap_table1")


def incomplete_case() -> tuple[Summary, Published]:
    """SAVEE with the human row, 3 seeds: a failed run, a cell that is not in, two dropped runs (one replaced), one unresolved."""
    runs = list(paper_like("savee_table2", seeds=3))
    for place, item in enumerate(runs):
        if (item.method, item.fold) == ("tapt", "JK") or item.name == "ptapt/DC/1":
            runs[place] = replace(item, scores=None, status=Status.failed if item.method == "ptapt" else Status.running)
    runs.append(replace(runs[0], seed=99, scores=Scores(14.3, 14.0, 5.0), status=Status.outlier))
    runs[1] = replace(runs[1], scores=Scores(20.0), status=Status.diverged)
    rule = rule_in_words("pooled", 2.0, 3)
    found = summarise(tuple(runs), experiment="savee", outlier_rule=rule, unresolved={("savee", "ptapt"): 1})
    return found, published("savee_table2")


CASES = {"complete": complete_case, "incomplete": incomplete_case}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["table.tex", "table.md", "runs.csv", "methods.csv", "terminal.txt"])
def test_text_formats_are_golden(case: str, name: str) -> None:
    """Every character of a table is as it was when somebody last looked at it."""
    found, beside = CASES[case]()
    assert rendered(found, beside, name) == (GOLDEN / case / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_json_is_golden(case: str) -> None:
    """The JSON keeps its keys and values; numbers may differ in the last digits between builds of scipy."""
    found, beside = CASES[case]()
    assert_close(
        json.loads(rendered(found, beside, "summary.json")), json.loads((GOLDEN / case / "summary.json").read_text(encoding="utf-8"))
    )


def rendered(found: Summary, beside: Published, name: str) -> str:
    if name == "table.tex":
        return render("table.tex", found, beside)
    if name == "table.md":
        return render("table.md", found, beside)
    if name == "runs.csv":
        return render_csv(found)
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
    text = " ".join(tables_of(found, beside)[0].caption)
    for part in (
        "n = 5 runs a cell",
        "Seeds differ in fine-tuning only",
        "Outlier rule: none in force. Dropped: 0 outliers (0 rerun) and 0 diverged runs (0 rerun); 0 unresolved. Published",
        "Initial weights: wav2vec 2.0 of revision 2dcc7b7f9b; wav2vec v1 wav2vec_large.pt. Experiment",
        "code at commit 0123456789 with uncommitted changes; torch 2.13.0; transformers 5.22.0/5.23.0.",
    ):
        assert part in text
    found, beside = incomplete_case()
    text = " ".join(tables_of(found, beside)[0].caption)
    assert "n = 0 to 3 runs a cell" in text
    for part in (
        "Outlier rule: pooled: a run further than 2 sigmas from the median of its cell",
        "judged in at most 3 rounds. Dropped: 1 outlier (1 rerun) and 1 diverged run (0 rerun); 1 unresolved.",
        "The rule is applied to a method once all its runs are finished. "
        "‡ Unresolved: outliers that were not replaced and are kept in the mean (P-TAPT 1 run).",
        "Mean and standard deviation over all runs, dropped ones included: V-FT 55.1 ± 6.8, TAPT 71.9, P-TAPT",
    ):
        assert part in text


def test_published_means_over_other_folds_are_told_apart() -> None:
    """With fewer folds than the paper the caption says so, and figures stand under their own fold."""
    runs = (entry("vft", "4", 0, 70.0), entry("vft", "2", 0, 70.0))
    [table] = tables_of(summary(runs), published("iemocap_table1"))
    assert table.columns == ("Session 4", "Session 2")
    assert [cell.mean for cell in table.blocks[1].rows[0].cells] == ["68.7", "76.2"]
    assert any("over all 5 folds of the paper, ours over 2" in sentence for sentence in table.caption)


@pytest.mark.parametrize("table", ["iemocap_table1", "savee_table2"])
def test_published_means_follow_from_published_cells(table: str) -> None:
    """Every published mean is that of its cells, rounded half up: no figure was mistyped."""
    for row in published(table).rows:
        found = mean(list(row.ua.values()))
        assert found is not None
        assert round_half_up(found) == round_half_up(row.mean_ua)


def test_published_table_is_looked_up_by_name() -> None:
    """An unknown name is one line that lists the known ones and names the nearest."""
    with pytest.raises(UsageError, match=r"^table 'iemocap_tabel1'.*savee_table2\): did you mean 'iemocap_table1'\?$"):
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
    assert render("table.md", found, beside).count("‡") == 2  # the mean and its note
    assert render("table.tex", found, beside).count(r"\ddagger") == 2
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
    text = render("table.md", *nasty_case())
    rows = [re.sub(r"\\.", "", line) for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[: rows.index(next(line for line in rows if "Difference" in line))]} == {5}


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


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_escaped_latex_is_ascii_and_balanced(text: str) -> None:
    """LaTeX source is printable ASCII without bare special characters, with balanced braces and no ligature of dashes."""
    source = latex(text)
    assert source.isascii()
    assert source.isprintable() or not source
    bare = re.sub(r"\\[{}$&%#_]", "", source)
    assert not re.search(r"[$&%#_]", bare)
    assert bare.count("{") == bare.count("}")
    assert "--" not in source
    assert "''" not in source


@needs_pdflatex
@pytest.mark.parametrize("case", CASES)
def test_pdflatex_compiles_tables(case: str, tmp_path: Path) -> None:
    """The document compiles as it stands, the published rows and incomplete cells included, and all is on the page."""
    text = compiled(render("table.tex", *CASES[case]()), tmp_path)
    if text is not None:
        assert "P-TAPT" in text
        assert "Published" in text
        assert ("†" in text) == (case == "incomplete")


@needs_pdflatex
def test_pdflatex_compiles_awkward_names(tmp_path: Path) -> None:
    """Names full of special characters compile, and print as themselves (an underscore is drawn as a rule, which is no text)."""
    text = compiled(render("table.tex", *nasty_case()), tmp_path)
    if text is not None:
        flat = "".join(text.split())
        for part in ("ab%c&d\\e{f}g#h$i~j^k|l<m>n", "q--r*[s]±×–", "[U+559C]"):
            assert part in flat.replace("∼", "~").replace("ˆ", "^").replace("˜", "~")


@needs_pdflatex
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(codec="utf-8", max_codepoint=0x17F), min_size=1, max_size=25), min_size=3, max_size=3))
def test_pdflatex_compiles_any_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """No corpus, method or fold name stops LaTeX."""
    corpus, method, fold = names
    runs = tuple(Entry(corpus, name, fold, 0, 0, Scores(70.0, 70.0, 70.0), Status.accepted) for name in (method, method + "2"))
    compiled(render("table.tex", summary(runs), published(None)), tmp_path_factory.mktemp("latex"))


@needs_pdflatex
def test_pdflatex_compiles_a_wide_table(tmp_path: Path) -> None:
    """Twenty folds are scaled to the page, without an overfull line."""
    runs = tuple(
        entry(method, f"speaker {fold}", slot, 60.0 + fold + slot) for method in ("vft", "tapt") for fold in range(20) for slot in range(2)
    )
    compiled(render("table.tex", summary(runs), published(None)), tmp_path)
    assert "Overfull" not in (tmp_path / "table.log").read_text(encoding="latin-1")


def nasty_case() -> tuple[Summary, Published]:
    runs = tuple(
        Entry(NASTY, name, fold, slot, slot, Scores(70.0 + slot, 70.0, 70.0), Status.accepted)
        for name in (NASTY, f"[{NASTY}", f"*{NASTY}")
        for fold in (NASTY,)
        for slot in range(2)
    )
    beside = Published(NASTY, NASTY, {}, {NASTY: NASTY}, (PublishedRow(None, NASTY, {NASTY: 1.0}, {NASTY: 2.0}, 3.0),))
    return summary(runs, NASTY), beside


def compiled(source: str, folder: Path) -> str | None:
    """Compile a document; the text of its PDF where pdftotext is there to read it."""
    (folder / "table.tex").write_text(source, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "table.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (folder / "table.pdf").read_bytes().startswith(b"%PDF-")
    if shutil.which("pdftotext") is None:
        return None
    return subprocess.run(
        ["pdftotext", "-layout", "table.pdf", "-"], cwd=folder, capture_output=True, timeout=60, check=True
    ).stdout.decode()


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


def test_collect_writes_every_format(tmp_path: Path) -> None:
    """All files of an experiment lie where the layout says, and agree with each other."""
    layout, made = Layout(tmp_path, "demo"), graph()
    results = {run.key: result(run, ((3 + run.slot, 1), (0, 4)), ("a", "b")) for run in made.runs}
    report = collect(layout, made, results, {}, published(None))
    assert report.complete
    assert report.missing == ()
    assert [path.relative_to(tmp_path / "demo").as_posix() for path in report.paths] == [
        "tables/table.tex",
        "tables/table.md",
        "tables/runs.csv",
        "tables/methods.csv",
        "tables/summary.json",
        *(f"confusion/{method}.{kind}" for method in ("vft", "tapt", "ptapt") for kind in ("csv", "png")),
    ]
    assert all(path.is_file() for path in report.paths)
    values = json.loads((layout.tables / "summary.json").read_text(encoding="utf-8"))
    assert values == to_json(summary_of("demo", made, results, {}))
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
    assert len(report.paths) == len(FORMATS) + 1  # a format of two files: runs and methods


def test_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A format that is not known leaves no half of the files."""
    with pytest.raises(UsageError, match=r"'pdf'.*latex, markdown, csv, json"):
        collect(Layout(tmp_path, "demo"), graph(), {}, {}, published(None), formats=["csv", "pdf"])
    assert not (tmp_path / "demo").exists()


def test_heavy_packages_are_imported_late() -> None:
    """Importing the table modules costs neither pandas nor scipy nor matplotlib nor jinja2."""
    heavy = ("pandas", "scipy", "numpy", "matplotlib", "jinja2", "rich")
    code = f"import sys, jobs.tables.collect; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def write_golden() -> None:
    """Render all golden files again, then check the difference.

    python -c 'from tests.jobs.tables.test_display import write_golden; write_golden()'
    """
    for case, make in CASES.items():
        found, beside = make()
        for name in ("table.tex", "table.md", "runs.csv", "methods.csv", "terminal.txt", "summary.json"):
            path = GOLDEN / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rendered(found, beside, name), encoding="utf-8")
