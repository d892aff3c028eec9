"""Every key of an experiment's configuration with its type, default and explanation, read from the schema and the comments in its source.

The comment behind a field explains its key, the first sentence of a class's docstring its section.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from jobs.experiment.config import Experiment, Resources
from jobs.experiment.recipes import Variant

ENTRY_NAMES: Mapping[str, tuple[str, type[Any]]] = {"resources": ("STAGE", Resources), "variants": ("NAME", Variant)}
REQUIRED = "???"  # OmegaConf's default of a key that must be set
_KINDS: Mapping[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any"}


@dataclass(frozen=True)
class Key:
    """A key, or a section of keys."""

    name: str
    path: str  # as it is typed; STAGE and NAME stand for the name of an entry
    kind: str = ""  # type or choices; "": a section
    default: Any = None  # JSON value
    explanation: str = ""
    keys: tuple[Key, ...] = ()  # of a section
    entry: str = ""  # of a section whose entries are named: what stands for the name

    def leaves(self) -> Iterator[Key]:
        """The keys below, without sections; itself if it is no section."""
        if self.kind:
            yield self
        for key in self.keys:
            yield from key.leaves()


def experiment_keys(recipe_schema: type[Any]) -> tuple[Key, ...]:
    """The keys at the top of an experiment's file, those of the recipe included."""
    return _keys(Experiment(recipe=recipe_schema()), "")


def comments_of(schema: type[Any]) -> dict[str, str]:
    """Name -> the comment behind it, of the fields of a dataclass or the members of an enum; names without one are left out."""
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    (definition,) = ast.parse(source).body
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and (node.end_lineno or 0) in comments:
            found[target.id] = comments[node.end_lineno or 0]
    return found


def _keys(defaults: Any, prefix: str) -> tuple[Key, ...]:
    schema = type(defaults)
    comments, hints = comments_of(schema), typing.get_type_hints(schema)
    found = []
    for each in fields(schema):
        value, path, comment = getattr(defaults, each.name), f"{prefix}{each.name}", comments.get(each.name, "")
        if not prefix and each.name in ENTRY_NAMES:
            entry, entry_schema = ENTRY_NAMES[each.name]
            keys = _keys(entry_schema(), f"{path}.{entry}.")
            found.append(Key(each.name, path, explanation=comment, keys=keys, entry=entry))
        elif is_dataclass(value):
            found.append(Key(each.name, path, explanation=comment or _sentence(type(value)), keys=_keys(value, f"{path}.")))
        else:
            kind, choices = _kind(hints[each.name])
            found.append(Key(each.name, path, kind, _plain(value), "; ".join(filter(None, (comment, choices)))))
    return tuple(found)


def _kind(hint: Any) -> tuple[str, str]:
    """A type in words, and what the choices of an enum mean."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = [_kind(each) for each in arguments if each is not type(None)]
        return " or ".join([*(kind for kind, _ in kinds), *(["null"] if type(None) in arguments else [])]), kinds[0][1]
    if origin is list:
        return "list" if arguments[0] is Any else f"list of {_kind(arguments[0])[0]}", ""
    if origin is dict:
        return "mapping", ""
    if isinstance(hint, type) and issubclass(hint, Enum):
        comments = comments_of(hint)
        return " | ".join(hint.__members__), "; ".join(f"{name}: {comments[name]}" for name in hint.__members__ if name in comments)
    return _KINDS[hint], ""


def _sentence(schema: type[Any]) -> str:
    return (schema.__doc__ or "").strip().splitlines()[0]


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value
