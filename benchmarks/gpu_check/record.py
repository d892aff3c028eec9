"""What one part of the check has found, written line by line as it is found: a part that crashes or is killed loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOTE = 240


class Record:
    """Appends the findings of a part to a file of JSON lines, and knows the part's time limit.

    A *proof* holds or does not hold; the check passes if all proofs hold. A *row* belongs to a table of figures. A *note* is a line.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._deadline = time.monotonic() + seconds

    def proof(self, name: str, holds: bool, text: str) -> None:
        """Record whether something holds; `text` states what was compared, with figures and tolerance."""
        self._append({"kind": "proof", "name": name, "holds": bool(holds), "text": text})

    def row(self, table: str, **values: Any) -> None:
        """Record one row of a table; values are JSON values."""
        self._append({"kind": "row", "table": table, "values": values})

    def note(self, text: str) -> None:
        """Record a line of text, cut to NOTE characters: torch's messages can be pages."""
        self._append({"kind": "note", "text": text if len(text) <= NOTE else f"{text[:NOTE]}..."})

    def left(self) -> float:
        """Return the seconds until the part is killed."""
        return self._deadline - time.monotonic()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether `seconds` are left; if not, a note names what is left out."""
        if self.left() >= seconds:
            return True
        self.note(f"left out for lack of time: {what}")
        return False

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False, default=_plain) + "\n")


@dataclass
class Findings:
    """The findings of a part, read back."""

    proofs: list[dict[str, Any]] = field(default_factory=list)  # name, holds, text
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # table -> rows
    notes: list[str] = field(default_factory=list)


def read_findings(lines: Iterable[str]) -> Findings:
    """Return the findings in JSON lines; a last line that a killed process has not finished is left out."""
    found = Findings()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["kind"] == "proof":
            found.proofs.append({key: entry[key] for key in ("name", "holds", "text")})
        elif entry["kind"] == "row":
            found.rows.setdefault(entry["table"], []).append(entry["values"])
        else:
            found.notes.append(entry["text"])
    return found


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    return value.item()
