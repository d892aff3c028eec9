"""The first of two stages of fine-tuning: a classifier trained on the source part of a corpus (`recipe.two_stage`), one for a fold.

Artifact: `classifier/`, every trained weight (transformer or adaptors, and head), from which `finetune` starts.
"""

from __future__ import annotations

from typing import Any

from ser_core.models.adaptor_files import save_adaptors
from ser_core.settings.finetune import FinetuneSettings
from ser_core.stages.context import StageContext, parse_settings, stage_result
from ser_core.stages.finetune import CLASSIFIER, facts_of, fit


def run(context: StageContext) -> dict[str, Any]:
    """Train and save. A training that diverged is reported; the runs that start from it are judged by their own losses."""
    fitted = fit(context, parse_settings(FinetuneSettings, context.settings["source"]))
    if context.group.is_leader:
        save_adaptors(fitted.model, context.output / CLASSIFIER, facts_of(fitted, context))
    metrics = {"training_utterances": len(context.training), "prior_loss": fitted.prior}
    result = stage_result(fitted.trained, metrics)
    if fitted.alone:
        del result["metrics"]["training_accuracy"]
    result["durations"] |= {"front_end": fitted.front_end}
    return result
