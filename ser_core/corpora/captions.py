"""What the captions of tables must state of a corpus: folds that share speakers, and speakers that are not known. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ser_core.corpora.manifest import Manifest


def caption_sentences(manifest: Manifest) -> tuple[str, ...]:
    """One sentence if training and test parts share speakers, by `source.shared_speakers` of the manifest; one if some are not known.

    A corpus without labels, on which nothing is trained, has none.
    """
    sentences = []
    shared = manifest.source.get("shared_speakers")
    if isinstance(shared, dict) and any(shared.values()):
        numbers = sorted({int(number) for number in shared.values()})
        most = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        speakers = len({utterance.speaker for utterance in manifest.utterances} - {""})
        sentences.append(
            f"The folds of {manifest.corpus} share speakers (in the training and the test part of a fold: {most} of {speakers}), "
            "so the figures are not those for unknown speakers."
        )
    unknown = sum(not utterance.speaker for utterance in manifest.utterances)
    if manifest.source.get("benchmark") and unknown:
        sentences.append(
            f"Recordings of {manifest.corpus} whose speaker is not known: {unknown} of {len(manifest.utterances)}; "
            "training and test part may share some."
        )
    return tuple(sentences)
