"""Which seeds a slot may use. Pure.

Slot i begins with seed `first_seed + i`, the same in every cell, so that methods can be compared pair by pair over (fold, slot). A slot
whose run is dropped gets the next generation: a reserve seed that no other slot can ever use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_SLOTS = 1000  # per cell; the distance between a slot's seed and its reserve seeds
Slot = tuple[str, str, int]  # method, fold, number


def seeds_of(slot: int, generation: int, *, first_seed: int) -> tuple[int, ...]:
    """The seeds that a slot has had when its run is of this generation (0: the first), oldest first."""
    return tuple(first_seed + slot + MAX_SLOTS * each for each in range(generation + 1))


def seeds_of_slots(
    methods: Sequence[str], folds: Sequence[str], *, seeds: int, first_seed: int, generations: Mapping[Slot, int] | None = None
) -> dict[Slot, tuple[int, ...]]:
    """(method, fold, slot) -> its seeds, the last one filling it now, for `seeds` slots a cell in the order of methods, folds and slots.

    `generations`: of the slots that have had reserve seeds.
    """
    given = generations or {}
    slots = [(method, fold, slot) for method in methods for fold in folds for slot in range(seeds)]
    return {name: seeds_of(name[2], given.get(name, 0), first_seed=first_seed) for name in slots}
