"""One stage from the corpus folder to its result: builds the view of the corpus that the stage may have, and calls its function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from ser_core.corpora.manifest import Manifest, Utterance, load_manifest
from ser_core.corpora.validation import divide
from ser_core.errors import InputError
from ser_core.parallel.group import process_group
from ser_core.parallel.team import Alone
from ser_core.settings import Attention
from ser_core.stages import cluster, finetune, ptapt, states, tapt
from ser_core.stages.context import StageContext, StageInputs, seed_bystanders
from ser_core.training.device import keep_memory, repeatable
from ser_core.training.splits import Split

PRETRAINING: Mapping[str, Callable[[StageContext], dict[str, Any]]] = {
    "states": states.run,
    "cluster": cluster.run,
    "tapt": tapt.run,
    "ptapt": ptapt.run,
}


def run_stage(stage: str, **inputs: Unpack[StageInputs]) -> dict[str, Any]:
    """Compute one stage; see `ser_core.registry`. Of a team, the leader alone reports and writes.

    What a model is tested on leaves this function in one direction only: to `finetune`, as a function to call when training is over. With
    `validation` among the settings that is what they keep out of training, and the held-out fold is left alone.
    """
    settings, runtime, fold, seed, output = (inputs["settings"], inputs["runtime"], inputs["fold"], inputs["seed"], inputs["output"])
    manifest = load_manifest(inputs["corpus"])
    training, tested = _splits(manifest, fold, settings)
    team = inputs.get("team") or Alone()
    output.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        stage=stage,
        settings=settings,
        runtime=runtime,
        training=Split(manifest, training),
        corpus_digest=manifest.digest,
        fold=fold,
        seed=seed,
        upstream=inputs["upstream"],
        output=output,
        checkpoint=inputs["checkpoint"],
        relief=inputs["relief"],
        should_stop=inputs["should_stop"],
        report=inputs["report"] if team.rank == 0 else lambda line: None,
        team=team,
        shared=inputs.get("shared"),
    )
    threads = runtime.get("threads")
    if context.device.type == "cpu" and context.execution.attention is not Attention.eager:  # eager: as the authors compute
        keep_memory()
    with repeatable(context.device, int(threads) if threads else None):
        seed_bystanders(seed)
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
        training, held = divide(manifest, fold, settings["validation"])
        return training, lambda: held
    training = manifest.training(fold)
    if not training:
        raise InputError(f"{manifest.corpus}: no utterances to train on when fold {fold!r} is held out")
    return training, lambda: manifest.test(fold)
