"""What a sweep over sets of cluster counts needs to know of P-TAPT: names of its parts, and proxies of a point's score. Pure.

A proxy is a number that is known before fine-tuning, for example the purity of the clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProxyColumn:
    """One proxy in the tables of a sweep."""

    name: str  # in JSON and CSV
    heading: str
    per_count: bool = True  # one value per cluster count; else one per set of counts
    decimals: int = 3  # in a table


@dataclass(frozen=True)
class SweptMethod:
    """The method whose settings a sweep searches."""

    name: str
    label: str  # in captions
    counts: str  # key of the recipe with the set of cluster counts
    counts_stage: str  # the stage that is computed once per count and divides the frames of its upstream stage
    path_keys: tuple[str, ...]  # last part of the keys of the recipe whose value may be a path
    proxies: tuple[ProxyColumn, ...]  # in the order of the tables
    proxies_caption: tuple[str, ...]  # sentences


P_TAPT = SweptMethod(
    name="ptapt",
    label="P-TAPT",
    counts="cluster.counts",
    counts_stage="cluster",
    path_keys=("checkpoint",),
    proxies=(
        ProxyColumn("purity", "Purity"),
        ProxyColumn("nmi", "NMI"),
        ProxyColumn("inertia", "Inertia a frame", decimals=2),
        ProxyColumn("entropy_share", "Entropy share"),
        ProxyColumn("ptapt_loss_share", "P-TAPT loss share", per_count=False),
    ),
    proxies_caption=(
        "Purity and normalised mutual information (NMI): of the clusters of frames with the labels of their utterances; entropy share: "
        "entropy of cluster use over ln k; P-TAPT loss share: final loss over that of a uniform guess.",
        "None of them compares sets of different k as it stands: purity grows with k (NMI too, where a cluster has few frames), "
        "inertia falls, and more clusters are harder to predict; a rank correlation over sets of different k is one with k too.",
    ),
)


def stage_proxies(stage: str, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The proxies in the metrics of a finished stage: `{"k": {"16": {...}}}` of k-means, `{"ptapt_loss": ...}` of P-TAPT, else `{}`.

    Inertia is per frame; `entropy_share` and `ptapt_loss_share` are 1 for a uniform distribution.
    """
    if stage == "cluster":
        k = int(settings["k"])
        found: dict[str, float] = {}
        if metrics.get("frames") and "inertia" in metrics:
            found["inertia"] = float(metrics["inertia"]) / float(metrics["frames"])
        if "entropy" in metrics:
            found |= {"entropy": float(metrics["entropy"]), "entropy_share": float(metrics["entropy"]) / math.log(k)}
        if "empty_clusters" in metrics:
            found["empty_clusters"] = int(metrics["empty_clusters"])
        return {"k": {str(k): found}}
    if stage == "ptapt" and "training_loss" in metrics:
        loss, uniform = float(metrics["training_loss"]), sum(math.log(k) for k in settings["counts"])
        return {"ptapt_loss": loss, "ptapt_loss_share": loss / uniform if uniform else 0.0}
    return {}
