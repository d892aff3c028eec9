"""Learning-rate schedules: the factor of the configured rate at each step."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], float]  # step, from 0 -> factor


def constant() -> Schedule:
    """Fine-tuning, in the authors' code: constant factor 1."""
    return lambda step: 1.0


def warmup_flat_linear(total: int, warmup: int, flat: int) -> Schedule:
    """Pretraining stages (authors' code): linear from 0 to 1 over `warmup` steps, 1 for `flat` steps, then linear to 0 at step `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if step < warmup + flat:
            return 1.0
        return max(0.0, (total - step) / max(1, total - (warmup + flat)))

    return factor
