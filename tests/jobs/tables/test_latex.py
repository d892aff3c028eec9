"""LaTeX: names are escaped, and pdflatex compiles the tables."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import UsageError
from jobs.experiment.recipes import MethodRecipe
from jobs.tables.collect import text_of
from jobs.tables.format import latex, siunitx
from jobs.tables.latex import PLAIN, Numbers, Style, Width, document, fragments, style_of
from jobs.tables.published import Published
from jobs.tables.summary import Entry, Scores, Status, Summary, summarise
from tests.jobs.table_cases import entry, published, summary
from tests.jobs.tables.display_cases import complete_case, nasty_case
from tests.jobs.tables.test_display import CASES
from tests.jobs.tables.test_measured import measured
from tests.jobs.tables.test_plain import efficiency

needs_pdflatex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")


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


@pytest.mark.slow
@needs_pdflatex
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("style", [PLAIN, Style(width=Width.column, bold=False, marks=True)], ids=["page", "column"])
def test_pdflatex_compiles_tables(case: str, style: Style, tmp_path: Path) -> None:
    """The document compiles as it stands, the published rows and incomplete cells included, and all is on the page without an overflow."""
    text = compiled(*CASES[case](), tmp_path, style)
    if text is not None:
        text = " ".join(text.split())  # a sentence may be broken anywhere
        assert "P-TAPT" in text
        assert "Published" in text
        assert "Outlier rule" in text
        assert ("†" in text) == (case == "incomplete")
    assert "Overfull" not in (tmp_path / "tables.log").read_text(encoding="latin-1")


@needs_pdflatex
def test_siunitx_sets_the_numbers_of_all_tables(tmp_path: Path) -> None:
    """Then the settings of the paper apply: with a comma as its decimal marker only names and headings have a number with a point."""
    style = Style(numbers=Numbers.siunitx)
    parts = fragments(*complete_case(), style)
    parts |= {"settings.tex": fragments(efficiency(), published("iemocap_table4"), style)["settings.tex"]}
    parts |= fragments(measured(), published("domain_shift"), style)
    assert list(parts) == [
        *("table1.tex", "table1-differences.tex", "prior-work.tex", "table1-details.tex", "settings.tex", "measured.tex")
    ]
    parts.pop("table1-details.tex")
    without_notes = {name: re.sub(r"\\begin\{minipage\}.*\\end\{minipage\}", "", text, flags=re.DOTALL) for name, text in parts.items()}
    text = compiled_parts(without_notes, tmp_path, style, preamble="\\sisetup{output-decimal-marker={,}}")
    if text is not None:
        assert {"71,1", "60,5", "55,43", "2,771", "+3,6"} <= set(re.findall(r"[+−]?\d+,\d+", text))
        assert set(re.findall(r"\d+\.\d+", text)) == {"2110.06309", "2.0", "5.44"}


def test_siunitx_sets_bold_numbers_and_those_of_the_note() -> None:
    """A bold number is bold whatever the paper's settings; in one column the note has numbers of runs. Texts beside numbers are escaped."""
    text = fragments(*complete_case(), Style(Width.column, Numbers.siunitx))["table1.tex"]
    assert r"\textbf{\num[detect-weight]{79.6}}" in text
    assert r"V-FT: n = \num{5}, \num{0} dropped, \num{69.9} \ensuremath{\pm} \num{0.2} over all runs" in text
    assert siunitx("−1.2 to +3 % (n 5)†") == r"\num{-1.2} to \num[retain-explicit-plus]{+3} \% (n \num{5})\ensuremath{\dagger}"
    assert siunitx("–") == latex("–")


def test_a_fragment_is_a_float_with_a_short_caption() -> None:
    """Two sentences of caption, a label that other text can refer to, and the details in a note below the tabular."""
    found, beside = complete_case()
    parts = fragments(found, beside, PLAIN)
    assert list(parts) == ["table1.tex", "table1-differences.tex", "prior-work.tex", "table1-details.tex"]
    text = parts["table1.tex"]
    [caption] = re.findall(r"\\caption\{(.*)\}\n", text)
    assert caption.count(". ") + 1 == 2
    assert len(caption) < 250
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 1
    assert r"\label{tab:iemocap}" in text
    assert text.index(r"\end{tabular}") < text.index("Outlier rule") < text.index(r"\end{minipage}")
    assert r"\documentclass" not in text
    assert "torch 2.13.0" not in text
    assert "torch 2.13.0" in parts["table1-details.tex"]


def test_one_column_has_fewer_columns_and_the_rest_in_its_note() -> None:
    """What is left out of the tabular is in words below it: intervals, n, dropped runs, and the mean over all runs."""
    text = fragments(*complete_case(), Style(width=Width.column))["table1.tex"]
    assert r"\begin{table}" in text
    assert r"\begin{tabular}{lrrrrrr}" in text
    assert "V-FT: n = 5, 0 dropped, 69.9 " in text
    assert r"95 \% interval over seeds 69.6 to 70.2, over folds and seeds 64.9 to 74.9." in text


def test_one_column_has_wide_tables_in_parts() -> None:
    """One below the other, with four columns of numbers at most; published figures are only where there are any."""
    style = Style(width=Width.column)
    parts = fragments(measured(), published("domain_shift"), style)["measured.tex"].split(r"\begin{tabular}")[1:]
    assert [part.partition("}")[0] for part in parts] == ["{lrrr"] * 3
    assert ["IEMOCAP, published" in part for part in parts] == [True, False, False]
    assert all("IEMOCAP &" in part for part in parts)
    tests, both = fragments(*complete_case(), style)["table1-differences.tex"].split(r"\begin{tabular}")[1:]
    assert (r"0.020 & 0.020 \\" in tests, r"\ensuremath{-}0.6 to 2.6 & 0.170 & 0.170 & 2.2 \\" in both) == (True, True)


@needs_pdflatex
def test_a_table_of_many_methods_is_on_the_page(tmp_path: Path) -> None:
    """Twelve methods in one column: a note with a sentence for each, and settings as long as they are, in a paragraph that may break."""
    methods = [f"{method}-{part}" for method in ("vft", "tapt", "ptapt") for part in ("8th", "4th", "half", "all")]
    recipes = [MethodRecipe(method, "paper", tuple(f"finetune.setting_{each}={method}" for each in range(20))) for method in methods]
    runs = [entry(method, "5", slot, 60.0 + place + slot) for place, method in enumerate(methods) for slot in range(3)]
    text = compiled(summarise(runs, experiment="large", recipes=recipes), published(None), tmp_path, Style(width=Width.column))
    log = (tmp_path / "tables.log").read_text(encoding="latin-1")
    assert "Overfull" not in log
    assert "Float too large" not in log
    assert text is None or "ptapt-all" in text


def test_bold_and_marks_are_optional() -> None:
    """Without bold no cell is bold and the note does not speak of it; a star stands where a method differs from the first one."""
    found, beside = complete_case()
    plain, marked = fragments(found, beside, Style(bold=False)), fragments(found, beside, Style(marks=True))
    assert "textbf" not in plain["table1.tex"]
    assert "Bold" not in plain["table1.tex"]
    assert "textbf" in marked["table1.tex"]
    assert marked["table1.tex"].count(r"\ensuremath{^{*}}") == 2  # TAPT and P-TAPT
    assert "Differs from V-FT (p \\ensuremath{<} 0.05" in marked["table1.tex"]
    assert r"\ensuremath{^{*}}" not in plain["table1.tex"]
    alike = (entry(method, fold, slot, 60.0 + slot + int(fold)) for method in ("vft", "tapt") for fold in "12" for slot in range(3))
    assert r"\ensuremath{^{*}}" not in fragments(summary(tuple(alike)), published(None), Style(marks=True))["table1.tex"]


def test_styles_are_chosen_by_name() -> None:
    """Nothing asked for is the default; an unknown name is one line that lists the known ones."""
    assert style_of(None, None, bold=True, marks=False) == PLAIN
    assert style_of("column", "siunitx", bold=False, marks=True) == Style(Width.column, Numbers.siunitx, bold=False, marks=True)
    with pytest.raises(UsageError, match="--width 'wide': known are column, page"):
        style_of("wide", None, bold=True, marks=False)


@needs_pdflatex
def test_pdflatex_compiles_awkward_names(tmp_path: Path) -> None:
    """Names full of special characters compile, and print as themselves (an underscore is drawn as a rule, which is no text)."""
    text = compiled(*nasty_case(), tmp_path)
    if text is not None:
        flat = "".join(text.split())
        for part in ("ab%c&d\\e{f}g#h$i~j^k|l<m>n", "q--r*[s]±×–", "[U+559C]"):
            assert part in flat.replace("∼", "~").replace("ˆ", "^").replace("˜", "~")


@pytest.mark.slow
@needs_pdflatex
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(codec="utf-8", max_codepoint=0x17F), min_size=1, max_size=25), min_size=3, max_size=3))
def test_pdflatex_compiles_any_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """No corpus, method or fold name stops LaTeX."""
    corpus, method, fold = names
    runs = tuple(Entry(corpus, name, fold, 0, 0, Scores(70.0, 70.0, 70.0), Status.accepted) for name in (method, method + "2"))
    compiled(summary(runs), published(None), tmp_path_factory.mktemp("latex"))


@needs_pdflatex
@pytest.mark.parametrize("width", Width)
def test_pdflatex_compiles_a_wide_table(width: Width, tmp_path: Path) -> None:
    """Twenty folds are scaled to the page or column, without an overfull line."""
    runs = tuple(
        entry(method, f"speaker {fold}", slot, 60.0 + fold + slot) for method in ("vft", "tapt") for fold in range(20) for slot in range(2)
    )
    compiled(summary(runs), published(None), tmp_path, Style(width=width))
    assert "Overfull" not in (tmp_path / "tables.log").read_text(encoding="latin-1")


@needs_pdflatex
def test_the_document_of_one_text_compiles_alone(tmp_path: Path) -> None:
    """What `--out -` writes needs no fragment beside it, and has the same tables."""
    found, beside = complete_case()
    (tmp_path / "tables.tex").write_text(text_of("latex", found, beside, PLAIN), encoding="utf-8")
    alone = printed(tmp_path)
    (tmp_path / "both").mkdir()
    assert alone == compiled(found, beside, tmp_path / "both")


def compiled(found: Summary, beside: Published, folder: Path, style: Style = PLAIN, preamble: str = "") -> str | None:
    """Compile the document beside its fragments; the text of its PDF where pdftotext is there to read it."""
    return compiled_parts(fragments(found, beside, style), folder, style, preamble)


def compiled_parts(parts: dict[str, str], folder: Path, style: Style, preamble: str = "") -> str | None:
    for name, text in {**parts, "tables.tex": document(parts, style)}.items():
        (folder / name).write_text(text.replace(r"\begin{document}", rf"{preamble}\begin{{document}}"), encoding="utf-8")
    return printed(folder)


def printed(folder: Path) -> str | None:
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "tables.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (folder / "tables.pdf").read_bytes().startswith(b"%PDF-")
    if shutil.which("pdftotext") is None:
        return None
    return subprocess.run(["pdftotext", "-layout", "tables.pdf", "-"], cwd=folder, capture_output=True, check=True).stdout.decode()
