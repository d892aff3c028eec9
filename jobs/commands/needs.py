"""What the stages of an experiment need beside a site that works: corpus and checkpoints, here and on compute nodes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.doctor_checks import Check, Verdict
from jobs.experiment.plugin import Weights
from jobs.experiment.registry import StageCall


@dataclass(frozen=True)
class Needs:
    """What an experiment needs, as found on this machine."""

    corpus: str  # name
    folder: Path  # of the prepared corpus
    problem: str = ""  # of the corpus, in one line; "": it is prepared and fits the recipe
    weights: tuple[Weights, ...] = ()
    stages: tuple[str, ...] = ()  # names

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders that every compute node must see."""
        return (*(() if self.problem else (str(self.folder),)), *(each.path for each in self.weights if each.path))


def judge_needs(needs: Needs) -> list[Check]:
    """Corpus and checkpoints on this machine."""
    if needs.problem:
        checks = [Check("corpus", Verdict.problem, needs.problem.splitlines()[0])]
    else:
        checks = [Check("corpus", Verdict.ok, f"{needs.corpus}: prepared in {needs.folder}, fits the recipe")]
    for each in needs.weights:
        if not each.missing:
            checks.append(Check("weights", Verdict.ok, f"{each.key}: {each.path}"))
        elif each.downloadable:
            checks.append(Check("weights", Verdict.note, f"{each.key}: {each.missing}", "nodes without network cannot download it"))
        else:
            checks.append(Check("weights", Verdict.problem, f"{each.key}: {each.missing}"))
    return checks


def judge_files(host: str, unseen: Collection[str]) -> list[Check]:
    """Whether a compute node sees what the stages read."""
    if not unseen:
        return []
    text = f"{host} does not see {', '.join(unseen)}"
    return [Check("files", Verdict.problem, text, "put corpus and checkpoints into a folder that compute nodes see under the same path")]


def stages_of(calls: Iterable[StageCall]) -> tuple[str, ...]:
    """Names of stages and of those upstream of them, upstream first."""
    found: dict[str, None] = {}

    def add(call: StageCall) -> None:
        for parent in call.upstream.values():
            add(parent)
        found[call.stage] = None

    for call in calls:
        add(call)
    return tuple(found)
