"""A report with every state that a run can have, and names that a page must escape."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from jobs.control.outliers import Verdict, rule_in_words
from jobs.experiment.graph import Node
from jobs.report.material import Material, Source, material_of
from jobs.store.layout import Layout
from jobs.store.records import write_json
from jobs.tables.collect import summary_of
from jobs.tables.published import Published
from jobs.tables.summary import CodeFacts, Entry, Scores, Status, summarise
from tests.jobs.table_cases import graph, paper_like, published, result

HOSTILE = "<script>alert('1')</script> & \"quoted\" $x$"


def case() -> Material:
    """SAVEE with 3 seeds: a failed run, a dropped one with its replacement, a diverged one, an unresolved outlier."""
    runs = list(paper_like("savee_table2", seeds=3))
    runs.append(replace(runs[0], seed=1000, scores=Scores(71.0, 70.0, 69.0)))
    runs[0] = replace(runs[0], scores=Scores(14.3, 14.0, 5.0), status=Status.outlier, verdict=verdict(14.3))
    runs[1] = replace(runs[1], scores=Scores(20.0, 21.0, 8.0), status=Status.diverged)
    runs[-2] = replace(runs[-2], verdict=verdict(80.0), unreplaced=True)
    failed = next(place for place, run in enumerate(runs) if run.name == "tapt/JE/1")
    runs[failed] = replace(runs[failed], scores=None, status=Status.failed)
    code = CodeFacts(("0123456789abcdef",), True, {"torch": ("2.13.0",)}, (f"weights of {HOSTILE}",))
    found = summarise(runs, experiment="savee", outlier_rule=rule_in_words("pooled", 2.0, 3), code=code)
    return material_of(found, published("savee_table2"))


def hostile_case() -> Material:
    """Every name is markup."""
    runs = [
        Entry(HOSTILE, f"{HOSTILE}{method}", f"{HOSTILE}{fold}", slot, slot, Scores(60.0 + slot + fold, 61.0, 62.0), Status.accepted)
        for method in range(2)
        for fold in range(2)
        for slot in range(2)
    ]
    code = CodeFacts((HOSTILE,), True, {HOSTILE: (HOSTILE,)}, (HOSTILE,))
    found = summarise(runs, experiment=HOSTILE, outlier_rule=HOSTILE, code=code)
    return material_of(found, Published(HOSTILE, HOSTILE, {f"{HOSTILE}0": f"{HOSTILE} label"}, {f"{HOSTILE}0": HOSTILE}))


def experiment_case(folder: Path) -> Material:
    """An experiment with results, predictions, curves and times: 3 methods, 2 folds, 3 slots, and one shared stage above TAPT's runs.

    TAPT confuses b with a more often than V-FT does. Slot 0 of V-FT in fold 1 is of an earlier version: it left no curves.
    """
    made, layout = graph(), Layout(folder, "demo")
    shared = Node("a" * 20, "tapt", 1, {}, {}, {}, "1", 0, "tapt")
    children = {**made.children, shared.key: tuple(run.key for run in made.runs if run.method == "tapt")}
    made = replace(made, nodes={shared.key: shared, **made.nodes}, children=children)
    results = {shared.key: replace(result(made.runs[0], (), ()), key=shared.key, stage="tapt", warnings=("it learns nothing",))}
    for place, run in enumerate(made.runs):
        wrong = 1 + run.slot + (1 if run.method == "tapt" else 0)
        results[run.key] = result(run, ((8, 2), (wrong, 10 - wrong)), ("a", "b"), attempt=2 if place == 1 else 1)
        write_predictions(layout.stage("finetune", run.key).attempt(results[run.key].attempt).output, wrong)
    for place, (key, found) in enumerate(results.items()):
        names = () if key == made.runs[0].key else ("curves.json",)
        if names:
            write_curves(layout.stage(found.stage, key).attempt(found.attempt).output, place, codebook=key == shared.key)
        files = ("predictions.csv", *names) if found.confusion else names
        results[key] = replace(found, artifacts=dict.fromkeys(files, "0" * 64), provenance={**found.provenance, **times(place)})
    summary = summary_of("demo", made, results, {})
    return material_of(summary, published(None), [Source(made, results, layout)])


def write_predictions(output: Path, wrong: int) -> None:
    """Ten utterances a class and two speakers; the first utterances of b are wrong with a confidence of 0.75."""
    rows = [f"a{number},one,a,{'a' if number < 8 else 'b'},0.9,0.1" for number in range(10)]
    rows += [f"b{number},two,b,{'a,0.75,0.25' if number < wrong else 'b,0.25,0.75'}" for number in range(10)]
    output.mkdir(parents=True)
    (output / "predictions.csv").write_text("\n".join(["id,speaker,label,predicted,p_a,p_b", *rows]) + "\n")


def write_curves(output: Path, place: int, *, codebook: bool) -> None:
    """A loss that falls from 1.4 to 0.5 or so, and its accuracy; with the perplexity of a codebook of 8 entries."""
    steps = range(10, 1010, 10)
    curves = {
        "train/loss": [(step, 0.5 + 0.01 * place + 9 / (step + 5)) for step in steps],
        "train/accuracy": [(step, step / 1010) for step in steps],
        "train/learning_rate": [(step, 1e-3) for step in steps],
    }
    references: dict[str, list[object]] = {"train/loss": [0.7, "loss of the class prior"]}
    if codebook:
        curves["codebook/group_1/code_perplexity"] = [(step, 6 - step / 1000) for step in steps]
        references["codebook/group_1/code_perplexity"] = [8.0, "entries of each group of the codebook"]
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "curves.json", {"schema": 1, "curves": curves, "references": references})


def times(place: int) -> dict[str, object]:
    """A minute each, two at the same time on each of two nodes; the first stage on four GPUs."""
    began = datetime(2026, 1, 2, 3, place // 4, tzinfo=UTC)
    facts = {
        "started": began.isoformat(),
        "finished": (began + timedelta(minutes=1)).isoformat(),
        "seconds": 60.0,
        "host": f"node{place % 2}",
    }
    return {**facts, "device": "4 x H200" if place == 0 else "cpu", "processes": 4 if place == 0 else 1, "threads": 2}


def requested(place: int) -> dict[str, object]:
    """The request of a job of a stage, two hours and 8 GiB a node, and a waiting of `place` minutes in two attempts."""
    memory = {"peak_rss_bytes": 2**30, "peak_own_bytes": 2**30, "cpu_seconds": 90.0}
    asked = {"minutes": 120, "configured_minutes": 240, "memory_mb": 8192, "configured_mb": 16384, "cpus": 4, "nodes": 1}
    times = {"submitted": 1e9, "eligible": 1e9, "started": 1e9 + 60, "waited": 60.0 * place - 30, "before": 30.0}
    return {**memory, "requested": {**asked, "gpus": 1, "stages": 2, "at_once": 1}, "queue": times}


def verdict(ua: float) -> Verdict:
    return Verdict("DC", 0, 0, ua, 70.5, 1.5, abs(ua - 70.5) / 1.5, out=True)
