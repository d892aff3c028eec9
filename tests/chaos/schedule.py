"""Which faults strike, in which order and how far apart: drawn from the seed alone, so that a run with the same seed injects the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PAUSE_SECONDS = (0.3, 2.4)  # between two bursts
BURST = (1, 1, 1, 2, 3)  # faults at the same time


@dataclass(frozen=True)
class Planned:
    """One fault: its kind, the seed of what it draws itself (its target, how long it lasts), and the seconds until the next one."""

    number: int
    kind: str
    seed: str
    pause: float


def schedule(seed: int, weights: Mapping[str, int]) -> Iterator[Planned]:
    """Faults without end, in rounds: each round has every kind as often as its weight, in random order."""
    drawn = random.Random(seed)
    number = left = 0  # `left`: of the present burst
    while True:
        kinds = [kind for kind, weight in weights.items() for _ in range(weight)]
        drawn.shuffle(kinds)
        for kind in kinds:
            left = left - 1 if left > 1 else drawn.choice(BURST)
            pause = drawn.uniform(*PAUSE_SECONDS) if left == 1 else 0.0
            yield Planned(number, kind, f"{seed}/{number}", pause)
            number += 1
