"""What `prepare --list` prints: each corpus with its language, what to give to `prepare`, its folds, and where its owners give it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ser_core.corpora.emobox_corpora import CORPORA, DISJOINT, SHARED, EmoBoxCorpus


@dataclass(frozen=True)
class KnownCorpus:
    """A line of the list."""

    name: str
    language: str
    give: str  # arguments of `prepare`
    folds: str
    page: str  # with its licence, or how to ask for one; "" for what is the user's own


OWN = (
    KnownCorpus("IEMOCAP", "English", "iemocap --source DIR", "5 sessions", "https://sail.usc.edu/iemocap/iemocap_release.htm"),
    KnownCorpus("SAVEE", "English", "savee --source DIR", "4 speakers", "http://kahlan.eps.surrey.ac.uk/savee/"),
    KnownCorpus("EmoDB", "German", "emodb --source DIR", "5 pairs of speakers", "http://emodb.bilderbar.info/"),
    KnownCorpus("RAVDESS", "English", "ravdess --source DIR", "6 of 4 actors", "https://zenodo.org/records/1188976"),
    KnownCorpus("CREMA-D", "English", "cremad --source DIR", "5 sets of actors", "https://github.com/CheyneyComputerScience/CREMA-D"),
    KnownCorpus("TESS", "English", "tess --source DIR", "2 speakers", "https://tspace.library.utoronto.ca/handle/1807/24487"),
    KnownCorpus("demo", "English", "demo", "5 sessions of synthetic speech", ""),
    KnownCorpus("a table", "any", "csv --source FILE.csv --name NAME", "column fold, or --folds", ""),
    KnownCorpus("the authors' JSON", "any", "labels --source FILE.json --audio DIR", "its test part", ""),
    KnownCorpus("speech without labels", "any", "unlabelled --source DIR --name NAME", "none: for measurements", ""),
)


def known_corpora() -> tuple[KnownCorpus, ...]:
    """All of them: the readers' own, and those of EmoBox."""
    return (*OWN, *map(_of_emobox, CORPORA))


def table_lines(corpora: Sequence[KnownCorpus]) -> list[str]:
    """A heading and a line for each corpus, in columns."""
    rows = [
        ("Corpus", "Language", "python launch.py prepare ...", "Folds", "Licence"),
        *((each.name, each.language, each.give, each.folds, each.page or "-") for each in corpora),
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    return ["  ".join((*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4])) for row in rows]


def _of_emobox(corpus: EmoBoxCorpus) -> KnownCorpus:
    given = f"emobox --meta data/{corpus.name}/{corpus.name}.jsonl --audio DIR"
    number = {0: "refused: recordings in no part", 1: "one test part"}.get(corpus.folds, str(corpus.folds))
    speakers = {DISJOINT: "", SHARED: ", shared speakers"}.get(corpus.speakers, ", speakers not known")
    give = f"{given} --shared-speakers" if corpus.speakers == SHARED else given
    return KnownCorpus(f"{corpus.title} (EmoBox)", corpus.language, give, f"{number}{speakers}", corpus.page)
