"""What the runs of a table were computed with (device, precision, initial weights), and the cells whose runs differ in it. Pure.

A stage chooses device and precision by the hardware that it finds unless the recipe names them, so that they are not part of its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.experiment.graph import Graph
from jobs.store.records import Result
from jobs.text import listed


@dataclass(frozen=True)
class MixedCell:
    """A cell whose runs differ in a property, for example `device`, and the values that they have, sorted."""

    method: str
    fold: str
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Arithmetic:
    """Properties of the last stages of all runs that have them on record, and the cells that mix them."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name -> values, sorted
    mixed: tuple[MixedCell, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """For a caption."""
        stated = [f"{name} {' and '.join(values)}" for name, values in self.values.items() if name != WEIGHTS]
        return (*((f"Runs were computed with {', '.join(stated)}.",) if stated else ()), *self.warnings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each property that differs between the runs of a cell."""
        found = []
        for name in dict.fromkeys(cell.name for cell in self.mixed):
            cells = [f"{cell.method}/{cell.fold} ({'; '.join(cell.values)})" for cell in self.mixed if cell.name == name]
            found.append(f"Runs of one cell differ in {name}: {listed(cells)}.")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return {"values": {name: list(values) for name, values in self.values.items()}, "mixed": [asdict(cell) for cell in self.mixed]}


WEIGHTS = "weights"  # initial weights of a run's last stage; captions state those of all stages


def arithmetic_of(graph: Graph, results: Mapping[str, Result]) -> Arithmetic:
    """The properties of the runs that fill the slots of a graph. `results`: stage key -> result.

    Results of earlier versions have no device and precision on record and are left out.
    """
    cells: dict[tuple[str, str, str], set[str]] = {}
    for run in graph.runs:
        for name, value in _properties(results[run.key]).items() if run.key in results else ():
            cells.setdefault((name, run.method, run.fold), set()).add(value)
    values: dict[str, set[str]] = {}
    for (name, _, _), found in cells.items():
        values.setdefault(name, set()).update(found)
    mixed = [MixedCell(method, fold, name, tuple(sorted(found))) for (name, method, fold), found in cells.items() if len(found) > 1]
    return Arithmetic({name: tuple(sorted(values[name])) for name in sorted(values)}, tuple(mixed))


def _properties(result: Result) -> dict[str, str]:
    """`arithmetic` and `runtime.weights` of a result's provenance."""
    runtime, stated = result.provenance.get("runtime"), result.provenance.get("arithmetic")
    weights = runtime.get("weights") if isinstance(runtime, Mapping) else None
    found = {**(stated if isinstance(stated, Mapping) else {}), WEIGHTS: weights}
    return {str(name): value for name, value in found.items() if isinstance(value, str) and value}
