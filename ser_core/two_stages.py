"""Two stages of fine-tuning in a recipe: what of the settings is in keys, what a launch enters, and checks against both corpora.

Does not import torch: every launch makes these checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ser_core.corpora.lines import how_to_prepare
from ser_core.corpora.manifest import DIMENSIONS, MANIFEST_NAME, Manifest, load_manifest
from ser_core.corpora.two_corpora import (
    class_problems,
    label_problems,
    left_out_speakers,
    recording_problems,
    relabelled,
    shared_speakers,
    source_split,
    unknown_speaker,
)
from ser_core.errors import InputError
from ser_core.settings.finetune import Adaptor, FinetuneSettings
from ser_core.settings.recipe import Recipe
from ser_core.settings.two_stage import SharedSpeakers, TrainedPart, TwoStageSettings

SECTION = "recipe.two_stage"
WHOLE = "all"  # fold of a first stage that is the same for all folds


def two_stage_key(settings: TwoStageSettings, fold: str) -> dict[str, Any]:
    """Return what is in the key of `finetune` on a fold; {} for one stage on the whole corpus."""
    if not settings.active:
        return {}
    found: dict[str, Any] = {"source": settings.source, "target": settings.target}
    if settings.corpus:
        found["corpus"] = source_key(settings, fold)
    if settings.target_labels:
        found["labels"] = dict(settings.target_labels)
    if settings.freeze:
        found["freeze"] = sorted(each.name for each in settings.freeze)
    return found


def source_key(settings: TwoStageSettings, fold: str) -> dict[str, Any]:
    """Return what the first stage reads of another corpus: its digest, the label map, the part, speakers that are left out."""
    left_out = list(settings.left_out.get(fold, []))
    return {"digest": settings.digest, "labels": dict(settings.source_labels), "part": settings.source, "left_out": left_out}


def enter_source(settings: TwoStageSettings, target: Path) -> None:
    """Enter folder, digest and left-out speakers of the source corpus, which lies beside the folder `target` of the experiment's corpus.

    Raises InputError if it is not prepared.
    """
    if not settings.corpus:
        return
    folder = target.parent / settings.corpus
    if not (folder / MANIFEST_NAME).is_file():
        raise InputError(f"{SECTION}.corpus={settings.corpus}: not prepared (no {folder}): {how_to_prepare(settings.corpus)}")
    source = load_manifest(folder)
    same = settings.shared_speakers is SharedSpeakers.same
    settings.folder, settings.digest = str(folder.absolute()), source.digest
    settings.left_out = left_out_speakers(source, load_manifest(target)) if same else {}


def load_source(folder: str, planned: str) -> Manifest:
    """Read the source corpus. Raises InputError if it is not the one that was planned with, by its digest."""
    found = load_manifest(Path(folder))
    if found.digest != planned:
        raise InputError(
            f"{SECTION}.corpus: {found.corpus} in {folder} was prepared again since the launch (digest {found.digest[:12]}, at launch "
            f"{planned[:12]}); launch again, or prepare the former one again"
        )
    return found


def second_stage_problems(settings: TwoStageSettings, finetune: FinetuneSettings) -> Iterator[str]:
    """Yield one line for a learning rate of the second stage, and one for a list of frozen parts, that it cannot follow."""
    rate = settings.learning_rate
    if rate is not None and not rate > 0:
        yield f"{SECTION}.learning_rate={rate}: must be above 0"
    elif rate is not None and not (settings.source or settings.corpus):
        yield f"{SECTION}.learning_rate={rate}: there is no first stage; leave it out, or name {SECTION}.source or corpus"
    if not settings.freeze:
        return
    names = [each.name for each in settings.freeze]
    kinds = [kind.name for kind in finetune.adaptors.kinds if kind is not Adaptor.head]
    trained = [TrainedPart.head.name, *(kinds if finetune.adaptors.kinds else [TrainedPart.transformer.name])]
    key = f"{SECTION}.freeze={names}"
    if not (settings.source or settings.corpus):
        yield f"{key}: there is no first stage; leave it out, or name {SECTION}.source or corpus"
    elif absent := [name for name in names if name not in trained]:
        yield f"{key}: {absent[0]} is not trained by the first stage, which trains {', '.join(trained)}"
    elif set(trained) <= set(names):
        yield f"{key}: nothing is left to train in the second stage; it can freeze some of {', '.join(trained)}"


def corpora_problems(recipe: Recipe, target: Manifest, folds: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield one line per reason why the source corpus and the label maps do not fit the experiment's corpus.

    `folds`: held-out fold -> the validation speakers of a sweep, else ().
    """
    settings = recipe.two_stage
    if any(folds.values()):
        yield f"{SECTION}: a sweep trains on one corpus and its labels; leave corpus and label maps out"
        return
    found = list(label_problems(f"{SECTION}.target_labels", settings.target_labels, target))
    if not settings.corpus:
        yield from found
        return
    try:
        source = load_source(settings.folder, settings.digest)
    except InputError as error:
        yield str(error)
        return
    found += label_problems(f"{SECTION}.source_labels", settings.source_labels, source)
    found += recording_problems(source, target)
    found += _speaker_problems(settings, source, target)
    if found:
        yield from found
        return
    common = relabelled(source, settings.source_labels)
    yield from class_problems(common, relabelled(target, settings.target_labels))
    for left_out in sorted({tuple(settings.left_out.get(fold, ())) for fold in folds}):
        yield from _training_problems(recipe, common, left_out)


def _speaker_problems(settings: TwoStageSettings, source: Manifest, target: Manifest) -> Iterator[str]:
    key = f"{SECTION}.shared_speakers={settings.shared_speakers.name}"
    if settings.shared_speakers is SharedSpeakers.different:
        return
    if unknown := unknown_speaker(source, target):
        yield f"{key}: the speaker of {unknown} is not known; set it to different if the corpora have no speaker in common"
    elif settings.shared_speakers is SharedSpeakers.refuse and (shared := shared_speakers(source, target)):
        yield (
            f"{key}: {source.corpus} and {target.corpus} both have a speaker {shared[0]!r}; set it to same (the first stage leaves out "
            "the speakers of the held-out fold), or to different if these are different persons"
        )


def _training_problems(recipe: Recipe, source: Manifest, left_out: Sequence[str]) -> Iterator[str]:
    """Yield a line if the part that the first stage trains on lacks a class or attributes, or is smaller than a batch."""
    training, _ = source_split(source, recipe.two_stage.source, left_out)
    where = f"{SECTION}: {source.corpus}" + (f" without the speakers {', '.join(left_out)}" if left_out else "")
    missing = sorted(set(source.classes) - {each.label for each in training})
    if missing:
        yield f"{where}: no utterance of class {missing[0]!r} to train on in the first stage"
    elif recipe.finetune.batch_size > len(training):
        yield f"{where}: recipe.finetune.batch_size={recipe.finetune.batch_size} is more than the number of its utterances, {len(training)}"
    elif recipe.finetune.attributes.weight and sum(each.dimensions is not None for each in training) < 2:
        yield f"{where}: recipe.finetune.attributes.weight is set, but its utterances have no {', '.join(DIMENSIONS)}"
