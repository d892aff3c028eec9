"""Fine-tuning in two stages, and label maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class SharedSpeakers(Enum):
    """Speaker names that both corpora of two stages have."""

    refuse = "refuse"  # no launch
    same = "same"  # the same persons: the first stage leaves out the speakers of the held-out fold
    different = "different"  # different persons: the first stage trains on all of its corpus


class TrainedPart(Enum):
    """A trained part of a classifier, which the second stage can freeze."""

    head = "head"
    transformer = "transformer"  # without adaptors
    ba = "ba"
    lora = "lora"
    ws = "ws"
    wg = "wg"


@dataclass
class TwoStageSettings:
    """Fine-tuning in two stages, from acted to natural speech (arXiv 2402.11747): on two parts of a corpus, or on two corpora."""

    source: str = ""  # regular expression: the part that the first stage trains on, with the settings of `finetune`; "": no first stage
    target: str = ""  # the part that `finetune` trains on, starting from the first stage, and is tested on; "": the whole corpus, one stage
    corpus: str = ""  # prepared corpus that the first stage trains on (all of it if source is ""); "": the experiment's own
    source_labels: dict[str, str | None] = field(default_factory=dict)  # its label -> common label, null: left out; {}: as they are
    target_labels: dict[str, str | None] = field(default_factory=dict)  # the same for the experiment's corpus, also without a first stage
    shared_speakers: SharedSpeakers = SharedSpeakers.refuse  # what equal speaker names in both corpora mean
    learning_rate: float | None = None  # of the second stage; null: that of finetune
    freeze: list[TrainedPart] = field(default_factory=list)  # parts of the first stage's classifier that the second does not train
    folder: str = ""  # of the source corpus, set by a launch; not part of a key
    digest: str = ""  # of the source corpus, set by a launch
    left_out: dict[str, list[str]] = field(default_factory=dict)  # held-out fold -> speakers of the source corpus, set by a launch

    @property
    def active(self) -> bool:
        """Whether fine-tuning is anything but one stage on the corpus as it is."""
        return bool(self.target or self.corpus or self.target_labels)

    @property
    def first(self) -> str:
        """What the first stage trains on, for tables; "": there is no first stage."""
        pattern = f"utterances of the pattern {self.source}" if self.source else ""
        return f"{self.corpus}{f', {pattern}' if pattern else ''}" if self.corpus else pattern

    def sentences(self) -> list[str]:
        """What is trained and how labels are mapped, for captions."""
        if not self.active:
            return []
        second = f"on utterances of the pattern {self.target}" if self.target else "on the corpus of the table"
        found = [f"fine-tuning {f'first on {self.first}, then ' if self.first else ''}{second}"] if self.target or self.first else []
        for whose, labels in ((self.corpus, self.source_labels if self.corpus else {}), ("the corpus of the table", self.target_labels)):
            if labels:
                mapped = ", ".join(f"{label} as {common}" if common else f"{label} left out" for label, common in labels.items())
                found.append(f"labels of {whose}: {mapped}")
        return [*found, *([f"frozen in the second stage: {', '.join(each.name for each in self.freeze)}"] if self.freeze else [])]
