"""The report as a reader sees it, in a headless browser: no error, no request, sorting, filtering and choosing by keyboard, printing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.report.write import report_text
from tests.browser import Page, browser_page, browser_program
from tests.jobs.report.cases import case, hostile_case

pytestmark = pytest.mark.skipif(browser_program() is None, reason="no Chromium: bash tests/install_packages.sh")
SHOWN = (
    "[...document.querySelectorAll('table.sortable tbody tr')].filter((row) => row.offsetParent).map((row) => row.cells[%d].textContent)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(report_text(case()), encoding="utf-8")
    with browser_page(folder / "profile") as opened:
        opened.open(folder / "report.html")
        yield opened
        assert opened.problems == []


def focus(page: Page, selector: str) -> None:
    page.value(f"document.querySelector({selector!r}).focus()")


def test_the_switches_work_by_keyboard(page: Page) -> None:
    """Arrow keys choose the score and the runs; figures, tables and the rows of dropped runs follow."""
    shown = "[...document.querySelectorAll('figure[data-metric]')].filter((each) => each.offsetParent).map((each) => each.dataset.metric)"
    captions = "[...document.querySelectorAll('[data-runs] caption')].filter((each) => each.offsetParent).map((each) => each.textContent)"
    assert set(page.value(shown)) == {"ua"}
    assert page.value(captions) == ["UA on savee, kept runs"]
    before = len(page.value(SHOWN % 0))
    focus(page, "#metric-ua")
    page.press("ArrowRight")
    assert set(page.value(shown)) == {"wa"}
    focus(page, "#runs-kept")
    page.press("ArrowRight")
    assert page.value(captions) == ["WA on savee, all runs, dropped ones included"]
    assert len(page.value(SHOWN % 0)) == before + 2
    page.press("ArrowLeft")
    focus(page, "#metric-wa")
    page.press("ArrowLeft")
    assert page.value(captions) == ["UA on savee, kept runs"]


def test_the_runs_are_sorted_and_filtered_by_keyboard(page: Page) -> None:
    """Enter on a heading sorts by numbers, once more the other way round; words in the box leave the rows that have them all."""
    focus(page, "table.sortable th:nth-child(7) button")
    page.press("Enter")
    known = [float(text) for text in page.value(SHOWN % 6) if text != "–"]
    assert known == sorted(known)
    assert page.value(SHOWN % 6)[-1] == "–", "a run without a score is last"
    page.press("Enter")
    assert page.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
    assert [float(text) for text in page.value(SHOWN % 6) if text != "–"] == known[::-1]
    focus(page, "input[type=search]")
    page.write("tapt/je")
    assert sorted(page.value(SHOWN % 0)) == sorted([f"{method}/JE/{slot}" for method in ("tapt", "ptapt") for slot in range(3)])
    page.write(" failed")
    assert page.value(SHOWN % 0) == ["tapt/JE/1"]
    assert page.value("document.querySelector('output').textContent").startswith("1 of ")
    page.value("document.querySelector('input[type=search]').value = ''")
    page.write(" ")


def test_the_keyboard_reaches_everything(page: Page) -> None:
    """Tab goes through the page in the order of reading, beginning with the link past the sections."""
    page.value("document.activeElement.blur()")
    page.press("Tab")
    page.value("window.scrollTo(0, 0)")
    order = "[...document.querySelectorAll('a, input, summary, button, [tabindex=\"0\"]')].indexOf(document.activeElement)"
    places = []
    for _ in range(6):
        places.append(page.value(order))
        page.press("Tab")
    assert places == sorted(places)
    assert -1 not in places


def test_it_can_be_printed(page: Page, tmp_path: Path) -> None:
    """On A4, with every section and without the box to filter; details are open."""
    page.printed(tmp_path / "report.pdf")
    facts = subprocess.run(["pdfinfo", str(tmp_path / "report.pdf")], capture_output=True, text=True, check=True).stdout
    assert "(A4)" in facts
    text = subprocess.run(["pdftotext", "-layout", str(tmp_path / "report.pdf"), "-"], capture_output=True, text=True, check=True).stdout
    for words in ("What is the result?", "What was dropped?", "Where does it come from?", "kept runs", "replaced by seed 1000"):
        assert words in text
    assert "Show rows that contain" not in text
    assert "Cells: mean ± sample standard deviation" in " ".join(text.split()), "details are open"
    assert page.value("document.querySelectorAll('details[open]').length") == 0, "and closed again"


def test_hostile_names_do_nothing(page: Page, tmp_path: Path) -> None:
    """Markup in names is shown as text; nothing of it is executed or reported by the browser."""
    (tmp_path / "report.html").write_text(report_text(hostile_case()), encoding="utf-8")
    with browser_page(tmp_path / "profile") as other:
        other.open(tmp_path / "report.html")
        assert other.value("document.querySelectorAll('script').length") == 1
        assert "<script>alert" in other.value("document.body.innerText")
        assert other.problems == []
