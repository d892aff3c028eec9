"""Comparison of outlier rules on simulated grids: what they detect and their effect on the mean; prints one Markdown table.

    python benchmarks/outliers.py --repeats 4000 --seed 1

A grid is 5 folds x n slots of one method. The UA of a run is the mean of its fold (70 on average, sd 3 between folds) plus the variation of
seeds (normal, sd 1.5); a share p of runs collapses to chance level, 25 for four classes. Outliers are replaced by the next seed of their
slot, which collapses with the same probability, until there are none or the maximum number of rounds is reached. All rules drop runs beyond
two sigmas on both sides and see the same seeds. The last two rows of a block are the rule of this project, `jobs.control.outliers.judge`.

power: share of the collapsed runs that the first round detects. caught: share of all collapsed runs ever made, including reruns, that are
dropped in the end. false flags: share of the other runs that the first round drops. bias: mean UA of the table minus the true mean, in
percentage points. rerun: reruns per slot. unresolved: outliers left after the last round, per slot. ± is one standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.control.outliers import FinishedRun, judge

FOLDS = 5
MEAN_UA, FOLD_SD, SEED_SD, CHANCE = 70.0, 3.0, 1.5, 25.0
SIGMAS = 2.0
ROUNDS, OUR_ROUNDS = 5, 3
SETTINGS = ((5, 0.12), (20, 0.12), (5, 0.0), (20, 0.0))  # slots per cell, share of collapsed runs

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Grids:
    """All possible runs: [repeat, fold, slot, generation]."""

    ua: Values
    collapsed: Flags
    truth: Values  # [repeat, fold]

    def current(self, generations: Numbers) -> tuple[Values, Flags]:
        """UA of the current runs of the slots, and whether they collapsed: [repeat, fold, slot]."""
        places = generations[..., None]
        return np.take_along_axis(self.ua, places, -1)[..., 0], np.take_along_axis(self.collapsed, places, -1)[..., 0]


Rule = Callable[[Grids, Numbers], Flags]  # grids, generation of every slot now -> which runs are out


def draw(repeats: int, slots: int, share: float, seed: int) -> Grids:
    """Draw grids with a reserve seed for every round."""
    generator = np.random.default_rng((seed, slots, round(1000 * share)))
    truth = MEAN_UA + FOLD_SD * generator.standard_normal((repeats, FOLDS))
    shape = (repeats, FOLDS, slots, ROUNDS + 1)
    collapsed = generator.random(shape) < share
    return Grids(np.where(collapsed, CHANCE, truth[:, :, None, None] + SEED_SD * generator.standard_normal(shape)), collapsed, truth)


def per_cell(grids: Grids, generations: Numbers) -> Flags:
    """The paper's rule: mean and sample sd of the cell."""
    ua, _ = grids.current(generations)
    return np.asarray(np.abs(ua - ua.mean(-1, keepdims=True)) > SIGMAS * ua.std(-1, ddof=1, keepdims=True))


def leave_one_out(grids: Grids, generations: Numbers) -> Flags:
    """Mean and sample sd of the other runs of the cell."""
    ua, _ = grids.current(generations)
    n = ua.shape[-1]
    others = np.stack([np.delete(ua, slot, axis=-1) for slot in range(n)], axis=-2)
    return np.asarray(np.abs(ua - others.mean(-1)) > SIGMAS * others.std(-1, ddof=1))


def pooled_sd(grids: Grids, generations: Numbers) -> Flags:
    """Residuals from the cell mean, sd pooled over folds (one degree of freedom per cell)."""
    ua, _ = grids.current(generations)
    residuals = ua - ua.mean(-1, keepdims=True)
    degrees = ua.shape[-2] * (ua.shape[-1] - 1)
    return np.asarray(np.abs(residuals) > SIGMAS * np.sqrt((residuals**2).sum((-1, -2), keepdims=True) / degrees))


def pooled_median(grids: Grids, generations: Numbers) -> Flags:
    """The rule of this project, from the current runs of the slots only."""
    ua, _ = grids.current(generations)
    distances = np.abs(ua - np.median(ua, axis=-1, keepdims=True))
    pooled = np.sort(distances, axis=-1)[..., 1:].reshape(len(ua), -1)
    return np.asarray(distances > SIGMAS * 1.4826 * np.median(pooled, axis=-1)[:, None, None])


def shipped(grids: Grids, generations: Numbers) -> Flags:
    """`pooled` of jobs.control.outliers, applied to each grid."""
    out = np.zeros(generations.shape, dtype=np.bool_)
    for repeat, grid in enumerate(grids.ua.tolist()):
        now = {
            (str(fold), slot): generation for fold, cell in enumerate(generations[repeat].tolist()) for slot, generation in enumerate(cell)
        }
        attempts = [
            FinishedRun(fold, slot, generation, 1000 * generation + slot, grid[int(fold)][slot][generation])
            for (fold, slot), last in now.items()
            for generation in range(last + 1)
        ]
        for verdict in judge("pooled", attempts, {(*slot, generation) for slot, generation in now.items()}, SIGMAS).out:
            out[repeat, int(verdict.fold), verdict.slot] = True
    return out


RULES: tuple[tuple[str, Rule, int], ...] = (
    ("per cell, sample sd", per_cell, ROUNDS),
    ("per cell, leave-one-out", leave_one_out, ROUNDS),
    ("residuals from the cell mean, sd pooled over folds", pooled_sd, ROUNDS),
    ("residuals from the cell median, MAD pooled over folds, current runs", pooled_median, ROUNDS),
    ("**`pooled`**: the same, from every run ever made", shipped, ROUNDS),
    ("**`pooled`**, as it is by default", shipped, OUR_ROUNDS),
)


def measure(grids: Grids, rule: Rule, rounds: int) -> tuple[str, ...]:
    """One row: power, caught, false flags, bias, rerun, unresolved."""
    generations = np.zeros(grids.ua.shape[:-1], dtype=np.int64)
    _, collapsed = grids.current(generations)
    first = out = rule(grids, generations)
    for _ in range(rounds):
        if not out.any():
            break
        generations = generations + out
        # A grid in which none was out has not changed, and is judged as before: it needs no care of its own.
        out = rule(grids, generations)
    ua, still = grids.current(generations)
    made = np.arange(grids.ua.shape[-1]) <= generations[..., None]
    ever = (grids.collapsed & made).sum((1, 2, 3))
    bias = (ua.mean(-1) - grids.truth).mean(-1)
    slots = np.full(len(ua), generations[0].size)
    return (
        _ratio((first & collapsed).sum((1, 2)), collapsed.sum((1, 2)), 3),
        _ratio(ever - still.sum((1, 2)), ever, 3),
        _ratio((first & ~collapsed).sum((1, 2)), (~collapsed).sum((1, 2)), 3),
        f"{bias.mean():+.3f} ± {bias.std(ddof=1) / np.sqrt(len(bias)):.3f}",
        _ratio(generations.sum((1, 2)), slots, 3),
        _ratio(out.sum((1, 2)), slots, 4),
    )


def _ratio(part: Numbers, whole: Numbers, digits: int) -> str:
    """Ratio of sums over grids and its standard error; the grid is the unit, since its runs are judged together."""
    if not whole.sum():
        return "–"
    ratio = part.sum() / whole.sum()
    error = (part - ratio * whole).std(ddof=1) * np.sqrt(len(part)) / whole.sum()
    return f"{ratio:.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="grids per setting, at least 2 (default 1000)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats: at least 2")
    columns = ("n", "p", f"rule, {SIGMAS:g} sigmas", "rounds", "power", "caught", "false flags", "bias", "rerun", "unresolved")
    print(f"| {' | '.join(columns)} |\n|---:|---:|:---|{'---:|' * (len(columns) - 3)}")
    for slots, share in SETTINGS:
        grids = draw(arguments.repeats, slots, share, arguments.seed)
        for name, rule, rounds in RULES:
            print(f"| {slots} | {share:g} | {name} | {rounds} | {' | '.join(measure(grids, rule, rounds))} |", flush=True)


if __name__ == "__main__":
    main()
