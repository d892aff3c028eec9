"""Values of recipe keys: typed by the schema, and written as overrides."""

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
def test_values_are_converted_to_the_types_of_the_schema(key: str, value: Any, expected: Any) -> None:
    """Text is converted to a number where the schema has one; a mapping without a schema accepts any value."""
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
        ("inner.rate", "inf", "sweep.settings.inner.rate: inf is not finite"),
        ("inner.rate", float("nan"), "nan is not finite"),
        ("inner.colour", "green", "Invalid value 'green', expected one of [red, none]"),
    ],
)
def test_invalid_keys_and_values_are_errors_in_one_line(key: str, value: Any, expected: str) -> None:
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
    """Through a shell and OmegaConf's dot-list, with the same type; words with a meaning in YAML are quoted."""
    (word,) = shlex.split(shlex.quote(f"inner.config.key={text(value)}"))
    found = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    assert isinstance(found, dict)
    read = found["inner"]["config"]["key"]
    assert (read, type(read)) == (value, type(value))


def test_an_enum_is_its_name() -> None:
    """In JSON and in an override."""
    assert text(plain(typed(Schema, "inner.colour", "none"))) == "none"
    assert typed(Schema, "inner.colour", plain(Colour.none)) is Colour.none
