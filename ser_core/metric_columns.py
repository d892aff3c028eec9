"""Metrics of results that tables show beside the accuracies, as columns: CCC of attributes, UA of parts of the held-out fold."""

from __future__ import annotations

from dataclasses import dataclass

from ser_core.corpora.manifest import DIMENSIONS
from ser_core.corpora.scripts import KINDS


@dataclass(frozen=True)
class MetricColumn:
    """A metric of results as a column of tables."""

    name: str  # in the metrics of a result (ser_core/training/attributes.py)
    heading: str
    decimals: int
    meaning: str  # a sentence for captions


@dataclass(frozen=True)
class Adaptation:
    """Two stages as tables show them: the source, and the metric with the UA on the target after the first stage."""

    source: str
    before: str = "ua_target_before"
    factor: float = 100.0  # from that metric to percent


_CCC = (
    "CCC: concordance correlation coefficient of an attribute over all utterances of the held-out fold that have it, 1: agreement, "
    "0: that of a constant prediction."
)
ATTRIBUTE_METRICS = (
    *(MetricColumn(f"ccc_{name}", f"CCC {name}", 3, _CCC) for name in DIMENSIONS),
    MetricColumn("ccc", "CCC, mean", 3, _CCC),
)
_STAGES = (
    "Source, target: UA (0 to 1) on the source and the target of the held-out fold (parts of the corpus, or its speakers in both corpora), "
    "after the first and the second stage."
)
STAGE_METRICS = (
    MetricColumn("ua_source_before", "source, first", 3, _STAGES),
    MetricColumn("ua_source", "source, second", 3, _STAGES),
    MetricColumn("ua_target_before", "target, first", 3, _STAGES),
    MetricColumn("ua", "target, second", 3, _STAGES),
)
TARGET_METRICS = STAGE_METRICS[2:]  # no speaker of the source corpus is held out

_FUSED = "UA audio, UA text: unweighted accuracy (1: all correct) of the two runs that a fusion has read."
FUSION_METRICS = tuple(MetricColumn(f"ua_{role}", f"UA {role}", 3, _FUSED) for role in ("audio", "text"))
_APART = (
    "UA scripted, UA improvised: unweighted accuracy (1: all correct) of the scripted and of the improvised turns of the held-out fold, "
    "where names of turns tell them apart, as those of IEMOCAP do."
)
KIND_METRICS = tuple(MetricColumn(f"ua_{kind}", f"UA {kind}", 3, _APART) for kind in KINDS)
