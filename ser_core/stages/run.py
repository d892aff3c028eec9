"""Run one stage: restrict the corpus to the split that the stage may read, set up the process group, and call the stage's function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch

from ser_core.corpora.manifest import Manifest, Utterance, load_manifest
from ser_core.corpora.parts import part
from ser_core.corpora.scripts import scripts_apart
from ser_core.corpora.subsets import subset
from ser_core.corpora.two_corpora import relabelled, source_split
from ser_core.corpora.validation import training_and_validation
from ser_core.errors import InputError
from ser_core.parallel.group import process_group
from ser_core.parallel.team import Alone
from ser_core.registry import MEASUREMENTS, StageArguments
from ser_core.settings.execution import Attention, Precision
from ser_core.settings.recipe import Protocol
from ser_core.stages import cluster, concat, cross, finetune, late_fusion, pretraining_loss, ptapt, source, states, tapt, text
from ser_core.stages.context import StageContext, seed_global_generators
from ser_core.training.device import deterministic, keep_freed_memory
from ser_core.training.splits import Split
from ser_core.two_stages import load_source

TESTED: Mapping[str, Callable[[StageContext, Callable[[], Split]], dict[str, Any]]] = {
    "text": text.run,
    "score": late_fusion.run,
    "concat": concat.run,
    "cross": cross.run,
}
WITHOUT_TEST: Mapping[str, Callable[[StageContext], dict[str, Any]]] = {
    "source": source.run,
    "states": states.run,
    "cluster": cluster.run,
    "tapt": tapt.run,
    "ptapt": ptapt.run,
    "pretraining_loss": pretraining_loss.run,
}


def run_stage(stage: str, **arguments: Unpack[StageArguments]) -> dict[str, Any]:
    """Compute one stage; arguments, result and errors as in `SpeechRegistry.run`. In a team only the leader reports and writes.

    The test split is passed to `finetune` and the stages `TESTED` only, as a function that they call after training. If the settings
    contain `validation`, it is the validation utterances, and the held-out fold is not opened. A measurement reads the whole corpus.
    """
    manifest = load_manifest(arguments["corpus"])
    settings = arguments["settings"]
    _require_transcripts(manifest, settings)
    if settings.get("protocol") == Protocol.scripts_disjoint.name:
        manifest = scripts_apart(manifest, arguments["fold"])
    stages = settings.get("two_stage", {})
    manifest = relabelled(manifest, stages.get("labels", {}))
    read = settings.get("corpus") or stages.get("corpus")
    other = relabelled(load_source(arguments["runtime"]["source_corpus"], read["digest"]), read["labels"]) if read else None
    training: tuple[Utterance, ...]
    tested: Callable[[], tuple[Utterance, ...]]
    if other is not None and stage == "source":
        manifest = other
        training, tested = source_split(other, read["part"], read["left_out"])[0], lambda: ()
    else:
        training, tested = _splits(manifest, stage, arguments["fold"], settings)
    target = stages.get("target", "")

    def open_source() -> Split | None:
        """The source part of the held-out fold, or the left-out speakers of the source corpus; None if there is no such split."""
        if other is not None:
            return Split(other, source_split(other, read["part"], read["left_out"])[1]) if read["left_out"] else None
        return Split(manifest, part(tested(), stages["source"]))

    team = arguments.get("team") or Alone()
    arguments["output"].mkdir(parents=True, exist_ok=True)
    context = StageContext(
        stage=stage,
        settings=arguments["settings"],
        runtime=arguments["runtime"],
        training=Split(manifest, training),
        corpus_digest=manifest.digest,
        fold=arguments["fold"],
        seed=arguments["seed"],
        upstream=arguments["upstream"],
        output=arguments["output"],
        checkpoint=arguments["checkpoint"],
        relief=arguments["relief"],
        should_stop=arguments["should_stop"],
        attempt=arguments.get("attempt", 0),
        superseded=arguments.get("superseded", lambda: False),
        report=arguments["report"] if team.rank == 0 else lambda line: None,
        team=team,
        shared=arguments.get("shared"),
    )
    threads = context.runtime.get("threads")
    if context.device.type == "cpu" and context.execution.attention is not Attention.eager:  # eager: the authors' computation unchanged
        keep_freed_memory()
    with deterministic(context.device, int(threads) if threads else None):
        seed_global_generators(context.seed)
        if stage not in ("finetune", *TESTED, *WITHOUT_TEST):
            raise InputError(f"no stage {stage!r}; known are {', '.join(('finetune', *TESTED, *WITHOUT_TEST))}")
        with process_group(team, context.device, context.execution.communication_minutes * 60) as group:
            context = dataclasses.replace(context, group=group)
            if stage == "finetune":
                result = finetune.run(context, lambda: Split(manifest, part(tested(), target)), open_source, stages.get("freeze", ()))
            elif stage in TESTED:
                result = TESTED[stage](context, lambda: Split(manifest, tested()))
            else:
                result = WITHOUT_TEST[stage](context)
            if read:  # it was read meanwhile
                load_source(arguments["runtime"]["source_corpus"], read["digest"])
            return {**result, "arithmetic": _arithmetic(context)}


def _require_transcripts(manifest: Manifest, settings: Mapping[str, Any]) -> None:
    """Raise InputError if a stage that reads transcripts was planned with others."""
    if "text" in settings and settings["text"]["transcripts"] != manifest.text_digest:
        raise InputError(f"{manifest.corpus}: prepared with other transcripts since the launch; launch again")


def _arithmetic(context: StageContext) -> dict[str, str]:
    """Device and precision that the stage was computed with. k-means has no precision to choose: float32."""
    chosen = context.settings.get(context.stage, {}).get("precision")
    dtype = context.arithmetic(Precision[chosen]).dtype if chosen else torch.float32
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    return {"device": device, "precision": str(dtype).removeprefix("torch.")}


def _splits(
    manifest: Manifest, stage: str, fold: str, settings: Mapping[str, Any]
) -> tuple[tuple[Utterance, ...], Callable[[], tuple[Utterance, ...]]]:
    """Return the training utterances (of `training_fraction` only a part), and a function that returns the test utterances of all parts.

    With `part`, or `two_stage` of `finetune`, only the utterances of one part of the corpus are trained on.
    A measurement gets all utterances, and none to test on.
    Raises InputError if there are no training utterances or, with `validation`, no validation utterances.
    """
    if stage in MEASUREMENTS:
        return manifest.utterances, lambda: ()
    pattern = str(settings.get("part") or settings.get("two_stage", {}).get("target", ""))
    if "validation" in settings:
        reachable, held = training_and_validation(manifest, fold, settings["validation"])
        return subset(manifest, fold, part(reachable, pattern), settings.get("training_fraction", 1)), lambda: held
    training = manifest.training(fold)
    if not training:
        raise InputError(f"{manifest.corpus}: no utterances to train on when fold {fold!r} is held out")
    return subset(manifest, fold, part(training, pattern), settings.get("training_fraction", 1)), lambda: manifest.test(fold)
