"""Commands to run next: a grid of the best point, of a smaller one that is not distinguishable, and the nested choice. Pure.

Every line is a POSIX shell command or a comment, so that `choice.txt` is a script.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.experiment.config import SECRETS, Cluster, secrets_of
from jobs.statistics import round_half_up
from jobs.store.layout import Layout
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.records import Sweep
from jobs.sweeps.report.summary import LISTED, FoldChoice, PointSummary, SweepSummary
from jobs.sweeps.space import overrides_of, text
from jobs.text import counted, one_line

NAME_LENGTH = 64  # of an experiment, at most
NESTED = "nested"
RESOURCES = "resources"  # section whose entries may be null
NOT_OF_GRID = frozenset(("name", "cluster", "sweep"))  # keys that a grid command gives in another way or does not need


@dataclass(frozen=True)
class Choice:
    """Commands; "" for none."""

    grid: str  # the best point
    smaller: str  # the smallest one that is not distinguishable from it
    by_fold: tuple[tuple[FoldChoice, str], ...]  # the best point of each fold
    collect: str  # one table of the grids of `by_fold`
    caveats: tuple[str, ...]  # sentences


def choice_of(summary: SweepSummary, overrides: Sequence[str] = ()) -> Choice:
    """The commands that follow from a sweep.

    `overrides`: `KEY=VALUE` by which its experiment differs from its file, and options for its folders.
    """
    sweep, best, smaller = summary.sweep, summary.best, summary.smaller
    nested = () if best is None or summary.tests_apart or _agreed(summary, best) else summary.by_fold
    names = [_name(sweep, NESTED, choice.fold) for choice in nested]
    if len(set(names)) < len(names):  # fold names that differ only in replaced characters
        names = [_name(sweep, NESTED, str(number)) for number, _ in enumerate(nested, start=1)]
    commands = [_grid(sweep, overrides, name, choice.point, choice.fold) for name, choice in zip(names, nested, strict=True)]
    return Choice(
        grid="" if best is None else _grid(sweep, overrides, _name(sweep, best.point.name), best),
        smaller="" if smaller is None else _grid(sweep, overrides, _name(sweep, smaller.point.name), smaller),
        by_fold=tuple(zip(nested, commands, strict=True)),
        collect=_collect(sweep, names) if len(names) > 1 else "",
        caveats=() if best is None else _caveats(summary, best),
    )


def lines_of(summary: SweepSummary, choice: Choice) -> tuple[str, ...]:
    """Lines for a terminal and for `choice.txt`."""
    best, smaller = summary.best, summary.smaller
    if best is None:
        return (f"# Nothing to choose yet: no point is complete ({states_in_words(summary)}).",)
    complete, tried = sum(point.complete for point in summary.points), len(summary.points)
    of_all = f" ({tried} tried)" if tried > complete else ""
    lines = [f"# Best of {counted(complete, 'complete point')}{of_all}: {best.point.label}, {_ua(best)}.", choice.grid]
    if smaller is not None:
        lines.extend([f"# Smaller, and not distinguishable from it: {smaller.point.label}, {_ua(smaller)}.", choice.smaller])
    if summary.under_way:
        lines.append(f"# The sweep is not finished ({states_in_words(summary)}): the choice may change.")
    lines.extend(f"# {sentence}" for sentence in choice.caveats)
    for found, command in choice.by_fold:
        lines.extend([f"# Fold {found.fold}: {found.point.point.label}, validation UA {round_half_up(found.mean_ua)}", command])
    if choice.collect:
        lines.extend(["# When all of these are done, one table of them:", choice.collect])
    return tuple(map(one_line, lines))


def overrides_between(stated: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, ...]:
    """`KEY=VALUE` arguments that change the values of one experiment into those of another, for keys that a grid depends on.

    Keys that may hold secrets are left out, because the commands are published.
    """
    before, after = _flat(stated), _flat(values)
    unsaid = {key for key, value in after.items() if value is None and key not in before and key.split(".")[0] == RESOURCES}
    return tuple(
        f"{key}={_text(value)}"
        for key, value in after.items()
        if key.split(".")[0] not in NOT_OF_GRID
        and ".".join(key.split(".")[:2]) not in SECRETS
        and key not in unsaid
        and (key not in before or before[key] != value)
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | Mapping) else text(value)


def _grid(sweep: Sweep, overrides: Sequence[str], name: str, point: PointSummary, fold: str | None = None) -> str:
    """`folds` is quoted, since YAML reads `03` as a number."""
    cluster = ["--cluster", Cluster.slurm.value] if sweep.experiment.cluster is Cluster.slurm else []
    chosen = [*overrides_of(sweep.experiment, point.point), *([] if fold is None else [f"folds={json.dumps([fold])}"])]
    keys = {argument.partition("=")[0] for argument in chosen}
    kept = [argument for argument in overrides if argument.partition("=")[0] not in keys]
    words = [sweep.file or sweep.experiment.name, *cluster, f"name={name}", *kept, *chosen]
    return shlex.join(["python", "launch.py", "grid", *words])


def _collect(sweep: Sweep, names: Sequence[str]) -> str:
    """Concatenates the runs of several experiments for `collect --from`."""
    tables = [str(Layout(sweep.layout.root, name).tables / "runs.csv") for name in names]
    joined = shlex.quote(f"{_name(sweep, NESTED)}.csv")
    return f"awk 'FNR > 1 || NR == 1' {shlex.join(tables)} > {joined} && python launch.py collect --from {joined}"


def _name(sweep: Sweep, *parts: str) -> str:
    """A valid name of an experiment; if it is too long, the first part is cut."""
    rest = "".join(f"-{re.sub(r'[^A-Za-z0-9_.-]+', '_', part)}" for part in parts)[: NAME_LENGTH - 1]
    return sweep.experiment.name[: NAME_LENGTH - len(rest)] + rest


def _agreed(summary: SweepSummary, best: PointSummary) -> bool:
    chosen = {choice.fold: choice.point for choice in summary.by_fold}
    return all(point is best for point in chosen.values()) and set(summary.grid_folds) <= set(chosen)


def _caveats(summary: SweepSummary, best: PointSummary) -> tuple[str, ...]:
    found = []
    if len(summary.points) > 1:
        found.append("The best was selected on these speakers, so its UA is biased upwards: expect less on others.")
    if any(point.state is TrialState.stopped for point in summary.points):
        seeds = counted(summary.sweep.experiment.sweep.seeds, "fine-tuning")
        found.append(
            f"Points were stopped early after few folds with {seeds} each, which is weak evidence: see the intervals of the differences. "
            "To compare sets, sweep with sweep.stopping=none; it computes only the missing stages."
        )
    if secret := secrets_of(summary.sweep.experiment):
        found.append(f"The commands leave out {' and '.join(secret)}, which may hold secrets: give them again unless the files have them.")
    if summary.tests_apart:
        return tuple(found)
    if not summary.folds_apart:
        found.append(
            "Early stopping or Optuna made the candidates of a fold depend on other folds too: the choice of each fold "
            "is strictly nested only with sweep.stopping=none and sweep.search=grid or random."
        )
    if rest := [fold for fold in summary.grid_folds if fold not in summary.sweep.folds]:
        found.append(f"The sweep did not evaluate {', '.join(rest)}: there a grid tests a point chosen on other folds.")
    agreed = "here every fold chooses this point" + (", so that its grid is nested." if summary.folds_apart else ".")
    found.append(
        "A single point for all folds is chosen on the validation speakers of every fold, which are test speakers of other folds; "
        f"nested is the choice of each fold on its own validation speakers: {agreed if _agreed(summary, best) else 'one grid a fold:'}"
    )
    return tuple(found)


def _ua(point: PointSummary) -> str:
    if point.ua.mean is None:
        return "no validation UA"
    spread = "" if point.ua.sd is None else f" ± {round_half_up(point.ua.sd)}"
    return f"validation UA {round_half_up(point.ua.mean)}{spread}"


def states_in_words(summary: SweepSummary) -> str:
    """Number of trials by state."""
    found = [f"{summary.trials[state]} {state.name}" for state in LISTED if summary.trials.get(state)]
    planned = f" of {summary.planned}" if summary.planned > len(summary.points) else ""
    return f"{counted(len(summary.points), 'trial')}{planned}: {', '.join(found)}" if found else "no trial has begun"
