"""What is known of a point before anything is fine-tuned, and much cheaper: its clusters, and how well P-TAPT predicts them. Pure.

Of each k: purity and normalised mutual information of the clusters with the labels of the utterances, inertia of a frame, and the entropy
of cluster use as a share of ln k. Of the set: the means over its k, and the final loss of P-TAPT as a share of that of a uniform guess, so
that sets of different sizes compare. Means over folds, each with the same weight. `jobs.sweeps.trial` takes the values down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.statistics import mean

if TYPE_CHECKING:
    from jobs.sweeps.records import FoldRecord

OF_K = ("purity", "nmi", "inertia", "entropy_share")
OF_SET = ("ptapt_loss_share",)
NAMES = (*OF_K, *OF_SET)


@dataclass(frozen=True)
class Proxies:
    """Values by name; what is not known has none."""

    of_set: Mapping[str, float]
    of_k: Mapping[int, Mapping[str, float]]


def proxies_of(folds: Sequence[FoldRecord]) -> Proxies:
    """Of the folds that a point has done."""
    by_fold = [_of_k(fold) for fold in folds]
    counts = sorted({k for found in by_fold for k in found})
    of_set = {name: _mean(_mean(facts[name] for facts in found.values()) for found in by_fold) for name in OF_K}
    of_set |= {name: _mean(_number(fold.proxies.get(name)) for fold in folds) for name in OF_SET}
    of_k = {k: _known({name: _mean(found[k][name] for found in by_fold if k in found) for name in OF_K}) for k in counts}
    return Proxies(_known(of_set), of_k)


def _of_k(fold: FoldRecord) -> dict[int, dict[str, float | None]]:
    told = fold.proxies.get("k")
    by_k = told if isinstance(told, Mapping) else {}
    return {int(k): {name: _number(values.get(name)) for name in OF_K} for k, values in by_k.items() if isinstance(values, Mapping)}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Iterable[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
