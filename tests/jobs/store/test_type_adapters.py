"""Type adapters are built without a look at the metadata of installed packages."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from pydantic.plugin import _loader

from jobs.store.records import Decoder
from jobs.store.type_adapters import VARIABLE, type_adapter


@dataclass
class Kind:
    number: int


@pytest.mark.parametrize("former", [None, "0"])
def test_no_plugin_is_looked_for(former: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by an adapter nor by the decoder of a record; the variable is afterwards what it was."""

    def looked(group: str) -> list[str]:
        raise AssertionError(f"looked for {group}")

    monkeypatch.setattr(_loader, "_plugins", None)
    monkeypatch.setattr(_loader, "entry_points", looked)
    if former is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, former)
    assert type_adapter(Kind).validate_python({"number": 3}) == Kind(3)
    assert Decoder(Kind, None).decode(b'{"number": 4}') == Kind(4)
    assert os.environ.get(VARIABLE) == former
