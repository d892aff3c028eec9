"""Time of `collect --from` for experiments of growing size, and what the outlier rule does with collapsed runs planted in them.

    python benchmarks/tables.py --runs 300 10000 --seed 1

An experiment has three methods and five folds with equally many slots each: 300 runs are 20 slots. The UA of a run is the mean of its
method and fold (60 to 68) plus the variation of seeds (normal), in steps of 0.01; of each hundred runs one is planted at chance level, 25.
The sd of seeds is 1.5 in all folds (equal), or 4 1 2.4 7 3.6 (unequal). There are no reruns, so that one round is judged.

seconds: processor time of this process for reading, judging and writing every format, measured once after a small experiment has imported
what that needs. found: planted runs that the rule names. false flags: share of the other runs that it names. bias: of the mean UA of the
methods with `--unreplaced drop`, in points, against the mean without planted runs.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.experiment.config import Policy
from jobs.statistics import mean
from jobs.tables.collect import collect_csv
from jobs.tables.published import load_published
from jobs.tables.summary import Unreplaced

ROOT = Path(__file__).resolve().parents[1]
METHODS, FOLDS, CHANCE, PLANTED = ("vft", "tapt", "ptapt"), 5, 25.0, 100
SPREADS = {"equal": (1.5,) * FOLDS, "unequal": (4.0, 1.0, 2.4, 7.0, 3.6)}

Row = tuple[str, str, int, float]  # method, fold, slot, UA


def planted_runs(runs: int, spread: str, seed: int) -> tuple[list[Row], list[Row]]:
    """The runs with every hundredth at chance level, and the same without."""
    rng = np.random.default_rng(seed)
    slots = max(1, runs // (len(METHODS) * FOLDS))
    healthy = [
        (method, str(fold), slot, round(60.0 + 2 * number + fold + SPREADS[spread][fold] * float(rng.standard_normal()), 2))
        for number, method in enumerate(METHODS)
        for fold in range(FOLDS)
        for slot in range(slots)
    ]
    chosen = set(rng.choice(len(healthy), size=max(1, len(healthy) // PLANTED), replace=False).tolist())
    return [(*row[:3], CHANCE) if place in chosen else row for place, row in enumerate(healthy)], healthy


def write_runs(path: Path, rows: list[Row]) -> None:
    """A file as `collect --from` reads it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["corpus", "method", "fold", "slot", "seed", "ua"])
        writer.writerows(["planted", *row[:3], row[2], row[3]] for row in rows)


def measured(runs: int, spread: str, seed: int, folder: Path) -> list[str]:
    """One row of the table."""
    rows, healthy = planted_runs(runs, spread, seed)
    source, policy, published = folder / f"{spread}-{runs}.csv", Policy(), load_published(ROOT / "configs" / "published.yaml", None)
    write_runs(source, rows)
    started = time.process_time()
    report = collect_csv(
        source, published, rule=policy.outliers, sigmas=policy.sigmas, rounds=policy.rounds, unreplaced=Unreplaced.drop, out=folder / "out"
    )
    seconds = time.process_time() - started
    named = {(entry.method, entry.fold, entry.slot) for entry in report.judged.rerun}
    planted = {row[:3] for row, other in zip(rows, healthy, strict=True) if row != other}
    flags = 100 * len(named - planted) / (len(rows) - len(planted))
    bias = (mean([method.mean_ua or 0.0 for method in report.summary.methods]) or 0.0) - (mean([row[3] for row in healthy]) or 0.0)
    return [str(len(rows)), spread, f"{seconds:.1f}", f"{len(named & planted)} of {len(planted)}", f"{flags:.1f} %", f"{bias:+.2f}"]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="Times of collect, with planted runs.")
    parser.add_argument("--runs", type=int, nargs="+", default=[300, 10_000])
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured(15, "equal", arguments.seed, Path(folder))
        print("| runs | sd of folds | seconds | found | false flags | bias |\n|---:|:---|---:|---:|---:|---:|")
        for runs in arguments.runs:
            for spread in SPREADS:
                print(f"| {' | '.join(measured(runs, spread, arguments.seed, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
