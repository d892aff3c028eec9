"""Stateless randomness: every random choice is drawn from a generator named by seed, purpose and position.

Nothing carries a generator from one step to the next, so an interrupted stage needs no generator state to continue: step 700 draws the same
numbers whether it follows step 699 or a restart, and utterance 5 the same mask whoever shares its batch.
"""

from __future__ import annotations

import hashlib

import numpy as np

Position = int | str


def _words(seed: int, purpose: str, position: tuple[Position, ...]) -> list[int]:
    """Eight 32-bit words that tell every (seed, purpose, position) apart."""
    name = "\x1f".join([str(seed), purpose, *(f"{type(part).__name__}:{part}" for part in position)])
    digest = hashlib.sha256(name.encode()).digest()
    return [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 32, 4)]


def generator(seed: int, purpose: str, *position: Position) -> np.random.Generator:
    """A fresh generator for one purpose ("order", "crop", "time mask", ...) at one position (epoch or step, utterance id)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_words(seed, purpose, position))))


def torch_seed(seed: int, purpose: str, *position: Position) -> int:
    """A seed for `torch.manual_seed`: dropout is the one thing that torch draws itself, in an order of its own."""
    first, second, *_ = _words(seed, purpose, position)
    return (first << 31) ^ second  # non-negative, below 2**63
