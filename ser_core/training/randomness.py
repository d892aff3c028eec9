"""Stateless randomness: every random choice is drawn from a generator named by seed, purpose and position.

Nothing carries a generator from one step to the next, so an interrupted stage needs no generator state to continue: step 700 draws the same
numbers whether it follows step 699 or a restart, and utterance 5 the same mask whoever shares its batch.
"""

from __future__ import annotations

import hashlib

import numpy as np

Position = int | str


def _digest(seed: int, purpose: str, position: tuple[Position, ...]) -> bytes:
    """32 bytes that tell every (seed, purpose, position) apart."""
    name = "\x1f".join([str(seed), purpose, *(f"{type(part).__name__}:{part}" for part in position)])
    return hashlib.sha256(name.encode()).digest()


def generator(seed: int, purpose: str, *position: Position) -> np.random.Generator:
    """A fresh generator for one purpose ("order", "crop", "time mask", ...) at one position (epoch or step, utterance id).

    Philox, because it takes a key as it is: hundreds are made for every step.
    """
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, purpose, position)[:16], dtype="<u8")))


def torch_seed(seed: int, purpose: str, *position: Position) -> int:
    """A seed for `torch.manual_seed`: dropout is the one thing that torch draws itself, in an order of its own."""
    return int.from_bytes(_digest(seed, purpose, position)[:8], "little") >> 1  # below 2**63
