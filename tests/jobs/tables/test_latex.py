"""LaTeX: names are escaped, and pdflatex compiles the tables."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.tables.display import (
    render,
)
from jobs.tables.format import latex
from jobs.tables.summary import Entry, Scores, Status
from tests.jobs.table_cases import entry, published, summary
from tests.jobs.tables.display_cases import nasty_case
from tests.jobs.tables.test_display import CASES

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
