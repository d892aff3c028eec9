"""Which seed fills which slot: slot i is filled with seed first_seed + i. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def seeds_of_slots(methods: Sequence[str], folds: Sequence[str], *, seeds: int, first_seed: int) -> dict[tuple[str, str, int], int]:
    """(method, fold, slot) -> seed, for `seeds` slots a cell, in the order of methods, folds and slots.

    The seeds of a slot are the same in every cell, so that methods can be compared pair by pair over (fold, slot).
    """
    return {(method, fold, slot): first_seed + slot for method in methods for fold in folds for slot in range(seeds)}
