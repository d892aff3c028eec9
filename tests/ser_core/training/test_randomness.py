from __future__ import annotations

import numpy as np

from ser_core.training.randomness import generator, torch_seed


def test_a_generator_is_a_function_of_its_name() -> None:
    """The same seed, purpose and position give the same numbers, in whatever order generators are created."""
    first = generator(3, "crop", 7, "a").random(5)
    generator(3, "crop", 8, "a").random(100)
    assert np.array_equal(first, generator(3, "crop", 7, "a").random(5))


def test_neighbouring_names_give_other_numbers() -> None:
    """Seed, purpose, every position and its type affect the numbers, and their concatenation is unambiguous."""
    names = [
        (0, "crop", 1, 2),
        (1, "crop", 1, 2),
        (0, "mask", 1, 2),
        (0, "crop", 2, 1),
        (0, "crop", 12),
        (0, "crop", "1", 2),
        (0, "crop", 1),
    ]
    drawn = {float(generator(*name).random()) for name in names}  # type: ignore[arg-type]
    seeds = {torch_seed(*name) for name in names}  # type: ignore[arg-type]
    assert len(drawn) == len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_positions_in_a_row_are_uniform() -> None:
    """The first number over consecutive steps has the mean and variance of a uniform one."""
    drawn = np.array([generator(0, "crop", step).random() for step in range(4000)])
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(drawn.var() - 1 / 12) < 0.005
