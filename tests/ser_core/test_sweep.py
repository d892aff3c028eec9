"""Proxies from the metrics of stages."""

from __future__ import annotations

import math

import pytest

from ser_core.registry import REGISTRY


def test_proxies_of_k_means() -> None:
    """Inertia is per frame, entropy also a share of its maximum."""
    metrics = {"frames": 10, "inertia": 25.0, "entropy": math.log(16) / 2, "empty_clusters": 3}
    assert REGISTRY.stage_proxies("cluster", {"k": 16, "iterations": 20}, metrics) == {
        "k": {
            "16": {
                "inertia": 2.5,
                "entropy": pytest.approx(math.log(4)),
                "entropy_share": pytest.approx(0.5),
                "empty_clusters": 3,
            }
        }
    }
    assert REGISTRY.stage_proxies("cluster", {"k": 16}, {}) == {"k": {"16": {}}}


def test_proxies_of_p_tapt() -> None:
    """The loss of a uniform distribution over all sets of clusters has the share 1."""
    uniform = math.log(4) + math.log(8)
    found = REGISTRY.stage_proxies("ptapt", {"counts": [4, 8]}, {"training_loss": uniform})
    assert found == {"ptapt_loss": uniform, "ptapt_loss_share": pytest.approx(1.0)}
    assert REGISTRY.stage_proxies("ptapt", {"counts": [4, 8]}, {}) == {}


def test_other_stages_have_no_proxies() -> None:
    """Whatever their metrics are called."""
    assert REGISTRY.stage_proxies("tapt", {}, {"training_loss": 1.0}) == {}
