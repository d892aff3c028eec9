"""What the results of an experiment state of one run and its method, for the card of an exported model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.commands.collect import part_of
from jobs.tables.collect import summary_of
from jobs.tables.summary import Status

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.experiment.lookup import Target
    from jobs.store.records import Result


def model_facts(session: Session, report: Report, target: Target, result: Result, licence: str) -> dict[str, Any]:
    """JSON values: what an exported model should state of its origin, and the scores of its method.

    `cells`: fold -> metrics of each run of the method that the means of tables contain; `planned`: how many there should be; `interval`:
    95 %, over folds and seeds, of the score in the unit of tables, or None. `metrics`: of the run itself.
    """
    part = part_of(session, report)
    summary = summary_of(part.name, part.graph, part.results, part.states, part.outlier_rule, part.judgements)
    method = target.run.method if target.run else target.node.method
    keys = {(run.method, run.fold, run.seed): run.key for run in (*part.graph.runs, *part.graph.superseded)}
    cells: dict[str, list[dict[str, float]]] = {}
    found = next((each for each in summary.methods if each.method == method), None)
    for cell in found.cells if found else ():
        counted = [entry for entry in cell.runs if entry.status is Status.accepted and entry.scores is not None]
        if counted:
            cells[cell.fold] = [dict(part.results[keys[method, entry.fold, entry.seed]].metrics) for entry in counted]
    provenance = result.provenance
    return {
        "experiment": session.name,
        "run": target.run.name if target.run else target.node.key,
        "corpus": result.corpus,
        "method": method,
        "label": part.labels.get(method, method),
        "fold": result.fold,
        "seed": result.seed,
        "metrics": dict(result.metrics),
        "cells": cells,
        "planned": sum(cell.slots for cell in found.cells) if found else 0,
        "interval": list(found.crossed.interval) if found and found.crossed else None,
        "licence": licence,
        "commit": str(provenance.get("commit", "")),
        "packages": dict(provenance.get("packages", {})),
    }
