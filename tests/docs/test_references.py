"""What the documents refer to is there: links between them, and files of the project that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:jobs|ser_core|tests|benchmarks|slurm_templates|configs)/[\w./-]*\w/?)`")
TEST = re.compile(r"`(test_\w+\.py)?(?:::(test_\w+))?[`\[]")  # the file is left out where it is the one named before
EXAMPLES = ("configs/site/mysite.yaml", "configs/experiment/mine.yaml")  # files that a reader makes


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a document, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link names a file of the project and, where it has an anchor, a heading of it."""
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), f"{name(document)}: no {link}"
        assert not anchor or anchor in anchors(target), f"{name(document)}: no heading for {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_named_files_are_there(document: Path) -> None:
    """A module that was moved or renamed must be renamed in the documents too."""
    for path in NAMED.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or path in EXAMPLES or "NAME" in path, f"{name(document)} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_named_tests_are_there(document: Path) -> None:
    """A test that was moved to another file must be renamed in the documents too."""
    files: dict[str, str] = {}  # some names are there twice
    for path in (ROOT / "tests").rglob("test_*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text(encoding="utf-8")
    code = ""
    for file, test in TEST.findall(document.read_text(encoding="utf-8")):
        assert not file or file in files, f"{name(document)} names {file}"
        code = files.get(file, code)
        assert not test or f"def {test}(" in code, f"{name(document)} names {test}"


def test_docstrings_praised_in_contributing_are_in_the_code() -> None:
    """The examples of good docstrings are real ones."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| docstring | where |")[2].partition("\n\n")[0]
    praised = re.findall(r'^\| "(.+)" \|', section, flags=re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for folder in ("jobs", "ser_core") for path in (ROOT / folder).rglob("*.py"))
    assert len(praised) == 5
    assert not [docstring for docstring in praised if f'"""{docstring}' not in code]
