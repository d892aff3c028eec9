"""Time, size and memory of the HTML report of an experiment as large as IEMOCAP with 20 seeds: 3 methods x 5 folds x 20 slots.

    python benchmarks/report.py [--slots 20] [--out report.html]     --slots 667: 10 005 runs

Results, predictions (5531 utterances, each tested once a slot) and curves (200 points) are random but plausible. Reading the files of
predictions and curves is part of the time; computing the summary and the scores of the tables is not. Memory is the peak of the process,
whose results and summary are a part of it.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.experiment.graph import Graph, Node, Run
from jobs.report.material import Source, material_of
from jobs.report.write import report_text
from jobs.store.layout import Layout
from jobs.store.records import Result, write_json
from jobs.tables.collect import summary_of
from jobs.tables.published import Published

METHODS, FOLDS, UTTERANCES = ("vft", "tapt", "ptapt"), ("1", "2", "3", "4", "5"), 5531
CLASSES = ("angry", "happy", "neutral", "sad")
ROOT = Path(__file__).resolve().parents[1]


def experiment(folder: Path, slots: int) -> tuple[Graph, dict[str, Result], Layout]:
    """Runs with results, predictions and curves below a folder."""
    layout, draw = Layout(folder, "large"), random.Random(7)
    names = [(method, fold, slot) for method in METHODS for fold in FOLDS for slot in range(slots)]
    runs = [Run(method, fold, slot, slot, f"{place:020x}") for place, (method, fold, slot) in enumerate(names)]
    nodes = {run.key: Node(run.key, "finetune", 1, {}, {}, {}, run.fold, run.seed, run.method) for run in runs}
    results = {}
    for run in runs:
        output = layout.stage("finetune", run.key).attempt(1).output
        output.mkdir(parents=True)
        confusion = _write_predictions(output, run, draw)
        losses = [(step, 1.4 / (1 + step / 900) + draw.gauss(0, 0.02)) for step in range(10, 2010, 10)]
        curves = {"train/loss": losses, "train/accuracy": [(step, 1 - loss / 2) for step, loss in losses]}
        write_json(
            output / "curves.json", {"schema": 1, "curves": curves, "references": {"train/loss": [1.386, "loss of the class prior"]}}
        )
        began = f"2026-01-{1 + run.slot % 28:02d}T{draw.randrange(20):02d}:00:00+00:00"
        facts = {"seconds": 3000.0, "started": began, "finished": began.replace(":00:00+", ":50:00+"), "host": f"node{draw.randrange(8)}"}
        result = Result(
            run.key, "finetune", 1, run.fold, run.seed, "iemocap", "d", {}, {}, 1, {}, facts, confusion=confusion, classes=CLASSES
        )
        results[run.key] = replace(result, artifacts={"predictions.csv": "", "curves.json": ""})
    return Graph(nodes, tuple(runs), "iemocap", "d", dict.fromkeys(nodes, ())), results, layout


def _write_predictions(output: Path, run: Run, draw: random.Random) -> tuple[tuple[int, ...], ...]:
    counts = [[0] * len(CLASSES) for _ in CLASSES]
    lines = ["id,speaker,label,predicted," + ",".join(f"p_{name}" for name in CLASSES)]
    for number in range(UTTERANCES // len(FOLDS)):
        true = number % len(CLASSES)
        weights = [draw.random() * (3 if place == true else 1) for place in range(len(CLASSES))]
        found = max(range(len(CLASSES)), key=weights.__getitem__)
        counts[true][found] += 1
        shares = ",".join(f"{weight / sum(weights):.6f}" for weight in weights)
        lines.append(f"Ses0{run.fold}_{number:04d},{run.fold}{'FM'[number % 2]},{CLASSES[true]},{CLASSES[found]},{shares}")
    (output / "predictions.csv").write_text("\n".join(lines) + "\n")
    return tuple(map(tuple, counts))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graph, results, layout = experiment(Path(folder), options.slots)
        summary, published = summary_of("large", graph, results, {}), Published(labels={})
        started, used = time.perf_counter(), time.process_time()
        text = report_text(material_of(summary, published, [Source(graph, results, layout)]))
        seconds, used = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(graph.runs)} runs: {len(text.encode()) / 1e6:.2f} MB in {seconds:.2f} s ({used:.2f} s of one core), {peak:.0f} MiB")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
