"""Which reader reads which kind of corpus, and the options of each kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ser_core.corpora import cremad, csv_corpus, emobox, emodb, iemocap, labels, ravdess, savee, tess, unlabelled
from ser_core.corpora.recordings import SourceListing, read_expected_counts
from ser_core.errors import InputError

KINDS = ("iemocap", "savee", "emodb", "ravdess", "cremad", "tess", "emobox", "csv", "labels", "unlabelled")
NAMED_BY_USER = ("emobox", "csv", "labels", "unlabelled")  # whose corpora have names of their own
SHARED_SPEAKERS = ("emobox", "csv", "labels")  # whose folds may have a speaker in two of them
# Readers of folders whose file names tell everything, and the folds that each must find.
NAMED_FILES: Mapping[str, tuple[Callable[..., SourceListing], tuple[str, ...]]] = {
    "iemocap": (iemocap.read, iemocap.SESSIONS),
    "savee": (savee.read, savee.SPEAKERS),
    "ravdess": (ravdess.read, tuple(ravdess.FOLDS)),
    "cremad": (cremad.read, cremad.FOLDS),
    "tess": (tess.read, tess.SPEAKERS),
}


@dataclass(frozen=True)
class Options:
    """What a kind of corpus may be read with; see `ser_core.corpora.prepare.prepare`."""

    check_counts: bool = True
    four_classes: bool = False
    audio: Path | None = None
    folds: str | None = None
    shared_speakers: bool = False


def read(kind: str, source: Path, base: Path, options: Options) -> SourceListing:
    """The recordings at `source`. `base`: the folder of `expected_counts.json`, whose counts are those of the listing if it is there.

    Raises InputError for an unknown kind, an option that the kind does not have, and as the reader does.
    """
    _check(kind, options)
    stated = read_expected_counts(base)

    def required(published: Collection[str]) -> Collection[str] | None:
        return None if not options.check_counts else tuple(stated.folds or ()) if stated else published

    if kind in NAMED_FILES:
        reader, published = NAMED_FILES[kind]
        listing = reader(source, required=required(published))
    elif kind == "emodb":
        listing = emodb.read(source, required=required(tuple(emodb.FOLDS)), four_classes=options.four_classes)
    elif kind == "emobox":
        listing = emobox.read(source, audio=options.audio)
    elif kind == "csv":
        listing = csv_corpus.read(source, folds=options.folds)
    elif kind == "labels":
        listing = labels.read(source, audio=options.audio)
    else:
        listing = unlabelled.read(source)
    return listing if stated is None else replace(listing, counts=stated)


def _check(kind: str, options: Options) -> None:
    if kind not in KINDS:
        raise InputError(f"unknown kind of corpus {kind!r}; known are {', '.join(KINDS)}")
    if options.four_classes and kind != "emodb":
        raise InputError(f"four classes can be chosen for emodb only, not for {kind}")
    if options.audio is not None and kind not in ("labels", "emobox"):
        raise InputError(f"a folder of recordings is named for labels and emobox only, not for {kind}")
    if options.folds is not None and kind != "csv":
        raise InputError(f"--folds is for csv only: {kind} has folds of its own")
    if options.shared_speakers and kind not in SHARED_SPEAKERS:
        raise InputError(f"--shared-speakers is for {', '.join(SHARED_SPEAKERS)}: no fold of {kind} has a speaker of another one")
