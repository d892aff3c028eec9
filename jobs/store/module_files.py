"""The source files of the top-level package or module that holds a registry of the user, for the copy of the code that jobs run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

SUFFIXES = (".py", ".json", ".yaml", ".yml", ".toml", ".txt", ".csv", ".j2")  # of an installed package: code and small data, no binaries


def top_level(registry: str) -> str:
    """`examples` of `examples.digits.digits:REGISTRY`; "" of ""."""
    return registry.partition(":")[0].partition(".")[0]


def module_files(name: str, source: Path) -> Mapping[str, Path]:
    """Relative name -> file of a top-level package or module outside of the folder `source`; {} if it is inside, or not found.

    The module is looked up and not imported.
    """
    spec = importlib.util.find_spec(name) if name else None
    if spec is None:
        return {}
    folders = [Path(each).resolve() for each in spec.submodule_search_locations or ()]
    if not folders and spec.origin and Path(spec.origin).suffix == ".py":
        file = Path(spec.origin).resolve()
        return {} if file.is_relative_to(source) else {file.name: file}
    found = {}
    for folder in (each for each in folders if not each.is_relative_to(source)):
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts and path.is_file():
                found[str(Path(name) / path.relative_to(folder))] = path
    return found
