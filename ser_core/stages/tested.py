"""The result of a stage that trains a classifier and tests it on the held-out fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ser_core.stages.context import stage_result
from ser_core.training.evaluate import score, score_kinds
from ser_core.training.loop import TrainingResult
from ser_core.training.splits import Split


def tested_result(
    trained: TrainingResult,
    logits: NDArray[np.float32],
    training: Split,
    test: Split,
    *,
    parameters: tuple[int, int],
    prior: float,
    diverged: str,
    further: Mapping[str, float],
) -> dict[str, Any]:
    """Return the result with the scores of the test split; the caller adds durations.

    `logits`: (test utterances, classes). `parameters`: trained and all. `prior`: training loss of the best constant prediction. `diverged`:
    the reason, "" if the training did not diverge. `further`: metrics beside those of every classifier.
    """
    found = score(logits, test)
    metrics = {
        "ua": found.ua,
        "wa": found.wa,
        "macro_f1": found.macro_f1,
        **score_kinds(logits, test),
        **further,
        "trained_parameters": parameters[0],
        "parameters": parameters[1],
        "test_utterances": len(test),
        "training_utterances": len(training),
        "prior_loss": prior,
    }
    confusion = [list(row) for row in found.confusion]
    return stage_result(trained, metrics, diverged=diverged, confusion=confusion, classes=list(training.classes))
