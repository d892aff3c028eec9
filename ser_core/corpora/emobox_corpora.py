"""The 32 corpora of the EmoBox benchmark (Ma et al. 2024): language, folds, speakers, and where to ask for them. Facts of its data lists.

Imports nothing, as `prepare --list` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EmoBoxCorpus:
    """One corpus of EmoBox at its commit 08280f2 (2025-03-31)."""

    name: str  # in EmoBox's paths: data/NAME/NAME.jsonl
    title: str
    language: str
    folds: int  # 1: one split into training, (validation) and test part; 0: parts that leave recordings out
    speakers: str  # DISJOINT, SHARED or UNKNOWN
    page: str  # where its owners give it out, or say how
    utterances: int | None = None  # of its list without `dropped`; None: not counted
    dropped: tuple[str, ...] = ()  # labels of recordings that are left out


DISJOINT = "disjoint"  # no speaker is in training and test part of a fold
SHARED = "shared"
UNKNOWN = "unknown"  # the list has no speakers

CORPORA = (
    EmoBoxCorpus("aesdd", "AESDD", "Greek", 1, SHARED, "http://m3c.web.auth.gr/research/aesdd-speech-emotion-recognition/", 604),
    EmoBoxCorpus("ased", "ASED", "Amharic", 1, SHARED, "https://github.com/wgwangang/ASED_V1", 2474),
    EmoBoxCorpus(
        "asvpesd",
        "ASVP-ESD",
        "several",
        1,
        SHARED,
        "https://www.kaggle.com/datasets/dejolilandry/asvpesdspeech-nonspeech-emotional-utterances",
        13963,
        dropped=("17",),  # unknown
    ),
    EmoBoxCorpus("cafe", "CaFE", "French", 3, DISJOINT, "https://zenodo.org/record/1478765", 936),
    EmoBoxCorpus("casia", "CASIA", "Mandarin", 4, DISJOINT, "https://aistudio.baidu.com/aistudio/datasetdetail/209512", 1200),
    EmoBoxCorpus("cremad", "CREMA-D", "English", 1, SHARED, "https://github.com/CheyneyComputerScience/CREMA-D", 7442),
    EmoBoxCorpus("emns", "EMNS", "English", 1, SHARED, "https://www.openslr.org/136", 1181),
    EmoBoxCorpus(
        "emodb",
        "EmoDB",
        "German",
        5,
        SHARED,
        "https://www.kaggle.com/datasets/piyushagni5/berlin-database-of-emotional-speech-emodb",
        535,
    ),
    EmoBoxCorpus("emovdb", "EmoV-DB", "English", 1, SHARED, "https://www.openslr.org/115", 6887),
    EmoBoxCorpus("emovo", "EMOVO", "Italian", 6, DISJOINT, "http://voice.fub.it/activities/corpora/emovo/index.html", 588),
    EmoBoxCorpus("emozionalmente", "Emozionalmente", "Italian", 1, SHARED, "https://zenodo.org/records/6569824", 6902),
    EmoBoxCorpus("enterface", "eNTERFACE", "English", 1, SHARED, "https://enterface.net/enterface05/main.php?frame=emotion", 1263),
    EmoBoxCorpus("esd", "ESD", "English, Mandarin", 5, DISJOINT, "https://hltsingapore.github.io/ESD/", 35000),
    EmoBoxCorpus("iemocap", "IEMOCAP", "English", 5, DISJOINT, "https://sail.usc.edu/iemocap/iemocap_release.htm", 5531),
    EmoBoxCorpus("jlcorpus", "JL-Corpus", "English", 4, DISJOINT, "https://www.kaggle.com/tli725/jl-corpus", 2400),
    EmoBoxCorpus("m3ed", "M3ED", "Mandarin", 1, DISJOINT, "https://github.com/aim3-ruc/rucm3ed", 24437),
    EmoBoxCorpus("mead", "MEAD", "English", 1, SHARED, "https://github.com/uniBruce/Mead", 31729),
    EmoBoxCorpus("meld", "MELD", "English", 1, SHARED, "https://affective-meld.github.io/", 13706),
    EmoBoxCorpus("mer2023", "MER2023", "Mandarin", 0, UNKNOWN, "http://www.merchallenge.cn/datasets"),
    EmoBoxCorpus("mesd", "MESD", "Spanish", 1, SHARED, "https://data.mendeley.com/datasets/cy34mh68j9/5", 862),
    EmoBoxCorpus(
        "msppodcast",
        "MSP-Podcast",
        "English",
        1,
        DISJOINT,
        "https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Podcast.html",
        58026,
        dropped=("O", "X"),  # other, and no agreement of the raters
    ),
    EmoBoxCorpus("oreau", "Oreau", "French", 1, SHARED, "https://zenodo.org/records/4405783", 434),
    EmoBoxCorpus("pavoque", "PAVOQUE", "German", 1, SHARED, "https://github.com/marytts/pavoque-data/releases", 7334),
    EmoBoxCorpus(
        "polish",
        "Polish",
        "Polish",
        5,
        DISJOINT,
        "https://mostwiedzy.pl/en/open-research-data/emotions-in-polish-speech-recordings,11190523461146169-0",
        450,
    ),
    EmoBoxCorpus(
        "ravdess", "RAVDESS", "English", 6, DISJOINT, "https://www.kaggle.com/datasets/uwrfkaggler/ravdess-emotional-speech-audio", 1440
    ),
    EmoBoxCorpus("resd", "RESD", "Russian", 1, UNKNOWN, "https://huggingface.co/datasets/Aniemore/resd_annotated", 1396),
    EmoBoxCorpus(
        "savee", "SAVEE", "English", 4, DISJOINT, "https://www.kaggle.com/datasets/ejlok1/surrey-audiovisual-expressed-emotion-savee", 480
    ),
    EmoBoxCorpus("shemo", "ShEMO", "Persian", 1, SHARED, "https://github.com/mansourehk/ShEMO", 2838),
    EmoBoxCorpus("subesco", "SUBESCO", "Bangla", 5, DISJOINT, "https://zenodo.org/records/4526477", 7000),
    EmoBoxCorpus("tess", "TESS", "English", 1, SHARED, "https://tspace.library.utoronto.ca/handle/1807/24487", 2800),
    EmoBoxCorpus("turevdb", "TurEV-DB", "Turkish", 1, SHARED, "https://github.com/Xeonen/TurEV-DB", 1735),
    EmoBoxCorpus("urdu", "URDU", "Urdu", 1, SHARED, "https://github.com/siddiquelatif/urdu-dataset", 400),
)
BY_NAME = {corpus.name: corpus for corpus in CORPORA}
