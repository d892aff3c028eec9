"""The report as a file: every text escaped, no request possible, the same bytes again, and the numbers of the tables."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jobs.commands.collect import Asked, write_csv_tables
from jobs.errors import UsageError
from jobs.report.drawing import linear
from jobs.report.material import material_of
from jobs.report.page import Figure, Table
from jobs.report.write import page_of, report_text
from jobs.tables.summary import Entry, Scores, Status, summarise
from tests.command_line import ROOT
from tests.jobs.report.cases import HOSTILE, case, hostile_case
from tests.jobs.table_cases import entry, published, summary

VOID = {"meta", "link", "input", "br", "img"}


class Elements(HTMLParser):
    """Tags, attributes and texts of a page; `open` is not empty at the end if a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.extend((tag, name, value or "") for name, value in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, each, value in self.attributes if each == name]


@pytest.fixture(scope="module")
def text() -> str:
    return report_text(case())


def test_the_page_is_well_formed(text: str) -> None:
    """Tags are nested, ids are unique, what names an element or a section is there."""
    page = Elements(text)
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    referred = {name for value in page.values("aria-labelledby") for name in value.split()}
    referred |= {value.removeprefix("#") for value in page.values("href") if value.startswith("#")}
    assert referred <= set(ids)
    assert page.tags["svg"] == page.values("role").count("img") > 5


def test_no_request_is_possible(text: str) -> None:
    """The policy allows nothing from elsewhere and one script, that of the page; no address leads out of the file."""
    page = Elements(text)
    (policy,) = [value for value in page.values("content") if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'; img-src data:;")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert [value for name in ("href", "src") for value in page.values(name) if not value.startswith(("#", "data:"))] == []
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_text_is_escaped() -> None:
    """Markup in names of experiments, corpora, methods, folds, labels and versions is text."""
    written = report_text(hostile_case())
    page = Elements(written)
    assert page.tags["script"] == 1
    assert written.count("<script>") == 1
    assert page.open == []
    assert sum(HOSTILE in each for each in page.texts) > 10
    assert any(HOSTILE in value for value in page.values("aria-label") + page.values("content") + page.texts)


@pytest.mark.slow
def test_same_results_same_bytes(text: str) -> None:
    """Twice in this process, and in another one with other hashes of strings."""
    assert report_text(case()) == text
    imports = "import sys; from jobs.report.write import report_text; from tests.jobs.report.cases import case"
    code = f"{imports}; sys.stdout.write(report_text(case()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert other.stdout.decode() == text


def test_every_score_has_its_means() -> None:
    """The tables of WA are those of the same runs with WA in the place of UA; runs without WA: UA alone, and no choice."""
    material = case()
    page = page_of(material)
    assert list(page.metrics) == ["ua", "wa", "macro_f1"]
    tables = {part.view.metric: part for part in page.sections[0].parts if isinstance(part, Table) and part.view.runs == "kept"}
    means = [method.mean_ua for method in material.summary.methods]
    assert [row.cells[1] for row in tables["ua"].rows] == [f"{mean:.1f}" for mean in means if mean is not None]
    assert [row.cells[1] for row in tables["wa"].rows] != [row.cells[1] for row in tables["ua"].rows]
    entry = Entry("mine", "vft", "1", 0, 0, Scores(60.0), Status.accepted)
    alone = page_of(
        material_of(summarise([entry, replace(entry, slot=1, scores=Scores(61.0, 62.0, 63.0))], experiment="mine"), published(None))
    )
    assert alone.metrics == {}


def test_dropped_runs_are_audited() -> None:
    """The dropped run with its distance and its replacement, the diverged one, and the outlier that no run replaces."""
    (section,) = [each for each in page_of(case()).sections if each.name == "dropped"]
    audit = section.parts[0]
    assert isinstance(audit, Table)
    found = {str(row.cells[0]): [str(cell) for cell in row.cells] for row in audit.rows}
    assert found["V-FT / DC / 0"][-1] == "replaced by seed 1000, UA 71.0"
    assert found["V-FT / DC / 0"][3:7] == ["14.3", "70.50", "1.50", "37.47"]
    assert found["V-FT / DC / 1"][-1] == "not replaced"
    assert [row[-1] for name, row in found.items() if name.startswith("P-TAPT")] == ["kept in the means: no reserve seed is left"]


def test_a_fold_that_a_method_lacks_is_no_mark() -> None:
    """A file of runs without a row for a cell: the report is written, and the runs are missing."""
    runs = tuple(
        entry(method, fold, slot, 70.0 + slot) for method, folds in (("vft", "12"), ("tapt", "1")) for fold in folds for slot in (0, 1)
    )
    text = report_text(material_of(summary(runs), published(None)))
    assert "incomplete: 2 runs missing" in text
    assert "TAPT, fold 1, slot 0" in text


def test_every_figure_has_words() -> None:
    """A title and a description for readers without sight, and a name of its own."""
    figures = [part for section in page_of(case()).sections for part in section.parts if isinstance(part, Figure)]
    assert len({figure.name for figure in figures}) == len(figures) > 5
    assert all(figure.title and len(figure.description) > 40 for figure in figures)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0, 10), ["0", "2", "4", "6", "8", "10"]),
        ((61.2, 61.9), ["61.2", "61.4", "61.6", "61.8"]),
        ((-1, 1), ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        ((50, 50), ["47", "48", "49", "50", "51", "52", "53"]),
        ((0, 0), ["−0.4", "−0.2", "0.0", "0.2", "0.4"]),
        ((), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round(values: tuple[float, ...], ticks: list[str]) -> None:
    """At most seven, with the digits that their step needs, and no minus before zero."""
    axis = linear(values, "")
    assert [text for _, text in axis.ticks] == ticks
    assert all(axis.low < value < axis.high for value in values)


def test_collect_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default and by name; not beside another format, unless the folder has one: then it has the same runs."""
    source = tmp_path / "runs.csv"
    rows = [f"mine,{method},{fold},{slot},{slot},{60 + slot + fold}" for method in ("a", "b") for fold in (1, 2) for slot in range(2)]
    source.write_text("\n".join(["corpus,method,fold,slot,seed,ua", *rows]) + "\n")
    file = ROOT / "configs" / "published.yaml"
    report = tmp_path / "out" / "report.html"

    def collected(*formats: str, out: Path = report.parent) -> None:
        write_csv_tables(source, "none", file, Asked(formats or None, out))

    collected("json")
    assert not report.exists()
    collected()
    assert "mine" in report.read_text(encoding="utf-8")
    report.write_text("old")
    collected("json")
    assert report.read_text(encoding="utf-8") != "old"
    collected("html", out=tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["report.html"]
    capsys.readouterr()
    collected("html", out=Path("-"))
    assert capsys.readouterr().out == report.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match=r"format 'word': known are latex, markdown, csv, json, html"):
        Asked(["word"])
