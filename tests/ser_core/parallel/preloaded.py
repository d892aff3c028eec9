"""What the server of `teams` imports before it forks, so that no process has to."""

from __future__ import annotations

from ser_core.registry import REGISTRY

REGISTRY.preload()
