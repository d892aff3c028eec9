"""Runs, results and graphs that the tests of tables share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.experiment.graph import Graph, Node, Run
from jobs.store.records import Result
from jobs.tables.published import Published, load_published
from jobs.tables.summary import Entry, Scores, Status, Summary, summarise

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = ("vft", "tapt", "ptapt")
PROVENANCE: Mapping[str, Any] = {"commit": "0123456789abcdef", "packages": {"torch": "2.13.0", "transformers": "5.23.0"}}


def published(table: str | None) -> Published:
    return load_published(CONFIGS / "published.yaml", table)


def entry(
    method: str, fold: str, slot: int, ua: float | None, status: Status | None = None, *, seed: int | None = None, corpus: str = "iemocap"
) -> Entry:
    scores = None if ua is None else Scores(ua, ua + 0.5, ua - 0.5)
    known = status or (Status.pending if ua is None else Status.accepted)
    return Entry(corpus, method, fold, slot, slot if seed is None else seed, scores, known)


def paper_like(table: str, seeds: int = 5) -> tuple[Entry, ...]:
    """Runs scattered about the published cells by a fixed pattern, so that tables have plausible figures."""
    found = []
    for row in published(table).rows:
        if row.method is not None:
            for place, (fold, ua) in enumerate(row.ua.items()):
                for slot in range(seeds):
                    scatter = round(1.5 * math.sin(1 + 7 * slot + 3 * place + len(row.label)), 3)
                    found.append(entry(row.method, fold, slot, round(ua + scatter, 3), corpus=table.partition("_")[0]))
    return tuple(found)


def summary(entries: tuple[Entry, ...], experiment: str = "iemocap") -> Summary:
    return summarise(entries, experiment=experiment)


def result(run: Run, confusion: tuple[tuple[int, ...], ...], classes: tuple[str, ...], **changes: Any) -> Result:
    facts: dict[str, Any] = {
        "key": run.key,
        "stage": "finetune",
        "version": 1,
        "fold": run.fold,
        "seed": run.seed,
        "corpus": "demo",
        "corpus_digest": "d",
        "settings": {},
        "upstream": {},
        "attempt": 1,
        "metrics": {},
        "provenance": PROVENANCE,
        "confusion": confusion,
        "classes": classes,
    }
    return Result(**{**facts, **changes})


def graph(methods: tuple[str, ...] = METHODS, folds: tuple[str, ...] = ("1", "2"), slots: int = 3, corpus: str = "demo") -> Graph:
    """A graph of fine-tunings alone."""
    runs = [
        Run(method, fold, slot, 100 + slot, hashlib.sha256(f"{method}|{fold}|{slot}".encode()).hexdigest()[:20])
        for method in methods
        for fold in folds
        for slot in range(slots)
    ]
    nodes = {run.key: Node(run.key, "finetune", 1, {}, {}, {}, run.fold, run.seed, run.method) for run in runs}
    return Graph(nodes, tuple(runs), corpus, "d", {run.key: () for run in runs})
