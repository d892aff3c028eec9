"""How often a predicted resource request is sufficient, and how much it exceeds the use, by the number of finished siblings.

    python benchmarks/requests.py

Siblings and the next stages are drawn from the same distribution of durations; the request is predicted from the siblings only. Shares are
over all next stages of all trials; `asked` is the request divided by the mean use, its median over the trials. Start-up, Slurm's warning
time and rounding to minutes are left out.

`quantile`: the rule of jobs.control.estimates. `logarithms`: a 0.98 prediction bound from mean and deviation of the logarithms (Student's
t), with the deviation shrunk towards 0.2 with the weight of four siblings. `largest`: 1.25 times the longest sibling. The rule was chosen
by these figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.control.estimates import upper_bound

Values = np.ndarray[tuple[int], np.dtype[np.float64]]
SIBLINGS = (1, 3, 5, 20, 100)
NEXT = 50  # stages per trial that use the request
PRIOR, WEIGHT = 0.2, 4


def normal(deviation: float) -> Callable[[np.random.Generator, int], Values]:
    """Log-normal durations."""
    return lambda random, count: np.exp(deviation * random.standard_normal(count))


def heavy(random: np.random.Generator, count: int) -> Values:
    """Logarithms of Student's t with 3 degrees of freedom: one in a hundred takes twice as long, one in ten thousand 20 times."""
    return np.exp(0.15 * random.standard_t(3, count))


def nodes(random: np.random.Generator, count: int) -> Values:
    """One node in five takes 1.7 times as long."""
    return np.exp(0.08 * random.standard_normal(count)) * np.where(random.random(count) < 0.2, 1.7, 1.0)


def stalls(random: np.random.Generator, count: int) -> Values:
    """Three in a hundred take five times as long."""
    return np.exp(0.08 * random.standard_normal(count)) * np.where(random.random(count) < 0.03, 5.0, 1.0)


DURATIONS = {
    "log-normal, 0.05": normal(0.05),
    "log-normal, 0.3": normal(0.3),
    "log-normal, 0.6": normal(0.6),
    "heavy tails": heavy,
    "two kinds of nodes": nodes,
    "rare stalls": stalls,
}


def logarithms(values: Values) -> float:
    """Prediction bound for log-normal durations."""
    logs = np.log(values)
    free = len(values) - 1 + WEIGHT
    deviation = np.sqrt((np.sum((logs - logs.mean()) ** 2) + WEIGHT * PRIOR**2) / free)
    return float(np.exp(logs.mean() + stats.t.ppf(0.98, free) * deviation * np.sqrt(1 + 1 / len(values))))


RULES: dict[str, Callable[[Values], float]] = {
    "quantile": lambda values: upper_bound(values.tolist()),
    "logarithms": logarithms,
    "largest": lambda values: 1.25 * float(values.max()),
}


def main() -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    names = [f"{name}: {what}" for name in RULES for what in ("enough, %", "asked")]
    print(f"| durations | siblings | {' | '.join(names)} |\n{'| --- ' * (2 + len(names))}|")
    for name, draw in DURATIONS.items():
        for count in SIBLINGS:
            random = np.random.default_rng(count)
            drawn = [(draw(random, count), draw(random, NEXT)) for _ in range(trials)]
            cells = []
            for rule in RULES.values():
                asked = [rule(siblings) for siblings, _ in drawn]
                enough = np.mean([following <= bound for bound, (_, following) in zip(asked, drawn, strict=True)])
                over = np.median([bound / following.mean() for bound, (_, following) in zip(asked, drawn, strict=True)])
                cells += [f"{100 * enough:.1f}", f"{over:.2f}"]
            print(f"| {name} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
