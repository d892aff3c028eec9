"""Reader of the corpora of the EmoBox benchmark (Ma et al. 2024) by its lists, with its published folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ser_core.corpora import iemocap
from ser_core.corpora.csv_corpus import identifiers
from ser_core.corpora.emobox_audio import Recordings, conversion_line, inside
from ser_core.corpora.emobox_corpora import BY_NAME
from ser_core.corpora.emobox_lists import Listed, name_of_label, read_label_names, read_recordings, read_speakers, read_split
from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing
from ser_core.errors import InputError


def read(source: Path, *, audio: Path | None) -> SourceListing:
    """List the recordings of `source`, EmoBox's file `data/CORPUS/CORPUS.jsonl`, whose neighbours have speakers, labels' names and folds.

    `audio`: the folder of the corpus, which stands for `downloads/CORPUS` of the lists. Several folds are those of the test parts; one fold
    gives a training, perhaps a validation, and a test part. Classes have the names of `label_map.json` in lower case. Raises InputError if
    a file is missing or has another format.
    """
    if not source.is_file() or source.suffix != ".jsonl":
        raise InputError(f"{source}: --meta must name the list of a corpus, data/CORPUS/CORPUS.jsonl of EmoBox")
    if audio is None or not audio.is_dir():
        raise InputError(f"{audio or '--audio'}: no such folder; --audio must name the folder of the recordings")
    corpus, folder = source.stem, source.parent
    facts = BY_NAME.get(corpus)
    listed = read_recordings(source)
    split = read_split(folder, corpus, [each.key for each in listed])
    dropped = facts.dropped if facts else ()
    kept = [each for each in listed if each.label not in dropped and each.key in split.fold_of]
    speakers = _speakers(corpus, kept, read_speakers(folder))
    labels, label_problems, label_notes = _labels(corpus, kept, read_label_names(folder))
    paths, audio_problems = _files(corpus, kept, audio)
    ids = dict(zip((each.key for each in kept), identifiers([each.key for each in kept]), strict=True))
    found = [
        Recording(
            ids[each.key], paths[each.key], labels[each.label], speakers.get(each.key, ""), split.fold_of[each.key], excerpt=each.excerpt
        )
        for each in kept
        if each.key in paths and each.label in labels
    ]
    unknown = sum(each.key not in speakers for each in kept)
    without = Counter(each.label for each in listed if each.label in dropped)
    notes = [
        *(f"recordings with the label {label}, left out: {count}" for label, count in sorted(without.items())),
        *label_notes,
        *([f"recordings whose speaker is not known: {unknown} of {len(kept)}"] if unknown else []),
        *([f"not read, as no list of a fold is called so: {', '.join(split.ignored)}"] if split.ignored else []),
    ]
    counts = ExpectedCounts(facts.utterances) if facts and facts.utterances else None
    problems = (*split.problems, *label_problems, *audio_problems)
    recorded = {"benchmark": "EmoBox", "benchmark_corpus": corpus}
    return SourceListing(tuple(found), problems, split.folds, counts, recorded, notes=tuple(notes), published_folds=True)


def _speakers(corpus: str, kept: Sequence[Listed], stated: Mapping[str, str]) -> Mapping[str, str]:
    """Key -> speaker. IEMOCAP's list has the dialogue in that place; the turn's name has the speaker."""
    if corpus != "iemocap":
        return stated
    turns = {each.key: iemocap.TURN.fullmatch(each.key.removeprefix(f"{corpus}-")) for each in kept}
    return {key: f"{int(turn[1])}{turn[2]}" for key, turn in turns.items() if turn}


def _labels(corpus: str, kept: Sequence[Listed], names: Mapping[str, str] | None) -> tuple[dict[str, str], list[str], list[str]]:
    """Raw code -> class, problems, and notes."""
    codes = {each.label: each.key for each in reversed(kept)}  # with the first recording of each
    if names is None:
        return {code: code for code in codes}, [], ["no label_map.json or label_dict.json: classes have the raw codes"]
    found = {code: name_of_label(code, names) for code in codes}
    problems = [
        f"{corpus}.jsonl: {codes[code]}: label {code!r} is not in the map of labels, which has {' '.join(names)}"
        for code, name in found.items()
        if name is None
    ]
    notes = [
        f"label {code} is read as {name}: the map of labels has it in another case"
        for code, name in sorted(found.items())
        if name and code not in names
    ]
    return {code: name.lower() for code, name in found.items() if name is not None}, problems, notes


def _files(corpus: str, kept: Sequence[Listed], folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Key -> file, and problems: a line for each recording that is not there, and one for all of a format that must be converted."""
    recordings = Recordings(folder, {each.wav for each in kept})
    found: dict[str, Path] = {}
    problems: list[str] = []
    to_convert: Counter[str] = Counter()
    for each in kept:
        path, why = recordings.find(each.wav)
        if path is not None:
            found[each.key] = path
        elif why.startswith("."):
            to_convert[why] += 1
        else:
            problems.append(f"{corpus}.jsonl: {each.key}: {why}")
    if len(problems) > 1 and len(problems) == len(kept):
        problems = [_wrong_folder(corpus, inside(kept[0].wav), folder)]
    return found, [*(conversion_line(corpus, suffix, count, folder) for suffix, count in to_convert.items()), *problems]


def _wrong_folder(corpus: str, first: str, folder: Path) -> str:
    """The problem that none of the recordings is there. `first`: path of one below the folder of the corpus."""
    nearby = [each for each in (folder / corpus, folder / "downloads" / corpus, folder.parent) if each != folder and each.is_dir()]
    hint = next((f": did you mean {each}?" for each in nearby if (each / first.partition("/")[0]).exists()), "")
    return f"{folder}: none of the recordings of {corpus}.jsonl; --audio must name the folder that its lists call downloads/{corpus}{hint}"
