"""Writes the tables of docs/experiments.md: every key of an experiment with its type, default and explanation, from the schema.

python tools/experiment_keys.py           write them
python tools/experiment_keys.py --check   exit with 1 if the file does not have them
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.experiment.schema_keys import REQUIRED, Key, experiment_keys  # noqa: E402 - found beside this folder
from jobs.experiment.template import yaml_text  # noqa: E402
from ser_core.settings.recipe import Recipe  # noqa: E402

DOCUMENT = ROOT / "docs" / "experiments.md"
BEGIN = "<!-- The rest is written by `python tools/experiment_keys.py`. -->\n"


def tables() -> str:
    """A heading and a table for each section."""
    return "\n".join(_section("At the top", "", experiment_keys(Recipe)))


def document(text: str) -> str:
    """The document with the tables as they should be."""
    head, mark, _ = text.partition(BEGIN)
    return f"{head}{mark}\n{tables()}"


def _section(title: str, explanation: str, keys: Sequence[Key]) -> Iterator[str]:
    leaves = [key for key in keys if key.kind]
    if leaves:
        yield f"## {title}\n"
        if explanation:
            yield f"{explanation}\n"
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from (_row(key) for key in leaves)
        yield ""
    for key in keys:
        if not key.kind:
            below = f"{key.path}.{key.entry}".rstrip(".")
            yield from _section(f"`{below}`", key.explanation, key.keys)


def _row(key: Key) -> str:
    default = "required" if key.default == REQUIRED else f"`{yaml_text(key.default)}`"
    cells = (f"`{key.path}`", key.kind, default, key.explanation)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    """Write or check the document."""
    now = DOCUMENT.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(document(now) != now)
    DOCUMENT.write_text(document(now), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
