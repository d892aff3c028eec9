"""What a stage returned and wrote, checked before it becomes a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.experiment.graph import canonical_json
from jobs.store.records import UNUSABLE, file_digest, sync, usable_confusion


class NotFiniteError(Exception):
    """A metric is NaN or infinite."""

    diverged = True


def check_returned(returned: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics`, `durations`, `confusion`, `classes`, `diverged`, `arithmetic` and `warnings` of what a stage returned.

    Raises NotFiniteError where a metric is NaN or infinite, ValueError for unknown keys, TypeError for values that are not JSON.
    """
    known: dict[str, Any] = {"metrics": {}, "durations": {}, "confusion": (), "classes": (), "diverged": ""}
    known |= {"arithmetic": {}, "warnings": ()}
    unknown = sorted(set(returned) - set(known))
    if unknown:
        raise ValueError(f"the stage returned {', '.join(unknown)}: a result holds {', '.join(known)}")
    values = {**known, **returned}
    wrong = _not_finite("metrics", values["metrics"])
    if wrong:
        raise NotFiniteError(f"{wrong} is not a finite number: the training diverged")
    canonical_json(values)
    if not usable_confusion(values["confusion"], values["classes"]):
        raise ValueError(f"the stage returned a result that cannot be scored: {UNUSABLE}")
    return values


def _not_finite(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return next(filter(None, (_not_finite(f"{name}.{key}", inner) for key, inner in value.items())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, (_not_finite(f"{name}[{index}]", inner) for index, inner in enumerate(value))), "")
    return name if isinstance(value, float) and not math.isfinite(value) else ""


def artifact_digests(output: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file, each flushed to disk first: after a crash a result must not list files that are lost."""
    found: dict[str, str] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        sync(path)
        found[path.relative_to(output).as_posix()] = file_digest(path)
    return found
