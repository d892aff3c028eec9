"""`clean`: free what no table needs and nothing continues; with `whole` an experiment with all that no other one needs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jobs.commands.console import print_lines, say
from jobs.commands.disk import in_units
from jobs.commands.owners import Experiments, read_experiments, require_experiment, why_busy
from jobs.control.cleaning import Removal, kept_logs, leftovers, only_of, unneeded
from jobs.errors import UsageError
from jobs.store.layout import Layout
from jobs.store.usage import Size, abandoned, remove, size_of, stored_stages
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.commands.owners import Opening
    from jobs.store.usage import StoredStage

DAY = 86400.0
TABLES = ("tables", "confusion")  # folders of an experiment that `keep_tables` keeps, beside its bundle


@dataclass(frozen=True)
class Asked:
    """The options of `clean`."""

    experiment: str = ""  # "": all
    days: float = 0.0  # only what shows no sign of life for so long
    whole: bool = False  # the experiment itself, and every stage that no other one needs
    keep_tables: bool = False
    unneeded: bool = False  # also results that no experiment needs
    dry_run: bool = False
    yes: bool = False  # a whole experiment is removed without a question


def clean(root: Path, opening: Opening, asked: Asked) -> None:
    """Free what was asked for, and print it. UsageError where something would be touched that is in flight or may be needed."""
    _check(asked)
    if asked.experiment:
        require_experiment(root, asked.experiment)
    removals = removals_of(root, opening, asked)
    print_lines(removal_lines(removals, dry_run=asked.dry_run or (asked.whole and not asked.yes), experiment=asked.experiment))
    if asked.dry_run or not removals:
        return
    if asked.whole and not asked.yes:
        _confirm(asked.experiment)
        removals = removals_of(root, opening, asked)  # something may have been launched while the user read the question
    for removal in removals:
        remove(removal.path)
    total = sum((removal.size for removal in removals), Size())
    say(f"freed {in_units(total)}, {counted(total.inodes, 'inode')}")


def removals_of(root: Path, opening: Opening, asked: Asked) -> tuple[Removal, ...]:
    """What is to be removed, by the state of the results folder now."""
    experiments, stages = read_experiments(root, opening), tuple(stored_stages(root))
    before = time.time() - asked.days * DAY
    if asked.whole:
        return _whole(Layout(root, asked.experiment), opening, experiments, stages, asked, before)
    if asked.unneeded:
        experiments.require_known("clean --unneeded")
    return _partial(root, experiments, stages, asked, before)


def _whole(
    layout: Layout, opening: Opening, experiments: Experiments, stages: Sequence[StoredStage], asked: Asked, before: float
) -> tuple[Removal, ...]:
    """The experiment's folder, but for tables and logs that are to stay, and the stages that no other experiment needs."""
    name = layout.experiment
    others = [owner for owner in experiments.owners if owner.experiment != name]
    Experiments((), tuple(others)).require_known(f"clean {name} --whole")
    if busy := why_busy(layout, experiments.owners, opening):
        raise UsageError(f"{name}: {busy}: `cancel` it first, and repeat this when its jobs have ended")
    launched = max(launch.launched for launch in experiments.launches if launch.experiment == name)
    if launched > before:
        raise UsageError(f"{name}: launched {(time.time() - launched) / DAY:.1f} days ago, which is not older than {asked.days:g} days")
    own = only_of(name, stages, experiments.owners)
    kept = {layout.root / log for log in kept_logs(name, stages, own, experiments.owners)}
    kept |= {layout.bundle, *(layout.folder / folder for folder in TABLES)} if asked.keep_tables else set()
    files = [Removal(path, size_of(path), "of the experiment") for path in _without(layout.folder, kept)]
    # the record of the launch first: without it the experiment is gone, and an interrupted removal is continued as `--unneeded`
    files.sort(key=lambda each: each.path != layout.experiment_file)
    return (*files, *(Removal(stage.path, stage.size, "no other experiment needs it") for stage in own))


def removal_lines(removals: Sequence[Removal], *, dry_run: bool, experiment: str = "") -> list[str]:
    """What is, or would be, removed: a line for each kind of file and reason, with number and size. `experiment`: "" for all."""
    if not removals:
        stay = f": the results and tables of {experiment} stay; `python launch.py clean {experiment} --whole` removes them"
        return [f"nothing to free{stay if experiment else ''}"]
    counts, sizes = Counter[tuple[str, str]](), dict[tuple[str, str], Size]()
    for removal in removals:
        kind = (_kind(removal.path), removal.why)
        counts[kind] += 1
        sizes[kind] = sizes.get(kind, Size()) + removal.size
    verb = "would free" if dry_run else "frees"
    return [f"{verb} {in_units(sizes[kind])}: {counts[kind]} x {kind[0]} ({kind[1]})" for kind in sorted(counts)]


def _check(asked: Asked) -> None:
    if asked.days < 0:
        raise UsageError(f"clean: --older-than {asked.days:g}: a number of days, 0 or more")
    if asked.whole and not asked.experiment:
        raise UsageError("clean: --whole goes with the name of an experiment: `clean EXPERIMENT --whole`")
    if asked.keep_tables and not asked.whole:
        raise UsageError("clean: --keep-tables goes with --whole: without it no table is touched")
    if asked.unneeded and asked.experiment:
        raise UsageError("clean: --unneeded is of all experiments together: leave out the name")


def _partial(root: Path, experiments: Experiments, stages: Sequence[StoredStage], asked: Asked, before: float) -> tuple[Removal, ...]:
    found = list(leftovers(stages, experiments.owners, before=before, experiment=asked.experiment))
    if asked.unneeded:
        whole = unneeded(stages, experiments.owners, before=before)
        folders = {removal.path for removal in whole}
        found = [removal for removal in found if folders.isdisjoint(removal.path.parents)]
        found.extend(whole)
    if not asked.experiment:
        found.extend(Removal(path, size_of(path), "an earlier removal was interrupted") for path in abandoned(root))
    return tuple(found)


def _without(folder: Path, kept: Iterable[Path]) -> list[Path]:
    """Paths that together are everything in a folder except what is kept; the folder itself if nothing is."""
    inside = [path for path in kept if path.is_relative_to(folder) and path.exists()]
    if not inside:
        return [folder]
    if folder in inside:
        return []
    return [found for path in sorted(folder.iterdir()) for found in _without(path, inside)]


def _kind(path: Path) -> str:
    """What a path is, in words."""
    if path.name in ("checkpoint", "output"):
        return f"{path.name}/ of {path.parts[-3] if path.name == 'checkpoint' else path.parts[-5]}"
    return f"stage {path.parts[-2]}" if len(path.parts) > 2 and path.parts[-3] == "store" else path.name


def _confirm(experiment: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"clean {experiment} --whole: nothing was removed; add --yes to remove it without a question")
    typer.confirm(f"remove {experiment} and the stages that no other experiment needs?", abort=True)
