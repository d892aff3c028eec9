"""Who is recognised: UA by speaker, utterances that most seeds get wrong, and whether probabilities are those of being right.

From the artifact `predictions.csv` of each run: columns `id`, `speaker`, `label`, `predicted`, and one `p_CLASS` a class.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.report.drawing import colour, figure, legend, linear, named, panel, shape, spread
from jobs.report.material import Material
from jobs.report.page import Figure, Row, Section, Table, number
from jobs.statistics import known, mean
from jobs.text import counted

FILE = "predictions.csv"
COLUMNS = ("id", "speaker", "label", "predicted")
BINS = 10  # of confidence, of equal width
MOST_SPEAKERS = 40
MOST_UTTERANCES = 20


@dataclass
class Tally:
    """The predictions of all runs of one method on one corpus, counted."""

    recalls: defaultdict[str, defaultdict[str, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(lambda: [0, 0])))
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)  # utterance and label -> runs that were wrong
    tested: Counter[tuple[str, str]] = field(default_factory=Counter)  # -> runs
    taken_for: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    bins: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 0.0] for _ in range(BINS)])  # n, right, sum of confidences

    def add(self, utterance: str, speaker: str, label: str, predicted: str, confidence: float | None) -> None:
        """Count one prediction. `confidence`: probability of the predicted class."""
        right = label == predicted
        counts = self.recalls[speaker][label]
        counts[0] += right
        counts[1] += 1
        name = (utterance, label)
        self.tested[name] += 1
        if not right:
            self.wrong[name] += 1
            self.taken_for[name][predicted] += 1
        if confidence is not None:
            found = self.bins[min(int(confidence * BINS), BINS - 1)]
            found[0] += 1
            found[1] += right
            found[2] += confidence

    @property
    def by_speaker(self) -> dict[str, float]:
        """Speaker -> UA in percent: the mean recall of the speaker's classes."""
        return {
            speaker: 100 * (mean([right / n for right, n in classes.values()]) or 0.0) for speaker, classes in sorted(self.recalls.items())
        }

    @property
    def reliability(self) -> list[tuple[float, float, int]]:
        """Mean confidence, share that is right, and number, of each bin that is not empty."""
        return [(confidence / n, right / n, int(n)) for n, right, confidence in self.bins if n]

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error in percent (Guo et al., ICML 2017, equation 3), with `BINS` bins of equal width."""
        points = self.reliability
        total = sum(n for _, _, n in points)
        return 100 * sum(n * abs(share - confidence) for confidence, share, n in points) / total if total else None


def speakers_section(material: Material) -> Section | None:
    """None without predictions, as for runs from a CSV file."""
    tallies, unreadable = _tallies(material)
    parts: list[Table | Figure] = []
    for place, corpus in enumerate(material.corpora):
        found = {method.method: tallies[corpus, method.method] for method in material.methods(corpus) if (corpus, method.method) in tallies}
        if found:
            parts.append(_speakers(material, corpus, found, f"speakers-{place}"))
            parts.extend(_utterances(corpus, found))
        if any(tally.reliability for tally in found.values()):
            parts.append(_reliability(material, corpus, found, f"reliability-{place}"))
    sentences = ["From the predictions of all runs that fill the slots; every utterance is tested once a seed."]
    if unreadable:
        sentences.append(f"Without {counted(unreadable, 'run')} whose {FILE} cannot be read.")
    return Section("speakers", "Who is not recognised?", tuple(sentences), tuple(parts)) if parts else None


def _tallies(material: Material) -> tuple[dict[tuple[str, str], Tally], int]:
    """Corpus and method -> predictions; and the number of runs whose file is gone or cannot be read."""
    found: dict[tuple[str, str], Tally] = {}
    unreadable = 0
    for source in material.sources:
        for run, _ in source.runs():
            path = source.artifact(run.key, FILE)
            try:
                rows = [] if path is None else read_predictions(path)
            except (OSError, ValueError, csv.Error):
                unreadable += 1
                continue
            tally = found.setdefault((source.graph.corpus, source.method(run)), Tally())
            for row in rows:
                tally.add(*row)
    return {key: tally for key, tally in found.items() if tally.tested}, unreadable


def read_predictions(path: Path) -> list[tuple[str, str, str, str, float | None]]:
    """Utterance, speaker, label, predicted class and its probability (None without a column of that class) of each row.

    Empty if the file has other columns. Raises ValueError for a probability that is none, OSError and csv.Error.
    """
    with path.open(encoding="utf-8", newline="") as text:
        rows = csv.reader(text)
        header = next(rows, [])
        if not set(COLUMNS) <= set(header):
            return []
        places = [header.index(name) for name in COLUMNS]
        of_class = {name.removeprefix("p_"): place for place, name in enumerate(header) if name.startswith("p_")}
        found = []
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"{path}: a row has {len(row)} values for {len(header)} columns")
            utterance, speaker, label, predicted = (row[place] for place in places)
            confidence = float(row[of_class[predicted]]) if predicted in of_class else None
            if confidence is not None and not 0 <= confidence <= 1:
                raise ValueError(f"{path}: {confidence} is no probability")
            found.append((utterance, speaker, label, predicted, confidence))
    return found


def _speakers(material: Material, corpus: str, tallies: Mapping[str, Tally], name: str) -> Figure:
    scores = {method: tally.by_speaker for method, tally in tallies.items()}
    speakers = list(dict.fromkeys(speaker for each in scores.values() for speaker in each))
    lowest = sorted(speakers, key=lambda speaker: mean(known(each.get(speaker) for each in scores.values())) or 0.0)
    shown = sorted(lowest[:MOST_SPEAKERS], key=speakers.index)
    values = [value for each in scores.values() for speaker, value in each.items() if speaker in shown]
    drawn, height = panel(named(shown), linear(values, "UA (%)"), height=220)
    for place, (method, each) in enumerate(scores.items()):
        offset = spread(len(scores), 0.4)[place]
        for at, speaker in enumerate(shown):
            if speaker in each:
                tip = f"{material.label(method)}, {speaker}: {number(each[speaker])}"
                drawn.mark(at + offset, each[speaker], shape(place), colour(place), tip)
    rows = [Row((speaker, *(number(each.get(speaker)) for each in scores.values()))) for speaker in speakers]
    table = Table("UA in percent by speaker", ("Speaker", *map(material.label, scores)), tuple(rows))
    keys = [(shape(place), colour(place), material.label(method)) for place, method in enumerate(scores)]
    left_out = f" The {MOST_SPEAKERS} lowest of {counted(len(speakers), 'speaker')}." if len(speakers) > MOST_SPEAKERS else ""
    what = f"Mean recall of the classes of each speaker, over all runs.{left_out}"
    return figure(name, f"UA by speaker on {corpus}", what, height, (drawn.svg(), legend(keys)), tables=(table,))


def _utterances(corpus: str, tallies: Mapping[str, Tally]) -> list[Table]:
    """Those that are wrong in most runs of all methods."""
    wrong, tested, taken = Counter[tuple[str, str]](), Counter[tuple[str, str]](), defaultdict[tuple[str, str], Counter[str]](Counter)
    for tally in tallies.values():
        wrong.update(tally.wrong)
        tested.update(tally.tested)
        for key, counts in tally.taken_for.items():
            taken[key].update(counts)
    worst = sorted((key for key in wrong if 2 * wrong[key] > tested[key]), key=lambda key: (-wrong[key] / tested[key], key))
    rows = [
        Row((key[0], key[1], min(taken[key].items(), key=lambda item: (-item[1], item[0]))[0], f"{wrong[key]} of {tested[key]}"))
        for key in worst[:MOST_UTTERANCES]
    ]
    share = f"{len(worst)} of {counted(len(tested), 'utterance')} on {corpus}"
    caption = f"{share} are wrong in more than half of their runs of all methods; the first {len(rows)}"
    return [Table(caption, ("Utterance", "label", "mostly taken for", "wrong"), tuple(rows), numbers=3)] if rows else []


def _reliability(material: Material, corpus: str, tallies: Mapping[str, Tally], name: str) -> Figure:
    axis = linear([0.0, 1.0], "confidence", room=0.01)
    drawn, height = panel(axis, linear([0.0, 1.0], "share that is right", room=0.01), height=300)
    drawn.line([(0.0, 0.0), (1.0, 1.0)], "dashed grey", "probabilities as they should be")
    rows = []
    for place, (method, tally) in enumerate(tallies.items()):
        points = tally.reliability
        drawn.line([(confidence, share) for confidence, share, _ in points], colour(place))
        for confidence, share, n in points:
            tip = f"{material.label(method)}: confidence {number(confidence, 2)}, right {number(share, 2)}, {n} predictions"
            drawn.mark(confidence, share, shape(place), colour(place), tip)
        rows.append(Row((material.label(method), number(tally.calibration_error), str(sum(n for *_, n in points)))))
    keys = [(shape(place), colour(place), material.label(method)) for place, method in enumerate(tallies)]
    table = Table(f"Expected calibration error in percent, {BINS} bins", ("Method", "ECE", "predictions"), tuple(rows))
    what = f"Share of right predictions by confidence (the probability of the predicted class) in {BINS} bins. Below the dashed "
    what += "line a model is more confident than right."
    return figure(name, f"Reliability on {corpus}", what, height, (drawn.svg(), legend(keys)), tables=(table,))
