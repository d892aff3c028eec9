"""Stateless random numbers: every random choice uses a new generator, seeded from seed, purpose and position (step, utterance).

No generator lives longer than a step, so checkpoints hold no generator state: step 700 draws the same numbers after step 699 and after a
restart, and an utterance gets the same mask in any batch.
"""

from __future__ import annotations

import hashlib

import numpy as np

Position = int | str


def _digest(seed: int, purpose: str, position: tuple[Position, ...]) -> bytes:
    """Return 32 bytes that are unique for (seed, purpose, position)."""
    name = "\x1f".join([str(seed), purpose, *(f"{type(part).__name__}:{part}" for part in position)])
    return hashlib.sha256(name.encode()).digest()


def generator(seed: int, purpose: str, *position: Position) -> np.random.Generator:
    """Return a new generator for a purpose ("order", "crop", "mask", ...) at a position (epoch or step, utterance id).

    Philox, because it is seeded by a key without further computation: every step needs hundreds of generators.
    """
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, purpose, position)[:16], dtype="<u8")))


def torch_seed(seed: int, purpose: str, *position: Position) -> int:
    """Return a seed for `torch.manual_seed`, for what torch itself draws (dropout, layer drop, Gumbel noise, new weights)."""
    return int.from_bytes(_digest(seed, purpose, position)[:8], "little") >> 1  # below 2**63
