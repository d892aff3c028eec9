"""Comparison of outlier rules on simulated grids: what they detect and their effect on mean and spread; prints two Markdown tables.

    python benchmarks/outliers.py --repeats 4000 --seed 1

A grid is 5 folds x n slots of one method. The UA of a run is the mean of its fold (70 on average, sd 3 between folds) plus the variation of
seeds (normal); a share p of runs collapses to chance level, 25 for four classes. Outliers are replaced by the next seed of their slot,
which collapses with the same probability, until there are none or the maximum number of rounds is reached. All rules drop runs beyond two
sigmas on both sides and see the same seeds.

The first table compares rules where all folds have the same seed sd, 1.5; the last three rows of a block are the rules `common` and
`pooled` of this project (`jobs.control.outliers.judge`). The second table has these two for folds whose seed sds differ, and for test
folds of 40 utterances, whose UA changes in steps of 2.5 points (one of the ten utterances of one of four classes).

power: share of the collapsed runs that the first round detects. caught: share of all collapsed runs ever made, including reruns, that are
dropped in the end. false flags: share of the other runs that the first round drops. bias: mean UA of the table minus the true mean, in
percentage points. rerun: reruns per slot. unresolved: outliers left after the last round, per slot. sd kept: mean over cells of the sample
sd of the runs that fill the slots in the end; sd true: mean of the sds that the seeds of the folds have. A sample sd of 5 normal values is
0.94 of the true one on average, of 20 values 0.99. ± is one standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
EQUAL, PAPER, WIDE = (SEED_SD,) * FOLDS, (1.7, 0.9, 2.0, 1.1, 1.6), (4.0, 1.0, 2.4, 7.0, 3.6)  # sd of seeds, by fold; PAPER: its Table 1
STEP = 2.5  # of the UA of 40 utterances in four classes
SPREADS = (
    ("equal, 1.5", EQUAL, 0.0),
    ("as in the paper, 0.9 to 2.0", PAPER, 0.0),
    ("unequal, 1 to 7", WIDE, 0.0),
    ("equal, 40 utterances", EQUAL, STEP),
    ("as in the paper, 40 utterances", PAPER, STEP),
    ("unequal, 40 utterances", WIDE, STEP),
)

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Grids:
    """All possible runs: [repeat, fold, slot, generation]."""

    ua: Values
    collapsed: Flags
    truth: Values  # [repeat, fold]
    sd: float  # of the seeds, mean over folds

    def part(self, which: Flags) -> Grids:
        """Some of the grids. `which`: [repeat]."""
        return Grids(self.ua[which], self.collapsed[which], self.truth[which], self.sd)

    def current(self, generations: Numbers) -> tuple[Values, Flags]:
        """UA of the current runs of the slots, and whether they collapsed: [repeat, fold, slot]."""
        places = generations[..., None]
        return np.take_along_axis(self.ua, places, -1)[..., 0], np.take_along_axis(self.collapsed, places, -1)[..., 0]


Rule = Callable[[Grids, Numbers], Flags]  # grids, generation of every slot now -> which runs are out


def draw(repeats: int, slots: int, share: float, seed: int, spread: tuple[float, ...] = EQUAL, step: float = 0.0) -> Grids:
    """Draw grids with a reserve seed for every round. `spread`: sd of the seeds of each fold; `step`: of a UA, 0: any value."""
    generator = np.random.default_rng((seed, slots, round(1000 * share)))
    truth = MEAN_UA + FOLD_SD * generator.standard_normal((repeats, FOLDS))
    shape = (repeats, FOLDS, slots, ROUNDS + 1)
    collapsed = generator.random(shape) < share
    seeds = np.array(spread)[:, None, None] * generator.standard_normal(shape)
    ua = np.where(collapsed, CHANCE, np.clip(truth[:, :, None, None] + seeds, 0, 100))
    sds = [np.sqrt(sd**2 + step**2 / 12) for sd in spread]  # rounding to steps adds the variance of a uniform distribution
    return Grids(np.round(ua / step) * step if step else ua, collapsed, truth, float(np.mean(sds)))


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
    """The rule `common`, from the current runs of the slots only."""
    ua, _ = grids.current(generations)
    distances = np.abs(ua - np.median(ua, axis=-1, keepdims=True))
    pooled = np.sort(distances, axis=-1)[..., 1:].reshape(len(ua), -1)
    return np.asarray(distances > SIGMAS * 1.4826 * np.median(pooled, axis=-1)[:, None, None])


def shipped(name: str, grids: Grids, generations: Numbers) -> Flags:
    """A rule of jobs.control.outliers, applied to each grid."""
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
        for verdict in judge(name, attempts, {(*slot, generation) for slot, generation in now.items()}, SIGMAS).out:
            out[repeat, int(verdict.fold), verdict.slot] = True
    return out


RULES: tuple[tuple[str, Rule, int], ...] = (
    ("per cell, sample sd", per_cell, ROUNDS),
    ("per cell, leave-one-out", leave_one_out, ROUNDS),
    ("residuals from the cell mean, sd pooled over folds", pooled_sd, ROUNDS),
    ("residuals from the cell median, MAD pooled over folds, current runs", pooled_median, ROUNDS),
    ("**`common`**: the same, from every run ever made", partial(shipped, "common"), ROUNDS),
    ("**`pooled`**: each fold's own scale, at least the pooled one, at most 2.5 times it", partial(shipped, "pooled"), ROUNDS),
    ("**`pooled`**, as it is by default", partial(shipped, "pooled"), OUR_ROUNDS),
)


@dataclass(frozen=True)
class Figures:
    """What a rule does to grids; text with standard errors."""

    power: str
    caught: str
    false_flags: str
    bias: str
    rerun: str
    unresolved: str
    sd: str


def measure(grids: Grids, rule: Rule, rounds: int) -> Figures:
    """Judge and rerun until nothing is out, at most `rounds` times."""
    generations = np.zeros(grids.ua.shape[:-1], dtype=np.int64)
    _, collapsed = grids.current(generations)
    first = rule(grids, generations)
    out = first.copy()
    for _ in range(rounds):
        changed = np.asarray(out.any((1, 2)))  # a grid in which none is out does not change, and needs no second judgement
        if not changed.any():
            break
        generations = generations + out
        out[changed] = rule(grids.part(changed), generations[changed])
    ua, still = grids.current(generations)
    made = np.arange(grids.ua.shape[-1]) <= generations[..., None]
    ever = (grids.collapsed & made).sum((1, 2, 3))
    bias = (ua.mean(-1) - grids.truth).mean(-1)
    kept = ua.std(-1, ddof=1).mean(-1)
    slots = np.full(len(ua), generations[0].size)
    return Figures(
        power=_ratio((first & collapsed).sum((1, 2)), collapsed.sum((1, 2)), 3),
        caught=_ratio(ever - still.sum((1, 2)), ever, 3),
        false_flags=_ratio((first & ~collapsed).sum((1, 2)), (~collapsed).sum((1, 2)), 3),
        bias=f"{bias.mean():+.3f} ± {bias.std(ddof=1) / np.sqrt(len(bias)):.3f}",
        rerun=_ratio(generations.sum((1, 2)), slots, 3),
        unresolved=_ratio(out.sum((1, 2)), slots, 4),
        sd=f"{kept.mean():.2f} / {grids.sd:.2f}",
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
    _table(f"rule, {SIGMAS:g} sigmas", ("rounds", "power", "caught", "false flags", "bias", "rerun", "unresolved"))
    for slots, share in SETTINGS:
        grids = draw(arguments.repeats, slots, share, arguments.seed)
        for name, rule, rounds in RULES:
            found = measure(grids, rule, rounds)
            figures = (found.power, found.caught, found.false_flags, found.bias, found.rerun, found.unresolved)
            print(f"| {slots} | {share:g} | {name} | {rounds} | {' | '.join(figures)} |", flush=True)
    print()
    _table("sd of the seeds of a fold", ("rule", "power", "false flags", "bias", "sd kept / true"))
    for spread, sds, step in SPREADS:
        for slots, share in SETTINGS:
            grids = draw(arguments.repeats, slots, share, arguments.seed, sds, step)
            for name in ("common", "pooled"):
                found = measure(grids, partial(shipped, name), OUR_ROUNDS)
                kept = (found.power, found.false_flags, found.bias, found.sd)
                print(f"| {slots} | {share:g} | {spread} | `{name}` | {' | '.join(kept)} |", flush=True)


def _table(name: str, columns: tuple[str, ...]) -> None:
    print(f"| {' | '.join(('n', 'p', name, *columns))} |\n|---:|---:|:---|{'---:|' * len(columns)}")


if __name__ == "__main__":
    main()
