"""Two corpora in one experiment: labels mapped to common ones, speakers that both corpora have. Imports no third-party library.

A label map has every label of its corpus: the common label, or None for utterances that are left out. An empty map changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ser_core.corpora.manifest import Manifest, Utterance, natural_order
from ser_core.corpora.parts import part

LabelMap = Mapping[str, str | None]


def relabelled(manifest: Manifest, labels: LabelMap) -> Manifest:
    """Return the manifest with common labels, without the utterances whose label is mapped to None; its digest stays that of the corpus."""
    if not labels:
        return manifest
    found = tuple(replace(each, label=common) for each in manifest.utterances if (common := labels[each.label]) is not None)
    return replace(manifest, utterances=found, classes=tuple(sorted({each.label for each in found})))


def label_problems(key: str, labels: LabelMap, manifest: Manifest) -> Iterator[str]:
    """Yield one line for a label that the corpus lacks, and one for a label of the corpus that the map lacks. `key`: of the map."""
    if unknown := sorted(set(labels) - set(manifest.classes)):
        yield f"{key}: {manifest.corpus} has no label {unknown[0]!r}; it has {', '.join(manifest.classes)}"
    elif labels and (missing := sorted(set(manifest.classes) - set(labels))):
        yield f"{key}: label {missing[0]!r} of {manifest.corpus} is not in the map; map it to a common label, or to null (left out)"
    elif labels and not any(labels.values()):
        yield f"{key}: every label of {manifest.corpus} is left out; name a common label"


def class_problems(source: Manifest, target: Manifest) -> Iterator[str]:
    """Yield one line per corpus that lacks a class of the other one. The labels are the common ones."""
    for own, other in ((source, target), (target, source)):
        if missing := sorted(set(other.classes) - set(own.classes)):
            yield (
                f"recipe.two_stage: no utterance of {own.corpus} has the common label {missing[0]!r}, which {other.corpus} has; "
                "map it to a label of both (source_labels, target_labels), or to null"
            )


def recording_problems(source: Manifest, target: Manifest) -> Iterator[str]:
    """Yield one line if the corpora have a recording in common, by its samples."""
    known = {each.audio_digest: each.id for each in source.utterances if each.audio_digest}
    shared = next((each for each in target.utterances if each.audio_digest in known), None)
    if source.digest == target.digest or shared is not None:
        same = "are the same corpus" if shared is None else f"have the recording {shared.id} in common"
        yield (
            f"recipe.two_stage.corpus={source.corpus}: {source.corpus} and {target.corpus} {same}; "
            "for two parts of one corpus use recipe.two_stage.source and target without corpus"
        )


def shared_speakers(source: Manifest, target: Manifest) -> tuple[str, ...]:
    """Return the speaker names that both corpora have, in natural order."""
    names = {each.speaker for each in source.utterances if each.speaker} & {each.speaker for each in target.utterances}
    return tuple(sorted(names, key=natural_order))


def unknown_speaker(*manifests: Manifest) -> str:
    """Return `UTTERANCE of CORPUS` for the first utterance without a speaker; "" if all have one."""
    return next((f"{each.id} of {found.corpus}" for found in manifests for each in found.utterances if not each.speaker), "")


def left_out_speakers(source: Manifest, target: Manifest) -> dict[str, list[str]]:
    """Return fold of the target corpus -> speakers of it that the source corpus has too; only folds that have such speakers."""
    shared = set(shared_speakers(source, target))
    found = {fold: sorted(shared & {each.speaker for each in target.test(fold)}, key=natural_order) for fold in target.folds}
    return {fold: speakers for fold, speakers in found.items() if speakers}


def source_split(source: Manifest, pattern: str, left_out: Sequence[str]) -> tuple[tuple[Utterance, ...], tuple[Utterance, ...]]:
    """Return the utterances of the part `pattern` that the first stage trains on, and those of the speakers that it leaves out."""
    chosen, speakers = part(source.utterances, pattern), frozenset(left_out)
    return tuple(u for u in chosen if u.speaker not in speakers), tuple(u for u in chosen if u.speaker in speakers)
