"""Imported by the fork server of `teams` before it forks."""

from __future__ import annotations

from ser_core.registry import REGISTRY

REGISTRY.preload()
