"""Values of recipe keys: typed by the schema, and written so that a command line reads them back."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jobs.errors import UsageError
from jobs.sweeps.space import plain, text, typed


class Colour(Enum):
    red = "red"
    none = "none"


@dataclass
class Inner:
    steps: int = 10
    rate: float = 0.1
    quick: bool = False
    colour: Colour = Colour.red
    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Schema:
    inner: Inner = field(default_factory=Inner)
    seed: int = 0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("inner.rate", "1e-4", 1e-4),
        ("inner.rate", 1, 1.0),
        ("inner.steps", "8", 8),
        ("inner.quick", "true", True),
        ("inner.colour", "none", Colour.none),
        ("inner.path", None, None),
        ("inner.path", "a", "a"),
        ("inner.config.hidden_size", 8, 8),
        ("inner.config.act", "8", "8"),
        ("seed", 3, 3),
    ],
)
def test_a_value_becomes_what_the_schema_has(key: str, value: Any, expected: Any) -> None:
    """Text that means a number where a number is due; a mapping without a schema takes what it is given."""
    found = typed(Schema, key, value)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("inner.rat", 1, "unknown key 'sweep.settings.inner.rat': did you mean 'sweep.settings.inner.rate'?"),
        ("iner.rate", 1, "did you mean 'sweep.settings.inner.rate'?"),
        ("recipe.inner.rate", 1, "did you mean 'sweep.settings.inner.rate'?"),
        ("inner.steps.x", 1, "unknown key"),
        ("inner.config.a.b", 1, "unknown key"),
        ("inner.", 1, "unknown key"),
        ("", 1, "unknown key"),
        ("inner", 1, "sweep.settings.inner: a section of the recipe; name one of its keys"),
        ("inner.steps", 1.5, "sweep.settings.inner.steps: Value '1.5'"),
        ("inner.steps", "many", "sweep.settings.inner.steps: Value 'many'"),
        ("inner.steps", None, "is not Optional"),
        ("inner.rate", "inf", "sweep.settings.inner.rate: inf is not a number"),
        ("inner.rate", float("nan"), "nan is not a number"),
        ("inner.colour", "green", "Invalid value 'green', expected one of [red, none]"),
    ],
)
def test_what_the_schema_does_not_have_is_one_line(key: str, value: Any, expected: str) -> None:
    """Which key, what is wrong, the nearest known key."""
    with pytest.raises(UsageError) as caught:
        typed(Schema, key, value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x1FAFF, exclude_categories=("C", "Z"), exclude_characters="$"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PRINTABLE.filter("???".__ne__)


@given(
    SCALARS | st.sampled_from(["null", "yes", "OFF", "1e-4", "1_000", "0x1F", "12:30", "2026-01-01", "~", ".inf", "a: b", "a#b", "'", '"'])
)
def test_text_is_read_back_as_the_same_value(value: Any) -> None:
    """Through a shell's words and OmegaConf's dot-list, of the same type; words that YAML takes for something else are quoted."""
    (word,) = shlex.split(shlex.quote(f"inner.config.key={text(value)}"))
    found = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    assert isinstance(found, dict)
    read = found["inner"]["config"]["key"]
    assert (read, type(read)) == (value, type(value))


def test_an_enum_is_its_name() -> None:
    """What JSON has of it, and what an override says."""
    assert text(plain(typed(Schema, "inner.colour", "none"))) == "none"
    assert typed(Schema, "inner.colour", plain(Colour.none)) is Colour.none
