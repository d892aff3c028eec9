"""The run or stage that a user names on the command line: `METHOD/FOLD/SLOT`, or the first digits of a stage's key. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Node, Run, with_upstream
from jobs.text import did_you_mean

LEAST_DIGITS = 6  # of a key, so that no name of an experiment is mistaken for one
_KEY = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},}}")


@dataclass(frozen=True)
class Target:
    """A stage that a user named, and the run whose last stage it is, if any."""

    node: Node
    run: Run | None


def names_run(text: str) -> bool:
    """Whether a text has the form of a run's name or a stage's key."""
    return "/" in text or _KEY.fullmatch(text) is not None


def experiment_and_run(words: Sequence[str], usage: str) -> tuple[str | None, str]:
    """The experiment, if one is named, and the run of `[EXPERIMENT] RUN`. `usage`: the whole command."""
    command = usage.partition(" ")[0]
    if len(words) > 2:
        raise UsageError(f"{command}: one run at a time: {usage}")
    if len(words) == 1 and not names_run(words[0]):
        raise UsageError(f"{command}: {words[0]!r} names no run: {usage}")
    return (words[0] if len(words) == 2 else None), words[-1]


def find_target(graph: Graph, text: str) -> Target:
    """The run `METHOD/FOLD/SLOT` that fills its slot now, or the stage whose key starts so. UsageError if there is none, or several."""
    if "/" in text:
        run = find_run(graph, text)
        return Target(graph.nodes[run.key], run)
    if not _KEY.fullmatch(text):
        example = graph.runs[0].name if graph.runs else "METHOD/1/0"
        raise UsageError(f"run {text!r}: write METHOD/FOLD/SLOT, for example {example}, or at least {LEAST_DIGITS} digits of a key")
    keys = [key for key in graph.nodes if key.startswith(text)]
    if len(keys) != 1:
        several = f"{len(keys)} keys start so: write more of it" if keys else "no key of this experiment starts so"
        raise UsageError(f"run {text!r}: {several}")
    runs = (run for run in (*graph.runs, *graph.superseded) if run.key == keys[0])
    return Target(graph.nodes[keys[0]], next(runs, None))


def find_run(graph: Graph, text: str) -> Run:
    """The run `METHOD/FOLD/SLOT` that fills its slot now. UsageError if the experiment has none of that name."""
    method, _, rest = text.partition("/")
    fold, _, slot = rest.rpartition("/")
    for name, what, known in (
        (method, "method", dict.fromkeys(run.method for run in graph.runs)),
        (fold, "fold", dict.fromkeys(run.fold for run in graph.runs)),
        (slot, "slot", dict.fromkeys(str(run.slot) for run in graph.runs)),
    ):
        if name not in known:
            names = list(known)
            listed = ", ".join(names) if len(names) <= 12 else f"{names[0]} to {names[-1]}"
            raise UsageError(
                f"run {text!r}: no {what} {name!r} in this experiment; {did_you_mean(name, names, otherwise=f'there are {listed}')}"
            )
    return next(run for run in graph.runs if (run.method, run.fold, str(run.slot)) == (method, fold, slot))


def stages_of(graph: Graph, node: Node) -> tuple[Node, ...]:
    """A stage and everything upstream of it, upstream first."""
    return tuple(graph.nodes[key] for key in with_upstream(graph, [node.key]))
