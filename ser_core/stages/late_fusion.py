"""Score fusion of a finished audio run and a finished text run: weighted mean of their log-probabilities. Trains nothing.

Reads the artifacts `predictions.csv` of both runs, which have the same fold and seed, and their curves; no audio and no transcript. The
weight is that of the recipe: it is fitted to nothing. Artifact: `predictions.csv`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ser_core.errors import InputError
from ser_core.stages.context import StageContext
from ser_core.training.curves import FILE as CURVES
from ser_core.training.divergence import divergence_reason
from ser_core.training.evaluate import PREDICTIONS, score, score_kinds, write_predictions
from ser_core.training.splits import Split

LEAST = 1e-7  # of a probability: predictions have six decimals
ROLES = ("audio", "text")


def run(context: StageContext, open_test: Callable[[], Split]) -> dict[str, Any]:
    """Fuse and score. `diverged` is the reason of the audio run.

    A text run at the loss of the class prior does not count: transcripts may say nothing of the class, and then the audio run decides.
    """
    weight = float(context.settings["score"]["text_weight"])
    test = open_test()
    audio, text = (run_log_probabilities(context, role, test) for role in ROLES)
    logits = ((1 - weight) * audio + weight * text).astype(np.float32)
    found = score(logits, test)
    write_predictions(context.output / PREDICTIONS, logits, test)
    return {
        "metrics": {
            "ua": found.ua,
            "wa": found.wa,
            "macro_f1": found.macro_f1,
            **score_kinds(logits, test),
            **role_scores(context, test),
            "test_utterances": len(test),
        },
        "durations": {},
        "confusion": [list(row) for row in found.confusion],
        "classes": list(test.classes),
        "diverged": audio_divergence(context),
    }


def role_scores(context: StageContext, test: Split) -> dict[str, float]:
    """Return the UA (fraction) of the two runs that are fused, `ua_audio` and `ua_text`."""
    return {f"ua_{role}": score(run_log_probabilities(context, role, test).astype(np.float32), test).ua for role in ROLES}


def audio_divergence(context: StageContext) -> str:
    """Return why the training of the audio run counts as diverged, "" if it does not."""
    reason = curve_divergence(context.upstream["audio"] / CURVES)
    return f"audio run: {reason}" if reason else ""


def run_log_probabilities(context: StageContext, role: str, test: Split) -> NDArray[np.float64]:
    """Return `log_probabilities` of the run in a role."""
    return log_probabilities(context.upstream[role] / PREDICTIONS, test)


def log_probabilities(path: Path, split: Split) -> NDArray[np.float64]:
    """Return the log-probabilities (utterances, classes) of a run's predictions, in the order of the split.

    Raises InputError for predictions of other utterances or classes.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    columns = [f"p_{name}" for name in split.classes]
    ids = [utterance.id for utterance in split.utterances]
    if set(rows) != set(ids) or any(column not in row for row in rows.values() for column in columns):
        raise InputError(f"{path}: predictions of other utterances or classes than those of the test part; launch again")
    values = np.array([[float(rows[name][column]) for column in columns] for name in ids])
    found: NDArray[np.float64] = np.log(np.maximum(values, LEAST))
    return found


def curve_divergence(path: Path) -> str:
    """Return why a run counts as diverged, by the last tenth of its curve of the loss; "" if it does not, or has no such curve."""
    if not path.is_file():
        return ""
    stored = json.loads(path.read_text(encoding="utf-8"))
    points, reference = stored["curves"].get("train/loss", []), stored["references"].get("train/loss")
    if not points or reference is None:
        return ""
    last = points[-1][0]
    return divergence_reason(fmean(loss for step, loss in points if step >= 0.9 * last), reference[0])
