"""The file of an experiment with every key: those that are set, and the others in comments with their default. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.experiment.schema_keys import REQUIRED, Key

WIDTH = 140  # of a line; a longer explanation stands above its key


def render(head: Sequence[str], keys: Sequence[Key], values: Mapping[str, Any]) -> str:
    """YAML text. `head`: lines of the comment at the top; `values`: nested settings, which the schema must know."""
    lines = [f"# {line}".rstrip() for line in head]
    return "\n".join([*lines, *_section(keys, values, "")]) + "\n"


def yaml_text(value: Any) -> str:
    """A JSON value in one line of YAML."""
    import yaml

    return yaml.safe_dump([value], default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True).strip()[1:-1]


def _section(keys: Sequence[Key], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key in keys:
        if key.kind:
            is_set = key.name in values
            yield from _explained(indent if is_set else f"{indent}# ", key, values[key.name] if is_set else key.default)
            continue
        given, below = values.get(key.name) or {}, f"{indent}  "
        yield from _wrapped(indent, f"{key.name}:", key.explanation)
        if not key.entry:
            yield from _section(key.keys, given, below)
            continue
        yield from (f"{below}{yaml_text(name)}: {yaml_text(entry)}" for name, entry in given.items())
        yield f"{below}# {key.entry}:"
        for each in key.keys:
            yield from _explained(f"{below}#   ", each, each.default)


def _explained(indent: str, key: Key, value: Any) -> Iterator[str]:
    return _wrapped(indent, f"{key.name}: {'' if value == REQUIRED else yaml_text(value)}".rstrip(), key.explanation)


def _wrapped(indent: str, text: str, explanation: str) -> Iterator[str]:
    """A line with its explanation behind it or, where that is too long, above it."""
    line = f"{indent}{text}  # {explanation}" if explanation else f"{indent}{text}"
    if len(line) > WIDTH:
        spaces = " " * (len(indent) - len(indent.lstrip(" ")))
        yield from (f"{spaces}# {part}" for part in textwrap.wrap(explanation, WIDTH - len(spaces) - 2))
        line = f"{indent}{text}"
    yield line
