"""The words of messages: numbers agree with their nouns, and no phrase stands for what the glossary has a word for."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import ROOT

NOUNS = (
    *("attempt", "checkpoint", "experiment", "file", "fold", "job", "link", "method", "node", "pass", "point", "problem", "process"),
    *("recording", "result", "round", "row", "run", "seed", "slot", "speaker", "stage", "task", "trial", "utterance", "worker"),
)
PLURAL = re.compile(rf"^ (?:{'|'.join(NOUNS)})e?s\b")
# Phrase -> what it should say.
AVOIDED = {
    r"\bgo(?:es)? on\b": "continues",
    r"\bwhoever\b": "the user",
    r"\bof its own accord\b": "by itself",
    r"\bsays so\b": "reports it",
    r"\bwaits \(": "is pending (REASON)",
    r"\b(?:asks|asked) for\b": "requests, requested",
    r"\bfor nothing\b": "without effect",
}
# Values that are more than one wherever their message is written.
PLURAL_ANYWAY = (
    *("given.processes", "given.processes_per_node", "header.nodes", "least", "len(matches)", "len(outcomes)", "len(repeated)"),
    *("processes", "self.size", "space.size"),
)
FILES = sorted([ROOT / "launch.py", *(ROOT / "jobs").rglob("*.py"), *(ROOT / "ser_core").rglob("*.py")])


def messages(file: Path) -> Iterator[tuple[int, ast.expr]]:
    """Line and expression of every string of a module that is no docstring; the parts of an f-string are not listed again."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inner = {
        id(each.body[0].value)
        for each in ast.walk(tree)
        if isinstance(each, documented) and each.body and isinstance(each.body[0], ast.Expr)
    }
    inner |= {id(part) for each in ast.walk(tree) if isinstance(each, ast.JoinedStr) for part in each.values}
    for each in ast.walk(tree):
        if id(each) not in inner and (isinstance(each, ast.JoinedStr) or (isinstance(each, ast.Constant) and isinstance(each.value, str))):
            yield each.lineno, each


def bare_numbers(message: ast.expr) -> list[str]:
    """Parts of an f-string in which a plural follows a value, where `counted` would give the singular for 1."""
    parts = message.values if isinstance(message, ast.JoinedStr) else []
    found = []
    for value, text in itertools.pairwise(parts):
        follows = isinstance(text, ast.Constant) and PLURAL.match(str(text.value))
        if isinstance(value, ast.FormattedValue) and follows:
            expression = ast.unparse(value.value)
            if not (expression.isupper() or expression in PLURAL_ANYWAY):
                found.append(f"{{{expression}}}{follows[0]}")
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('f"{n} stages"', ["{n} stages"]),
        ('f"of {len(a)} runs, {b} s"', ["{len(a)} runs"]),
        ("f\"{counted(n, 'stage')} held\"", []),
        ('f"{name} stage"', []),
        ('f"{MOST_LINES} rows at most"', []),
        ('"two stages"', []),
    ],
)
def test_how_bare_numbers_are_found(text: str, found: list[str]) -> None:
    """A plural right behind a value."""
    assert bare_numbers(ast.parse(text, mode="eval").body) == found


@pytest.mark.slow
def test_numbers_agree_with_their_nouns() -> None:
    """`counted` writes `1 stage` and `2 stages`: no message puts a plural behind a number that may be one."""
    found = [f"{file.relative_to(ROOT)}:{line}: {part}" for file in FILES for line, each in messages(file) for part in bare_numbers(each)]
    assert found == []


@pytest.mark.slow
def test_messages_have_plain_words() -> None:
    """No message has one of the phrases in `AVOIDED`."""
    found: list[str] = []
    for file in FILES:
        for line, each in messages(file):
            parts = each.values if isinstance(each, ast.JoinedStr) else [each]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            better = [better for phrase, better in AVOIDED.items() if re.search(phrase, text)]
            found.extend(f"{file.relative_to(ROOT)}:{line}: {text!r}: say {word!r}" for word in better)
    assert found == []
