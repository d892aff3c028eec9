"""Checks of a recipe against a corpus before anything is computed: batches and cluster counts must fit the training part of every fold.

Does not import torch: every launch makes these checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ser_core.corpora.manifest import DIMENSIONS, Manifest, Utterance
from ser_core.corpora.parts import part
from ser_core.corpora.scripts import scripts_apart
from ser_core.corpora.subsets import subset
from ser_core.corpora.two_corpora import relabelled
from ser_core.corpora.validation import training_and_validation
from ser_core.errors import InputError
from ser_core.models.shapes import expected_shape, state_count
from ser_core.settings.backbone import Wav2vecSettings
from ser_core.settings.finetune import Adaptor, AdaptorSettings, FinetuneSettings
from ser_core.settings.recipe import Protocol, Recipe
from ser_core.two_stages import corpora_problems

# Projections that LoRA can be added to (`ser_core.models.adaptors.PROJECTIONS`).
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense")


def adaptor_problems(settings: AdaptorSettings) -> Iterator[str]:
    """Yield one line per value of `finetune.adaptors` that names no set of adaptors."""
    section = "recipe.finetune.adaptors"
    names = [kind.name for kind in settings.kinds]
    if len(set(names)) != len(names):
        yield f"{section}.kinds={names}: name each adaptor once"
    if Adaptor.head in settings.kinds and len(names) > 1:
        yield f"{section}.kinds={names}: head trains nothing but the head; leave it out, the head trains with every adaptor"
    unknown = [name for name in settings.lora_targets if name not in PROJECTIONS]
    if unknown:
        yield f"{section}.lora_targets={settings.lora_targets}: {', '.join(unknown)} unknown; known are {', '.join(PROJECTIONS)}"
    elif not settings.lora_targets or len(set(settings.lora_targets)) != len(settings.lora_targets):
        yield f"{section}.lora_targets={settings.lora_targets}: name at least one projection, each once"


def export_problem(settings: AdaptorSettings, model_type: str, *, merged: bool) -> str:
    """Return the line for adaptors that cannot be exported in peft's format, or merged into the base model; "" if they can.

    peft replaces a projection by a module of its own, but WavLM's attention reads the weights of its projections and calls none of them,
    so that peft would compute the base model.
    """
    kinds = {kind.name for kind in settings.kinds}
    if "lora" not in kinds:
        return f"this run trained {', '.join(sorted(kinds))} and no LoRA: neither peft's format nor the base model can hold that"
    if others := [name for name in ("ba", "wg") if name in kinds]:
        return f"this run has {' and '.join(others)} beside LoRA: neither peft's format nor the base model can hold that"
    attention = [name for name in settings.lora_targets if name.endswith("_proj")]
    if not merged and model_type == "wavlm" and attention:
        return f"LoRA on {', '.join(attention)} of WavLM has no effect in peft, as its attention does not call them; use --merge"
    return ""


def trained_on(manifest: Manifest, fold: str, validation: Sequence[str]) -> tuple[Utterance, ...]:
    """Return the training utterances if `fold` is held out, without those of the `validation` speakers of a sweep."""
    return training_and_validation(manifest, fold, validation)[0] if validation else manifest.training(fold)


def training_frames(utterances: Sequence[Utterance], wav2vec: Wav2vecSettings) -> int:
    """Return the number of emotion states of these utterances, the largest possible number of clusters.

    A wav2vec checkpoint file is not opened; it is assumed to have the layers of `wav2vec_large.pt`.
    """
    shape = expected_shape(wav2vec)
    return sum(max(1, state_count(shape, utterance.samples)) for utterance in utterances)


def held_out_for_validation(count: int, fraction: float) -> int:
    """Return how many of `count` training utterances the stage `states` validates on: at least one, and not all."""
    return min(count - 1, max(1, round(count * fraction)))


def corpus_problems(method: str, recipe: Recipe, manifest: Manifest, folds: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield one line per setting of `method` that the training part of a fold is too small for, with the fold that has the least.

    `folds`: held-out fold -> the validation speakers of a sweep, else ().
    """
    if not folds or method == "pretraining_loss":  # trains nothing
        return
    if recipe.training_fraction != 1 and any(folds.values()):
        yield f"recipe.training_fraction={recipe.training_fraction:g}: a sweep trains on all utterances; leave it out"
        return
    if recipe.protocol is Protocol.scripts_disjoint and any(folds.values()):
        yield "recipe.protocol=scripts_disjoint: a sweep trains on all scripts; leave it out"
        return
    if recipe.two_stage.corpus or recipe.two_stage.target_labels:
        problems = list(corpora_problems(recipe, manifest, folds))
        if problems:
            yield from problems
            return
        manifest = relabelled(manifest, recipe.two_stage.target_labels)
    if method in ("text", "cross") and (problem := transcripts_problem(recipe.text.transcripts, manifest)):
        yield problem
        return
    try:
        apart = recipe.protocol is Protocol.scripts_disjoint
        training = {
            fold: subset(
                manifest, fold, trained_on(scripts_apart(manifest, fold) if apart else manifest, fold, validation), recipe.training_fraction
            )
            for fold, validation in folds.items()
        }
    except InputError as error:
        yield str(error)
        return

    def least(size: Callable[[Sequence[Utterance]], int]) -> tuple[str, int]:
        return min(((fold, size(utterances)) for fold, utterances in training.items()), key=lambda item: item[1])

    fold, count = least(len)
    if not count:
        yield f"{manifest.corpus}: no utterances to train on when fold {fold!r} is held out"
        return
    if method == "text":
        yield from _batch_problem("text", recipe.text.batch_size, manifest, fold, count)
        return
    if method in ("score", "concat", "cross"):  # what their runs need is checked for the methods of these
        if recipe.two_stage.target:
            yield f"recipe.two_stage.target={recipe.two_stage.target}: not together with {method}, as text has no stages; leave one out"
        if method == "concat":
            yield from _batch_problem("fusion.layer", recipe.fusion.layer.batch_size, manifest, fold, count)
        if method == "cross":
            yield from _batch_problem("fusion.cross", recipe.fusion.cross.batch_size, manifest, fold, count)
        return
    two = recipe.two_stage
    parts = [two.target] if two.corpus or two.target_labels else [pattern for pattern in (two.source, two.target) if pattern]
    if parts:
        yield from _part_problems(recipe, parts, manifest, training, folds)
    else:
        yield from _batch_problem("finetune", recipe.finetune.batch_size, manifest, fold, count)
    yield from _attribute_problems(recipe.finetune, manifest, training, folds, parts or [""])
    if method != "ptapt":
        return
    training_part = count - held_out_for_validation(count, recipe.states.validation_fraction)
    yield from _batch_problem("states", recipe.states.batch_size, manifest, fold, training_part, " without the validation part")
    fold, frames = least(lambda utterances: training_frames(utterances, recipe.states.wav2vec))
    if (most := max(recipe.cluster.counts)) > frames:
        yield (
            f"recipe.cluster.counts={recipe.cluster.counts}: {most} clusters are more than the {frames} frames of the training part "
            f"of fold {fold!r} of {manifest.corpus}; name smaller counts"
        )


def transcripts_problem(planned: str, manifest: Manifest) -> str:
    """Return the line for a corpus without transcripts, with some missing, or with others than those planned with; "" if there is none."""
    missing = [utterance.id for utterance in manifest.utterances if utterance.text is None]
    if len(missing) == len(manifest.utterances):
        return f"{manifest.corpus}: has no transcripts, which the method text reads; prepare it with them (docs/text.md), or leave text out"
    if missing:
        count = f"{len(missing)} of {len(manifest.utterances)}"
        return f"{manifest.corpus}: utterances without a transcript: {count}, {missing[0]} first; prepare it with all of them"
    if planned != manifest.text_digest:
        return f"{manifest.corpus}: prepared with other transcripts since the launch; `grid` launches with those of now"
    return ""


def _attribute_problems(
    settings: FinetuneSettings,
    manifest: Manifest,
    training: Mapping[str, Sequence[Utterance]],
    folds: Mapping[str, Sequence[str]],
    patterns: Sequence[str],
) -> Iterator[str]:
    """Yield a line if attributes are to be trained that a fold does not have two utterances of, in training or test."""
    if not settings.attributes.weight:
        return
    section = f"recipe.finetune.attributes.weight={settings.attributes.weight:g}"
    if settings.batch_size < 2:
        yield f"{section}: 1 - CCC has no gradient in a batch of one utterance; recipe.finetune.batch_size must be at least 2"
    for fold, validation in folds.items():
        tested = part(_tested(manifest, fold, validation), patterns[-1])
        chosen = [("to train on", part(training[fold], pattern)) for pattern in patterns]
        for what, utterances in (*chosen, ("to test on", tested)):
            count = sum(utterance.dimensions is not None for utterance in utterances)
            if count < 2:
                yield (
                    f"{section}: utterances {what} in fold {fold!r} of {manifest.corpus} that have {', '.join(DIMENSIONS)}: {count}, "
                    "at least 2 are needed; prepare a corpus that has them (docs/corpora.md), or set the weight to 0"
                )
                return


def _tested(manifest: Manifest, fold: str, validation: Sequence[str]) -> tuple[Utterance, ...]:
    return training_and_validation(manifest, fold, validation)[1] if validation else manifest.test(fold)


def _part_problems(
    recipe: Recipe,
    patterns: Sequence[str],
    manifest: Manifest,
    training: Mapping[str, Sequence[Utterance]],
    folds: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """Yield a line for the first fold in which a part of the corpus is too small, or two parts share an utterance."""
    for fold, validation in folds.items():
        found = [part(training[fold], pattern) for pattern in patterns]
        shared = set.intersection(*({utterance.id for utterance in utterances} for utterances in found))
        if len(found) > 1 and shared:
            yield (
                f"recipe.two_stage: utterance {min(shared)} of {manifest.corpus} is in both parts, source={patterns[0]} and "
                f"target={patterns[1]}; choose patterns that share none"
            )
            return
        for pattern, utterances in zip(patterns, found, strict=True):
            section = f"recipe.two_stage,{f' pattern {pattern} in' if pattern else ''} fold {fold!r} of {manifest.corpus}"
            missing = set(manifest.classes) - {utterance.label for utterance in utterances}
            if missing:
                yield f"{section}: no utterance of class {min(missing)!r} to train on; choose another pattern, or folds"
                return
            if not part(_tested(manifest, fold, validation), pattern):
                yield f"{section}: no utterance to test on; choose another pattern, or folds"
                return
            size = recipe.finetune.batch_size
            if size > len(utterances):
                yield f"{section}: recipe.finetune.batch_size={size} is more than the number of its utterances, {len(utterances)}"
                return


def _batch_problem(stage: str, size: int, manifest: Manifest, fold: str, count: int, part: str = "") -> Iterator[str]:
    if size > count:
        yield (
            f"recipe.{stage}.batch_size={size}: more than the {count} training utterances of fold {fold!r} of {manifest.corpus}{part}; "
            f"at most {count}"
        )
