"""pydantic's type adapters, built without its plugins: to find them pydantic reads the metadata of every installed package (40 ms)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

VARIABLE = "PYDANTIC_DISABLE_PLUGINS"  # read by pydantic whenever it builds a validator
TypeT = TypeVar("TypeT")


def type_adapter(kind: type[TypeT]) -> TypeAdapter[TypeT]:
    """The adapter of a type. pydantic is imported at the first use."""
    from pydantic import TypeAdapter

    with _without_plugins():
        return TypeAdapter(kind)


@contextlib.contextmanager
def _without_plugins() -> Iterator[None]:
    """Disable the search for plugins, and leave the environment as it was."""
    former = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = former
