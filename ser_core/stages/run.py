"""One stage from the corpus folder to its result: builds the view of the corpus that the stage may have, and calls its function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ser_core.corpora.manifest import Manifest, Utterance, load_manifest
from ser_core.corpora.validation import training_and_validation
from ser_core.errors import InputError
from ser_core.parallel.group import process_group
from ser_core.parallel.team import Alone, Team
from ser_core.settings import Attention
from ser_core.stages import cluster, finetune, ptapt, states, tapt
from ser_core.stages.context import StageContext, seed_global_generators
from ser_core.training.device import keep_memory, repeatable
from ser_core.training.splits import Split

PRETRAINING: Mapping[str, Callable[[StageContext], dict[str, Any]]] = {
    "states": states.run,
    "cluster": cluster.run,
    "tapt": tapt.run,
    "ptapt": ptapt.run,
}


def run_stage(
    stage: str,
    *,
    settings: Mapping[str, Any],
    runtime: Mapping[str, Any],
    corpus: Path,
    fold: str,
    seed: int,
    upstream: Mapping[str, Path],
    output: Path,
    checkpoint: Path,
    relief: int,
    should_stop: Callable[[], bool],
    report: Callable[[str], None],
    team: Team | None = None,
    shared: Path | None = None,
) -> dict[str, Any]:
    """Compute one stage; see `ser_core.registry`. Of a team, the leader alone reports and writes.

    What a model is tested on leaves this function in one direction only: to `finetune`, as a function to call when training is over. With
    `validation` among the settings that is what they keep out of training, and the held-out fold is left alone.
    """
    manifest = load_manifest(corpus)
    training, tested = _splits(manifest, fold, settings)
    team = team or Alone()
    output.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        stage=stage,
        settings=settings,
        runtime=runtime,
        training=Split(manifest, training),
        corpus_digest=manifest.digest,
        fold=fold,
        seed=seed,
        upstream=upstream,
        output=output,
        checkpoint=checkpoint,
        relief=relief,
        should_stop=should_stop,
        report=report if team.rank == 0 else lambda line: None,
        team=team,
        shared=shared,
    )
    threads = runtime.get("threads")
    if context.device.type == "cpu" and context.execution.attention is not Attention.eager:  # eager: as the authors compute
        keep_memory()
    with repeatable(context.device, int(threads) if threads else None):
        seed_global_generators(seed)
        if stage != "finetune" and stage not in PRETRAINING:
            raise InputError(f"no stage {stage!r}; known are finetune, {', '.join(PRETRAINING)}")
        with process_group(team, context.device, context.execution.communication_minutes * 60) as group:
            context = dataclasses.replace(context, group=group)
            if stage == "finetune":
                return finetune.run(context, lambda: Split(manifest, tested()))
            return PRETRAINING[stage](context)


def _splits(
    manifest: Manifest, fold: str, settings: Mapping[str, Any]
) -> tuple[tuple[Utterance, ...], Callable[[], tuple[Utterance, ...]]]:
    """Utterances to train on, and how those to test on are had. Raises InputError where there is nothing to train on."""
    if "validation" in settings:
        training, held = training_and_validation(manifest, fold, settings["validation"])
        return training, lambda: held
    training = manifest.training(fold)
    if not training:
        raise InputError(f"{manifest.corpus}: no utterances to train on when fold {fold!r} is held out")
    return training, lambda: manifest.test(fold)
