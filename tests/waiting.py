"""Waiting for a state that other processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0  # seconds. A test that passes never waits so long, and a machine may be ten times slower than the one it was written on


def wait_until(true: Callable[[], Any], seconds: float = PATIENCE, step: float | None = None) -> bool:
    """Poll until `true()`; False when it stayed false for `seconds`.

    `step`: seconds between polls. None: 0.03 s, growing to 0.3 s with the time waited, because a poll is often a command of Slurm.
    """
    begun = time.monotonic()
    while not true():
        waited = time.monotonic() - begun
        if waited > seconds:
            return False
        time.sleep(step or min(max(0.03, waited / 10), 0.3))
    return True


def until(true: Callable[[], Any], step: float | None = None) -> None:
    """Wait for a state. AssertionError after `PATIENCE` seconds."""
    assert wait_until(true, step=step), f"not within {PATIENCE:.0f} s"
