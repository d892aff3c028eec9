"""How a launch differs from the one before: settings, corpus, and which key makes a stage a new one. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.experiment.graph import Graph, Node
from jobs.experiment.template import yaml_text
from jobs.text import counted, listed

SHOWN = 60  # characters of a value
_NOT_SET = object()


@dataclass(frozen=True)
class Difference:
    """One key with its value before and now."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def setting_differences(before: Mapping[str, Any], now: Mapping[str, Any], *, secret: Collection[str] = ()) -> list[Difference]:
    """Keys of nested settings with other values now, in the order of `now`. Values of the keys in `secret` are not shown."""
    former, present = dict(_leaves(before)), dict(_leaves(now))
    found = []
    for key in dict.fromkeys((*present, *former)):
        values = former.get(key, _NOT_SET), present.get(key, _NOT_SET)
        if values[0] != values[1]:
            hidden = any(key == each or key.startswith(f"{each}.") for each in secret)
            found.append(Difference(key, *("(not shown)" if hidden else _text(value) for value in values)))
    return found


def new_stage_lines(before: Graph, now: Graph, new: Collection[str], typed: Collection[str]) -> list[str]:
    """For each kind of the `new` stages, how many there are and which key makes them new; a stage without own difference names upstream's.

    `typed`: keys of settings as a user types them, of which a stage's settings may leave out the first part.
    """
    former: dict[tuple[str, str], list[Node]] = {}
    for node in before.nodes.values():
        former.setdefault((node.stage, node.method), []).append(node)
    names = {key.partition(".")[2]: key for key in typed}
    corpus = [] if before.corpus_digest == now.corpus_digest else [f"corpus digest {before.corpus_digest[:12]} -> {now.corpus_digest[:12]}"]
    reasons: dict[str, str] = {}
    for key, node in now.nodes.items():  # upstream first
        if key not in before.nodes:
            own = [*corpus, *_own_reasons(node, former.get((node.stage, node.method), ()), names)]
            above = [reasons[parent] for parent in node.upstream.values() if parent in reasons]
            reasons[key] = listed(own) if own else next(iter(above), "other stages upstream")
    kinds = Counter((now.nodes[key].stage, now.nodes[key].method, reasons[key]) for key in new if key in reasons)
    return [f"new: {stage} {method}, {counted(count, 'stage')}: {reason}" for (stage, method, reason), count in kinds.items()]


def _own_reasons(node: Node, former: Collection[Node], names: Mapping[str, str]) -> list[str]:
    """What distinguishes a stage from the nearest former one of its stage and method, apart from the stages upstream."""
    if not former:
        return [f"method {node.method} is new"]
    here = [each for each in former if each.fold == node.fold]
    if not here:
        return [f"fold {node.fold} is new"]
    same = [each for each in here if each.seed == node.seed]
    if not same:
        return [f"seed {node.seed} is new"]
    compared = [(setting_differences(each.settings, node.settings), each) for each in same]
    differences, match = min(compared, key=lambda found: len(found[0]))
    typed = [names.get(each.key) or names.get(f"{node.stage}.{each.key}", each.key) for each in differences]
    found = [f"{name} {each.before} -> {each.now}" for name, each in zip(typed, differences, strict=True)]
    return found if match.version == node.version else [*found, f"version of the stage {match.version} -> {node.version}"]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if value is _NOT_SET:
        return "not set"
    text = yaml_text(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
