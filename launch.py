#!/usr/bin/env python3
"""Command line: `prepare` a corpus, launch a `grid`, look at its `status`, `explain` a run, `collect` the tables, `sweep` settings.

Arguments and wiring: only this file imports both packages, and passes the registry of `ser_core` to `jobs`. What a command does is in the
module of its name in jobs.commands. Commands import what they need when they run, so that `--help` and `status` start fast.
Exit codes: 0 done · 1 internal error · 2 wrong usage, configuration or data · 3 finished but incomplete.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.arguments import (
    RUN,
    AllowIncomplete,
    AsJson,
    Bold,
    Data,
    DryRun,
    Marks,
    Name,
    Numbers,
    Results,
    Scripts,
    Settings,
    Unreplaced,
    Wait,
    Where,
    Width,
    Words,
)
from jobs.commands.bundle_arguments import add_bundle_commands
from jobs.commands.disk_arguments import add_disk_commands
from jobs.commands.examples import add_examples
from jobs.commands.export_arguments import add_export_command
from jobs.errors import InternalError, SlurmUnavailableError, StoredConfigurationError, UsageError, is_mendable
from jobs.store.layout import Layout, shared_path
from ser_core.errors import InputError, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jobs.commands.launching import Code
    from jobs.commands.needs import Needs
    from jobs.commands.owners import Opening
    from jobs.commands.session import Session
    from jobs.commands.sweep import SweepSession
    from jobs.experiment.config import Experiment
    from jobs.experiment.launched import Corpus, Launched
    from jobs.worker.task import Workplace

ROOT = shared_path(Path(__file__).resolve() if Path(__file__).is_symlink() else Path(__file__)).parent
CONFIGS = ROOT / "configs"
PUBLISHED = CONFIGS / "published.yaml"
DEFAULT_EXPERIMENT = "iemocap"
INCOMPLETE = 3
REGISTRY_NAME = "ser_core.registry:REGISTRY"
PRELOAD = (f"{REGISTRY_NAME}.preload",)
PACKAGES = (
    *("torch", "transformers", "numpy", "scipy", "scikit-learn", "safetensors"),
    *("soundfile", "omegaconf", "submitit", "tensorboard"),
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Experiment grids on this machine or a Slurm cluster whose last step is a trustworthy table.",
)


@app.command()
def prepare(
    kind: Annotated[str, typer.Argument(metavar="CORPUS", help="iemocap | savee | emodb | csv | labels | unlabelled | demo")],
    source: Annotated[Path | None, typer.Option(help="folder of the corpus as distributed; a file for csv and labels")] = None,
    name: Annotated[str | None, typer.Option(help="name of the prepared corpus; default: its kind, or the source's name")] = None,
    audio: Annotated[Path | None, typer.Option(help="labels: folder of the recordings; default: that of the file")] = None,
    four_classes: Annotated[bool, typer.Option("--four-classes", help="emodb: only the four classes of IEMOCAP")] = False,
    folds: Annotated[str | None, typer.Option(metavar="RULE", help="csv without a fold column: leave-one-speaker-out, or K")] = None,
    check_counts: Annotated[bool, typer.Option(help="compare classes and folds with the published counts")] = True,
    data: Data = ROOT / "data",
) -> None:
    """Check a corpus, convert it to 16 kHz mono, write its manifest. Every problem is listed by file name."""
    from jobs.commands.console import with_progress
    from jobs.commands.hints import next_after_prepare
    from jobs.text import counted
    from ser_core.corpora.demo import prepare_demo
    from ser_core.corpora.prepare import prepare as prepare_corpus

    if folds is not None and kind != "csv":
        raise UsageError(f"prepare {kind}: --folds is for csv only, {kind} has folds of its own")
    if kind == "demo":
        manifest = with_progress("demo", lambda tick: prepare_demo(data / (name or "demo"), source or data / "demo-source", tick))
    elif source is None:
        raise UsageError(f"prepare {kind}: name the folder of the corpus: --source DIR")
    else:
        found, own = source, name or (source.stem if kind in ("csv", "labels", "unlabelled") else kind)
        if not found.exists():
            raise UsageError(f"prepare {kind}: --source {found}: no such file or folder")
        manifest = with_progress(
            own,
            lambda tick: prepare_corpus(
                kind,
                found,
                data / own,
                name=own,
                check_counts=check_counts,
                four_classes=four_classes,
                audio=audio,
                folds=folds,
                progress=tick,
            ),
        )
    speakers = len({utterance.speaker for utterance in manifest.utterances})
    size = f"{counted(len(manifest.utterances), 'utterance')}, {manifest.seconds / 60:.1f} min, {counted(speakers, 'speaker')}"
    typer.echo(
        f"{manifest.corpus}: {size}, classes {', '.join(manifest.classes)}, folds {', '.join(manifest.folds)}; "
        f"digest {manifest.digest[:12]}; in {manifest.folder}"
    )
    if kind != "demo":  # which `grid demo` prepares itself
        has_experiment = (CONFIGS / "experiment" / f"{manifest.corpus}.yaml").is_file()
        _note(next_after_prepare(manifest.corpus, [("--data", data, ROOT / "data")], has_experiment=has_experiment))


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the new experiment")],
    corpus: Annotated[str, typer.Option(help="a prepared corpus")],
    like: Annotated[str, typer.Option(metavar="EXPERIMENT", help="whose settings it starts from")] = "emodb-base",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="default: configs/experiment/NAME.yaml")] = None,
    data: Data = ROOT / "data",
) -> None:
    """Write the file of a new experiment on a prepared corpus, with every key explained."""
    from jobs.commands.init import prepared_corpus, write_experiment

    write_experiment(name, _prepared(data / prepared_corpus(corpus, _corpora(data))), like, out, _code())


@app.command()
def config(
    arguments: Settings = None,
    cluster: Where = None,
    changed: Annotated[bool, typer.Option("--changed", help="only settings that are not at their default")] = False,
    data: Data = ROOT / "data",
) -> None:
    """Print every setting of an experiment and its source: command line, experiment file, preset, site profile or default."""
    from jobs.commands.init import print_config
    from jobs.commands.launching import require_file, words_of

    words = words_of("config", arguments or [], cluster, DEFAULT_EXPERIMENT)
    require_file(words.file, CONFIGS, _corpora(data))
    _note(words.line)
    print_config(words, _code(), changed=changed)


@app.command()
def grid(
    arguments: Settings = None,
    cluster: Where = None,
    wait: Wait = None,
    dry_run: DryRun = False,
    scripts: Scripts = False,
    yes: Annotated[bool, typer.Option("--yes", help="withdraw stages in Slurm that the new settings do not need, without asking")] = False,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="leave such stages in Slurm")] = False,
    data: Data = ROOT / "data",
    results: Results = ROOT / "results",
) -> None:
    """Run every stage of an experiment that has no result, and write its tables. Safe to repeat; lifts a `cancel`."""
    from jobs.commands.grid import print_plan, run_grid
    from jobs.commands.relaunch import old_stages
    from ser_core.registry import REGISTRY

    _check_scripts(scripts, dry_run)
    if yes and keep_old:
        raise UsageError("grid: --yes and --keep-old: one of them")
    session = _launch(arguments or [], cluster, wait, data, results, dry_run=dry_run)
    if dry_run:
        print_plan(session, REGISTRY.cost_notes, scripts=scripts)
    else:
        _exit(run_grid(session, wait=bool(wait), old=old_stages(yes=yes, keep=keep_old)))


@app.command()
def resume(
    experiment: Name = None,
    wait: Wait = None,
    dry_run: DryRun = False,
    scripts: Scripts = False,
    results: Results = ROOT / "results",
) -> None:
    """Launch an experiment again with the settings it was launched with, whatever its file says now. Lifts a `cancel`."""
    from jobs.commands.grid import print_plan, run_grid
    from ser_core.registry import REGISTRY

    _check_scripts(scripts, dry_run)
    session = _relaunch(experiment, results, dry_run=dry_run)
    print_plan(session, REGISTRY.cost_notes, scripts=scripts) if dry_run else _exit(run_grid(session, wait=bool(wait)))


@app.command()
def reconcile(experiment: Name = None, results: Results = ROOT / "results") -> None:
    """One pass of the controller on Slurm: submit missing stages that are not queued or running, and a controller job if there is none."""
    from jobs.commands.grid import reconcile as reconcile_experiment

    _exit(reconcile_experiment(_reopen(experiment, results)))


@app.command()
def status(
    experiment: Annotated[str | None, typer.Argument(help="name under which it was launched; default: a line for each one")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="repeat until nothing is left to do, or Ctrl-C")] = False,
    as_json: AsJson = False,
    requests: Annotated[bool, typer.Option("--requests", help="only: how often the requested time and memory were enough")] = False,
    results: Results = ROOT / "results",
) -> None:
    """Show where an experiment stands, or a line for each one. It submits nothing."""
    if watch and as_json:
        raise UsageError("status: --json is one value: leave out --watch")
    if experiment is None:
        from jobs.commands.status_list import show_list

        if watch or requests:
            raise UsageError(f"status: {'--watch' if watch else '--requests'} is of one experiment: name it")
        show_list(shared_path(results), lambda name: _reopen(name, results, patient=False), as_json=as_json)
        return
    if requests:
        from jobs.commands.requests import show_requests

        show_requests(_reopen(experiment, results, patient=False), as_json=as_json)
        return
    from jobs.commands.status import show_status

    show_status(_reopen(experiment, results, patient=False), as_json=as_json, watch=watch)


@app.command()
def explain(words: Words, results: Results = ROOT / "results") -> None:
    """Print the history of a run: its seeds, every attempt of every stage, the retry policy applied, its artifacts, and the next step."""
    from jobs.commands.explain import print_explanation
    from jobs.experiment.lookup import experiment_and_run

    experiment, run = experiment_and_run(words, f"explain [EXPERIMENT] RUN; {RUN}")
    print_explanation(_reopen(experiment, results, patient=False), run)


@app.command()
def logs(
    words: Words,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="print new lines until the attempt ends, or Ctrl-C")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="number of the attempt; default: the newest")] = None,
    lines: Annotated[int | None, typer.Option(min=0, help="only the last N lines; default: all")] = None,
    stage: Annotated[str | None, typer.Option(help="of the run, e.g. tapt; default: the last that was started")] = None,
    results: Results = ROOT / "results",
) -> None:
    """Print the log of a run: of the newest attempt of its last stage that was started."""
    from jobs.commands.logs import print_log
    from jobs.experiment.lookup import experiment_and_run

    experiment, run = experiment_and_run(words, f"logs [EXPERIMENT] RUN; {RUN}")
    _exit(print_log(_reopen(experiment, results, patient=False), run, stage=stage, attempt=attempt, lines=lines, follow=follow))


@app.command()
def cancel(
    words: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [RUN ...]", help=f"{RUN}; default: everything")] = None,
    results: Results = ROOT / "results",
) -> None:
    """Cancel an experiment, or single runs of it, until it is launched again. Results stay; running Slurm jobs write a checkpoint."""
    from jobs.commands.cancel import print_cancellation
    from jobs.experiment.launched import without_configuration

    named = words or []
    experiment, runs = (None, named) if not named or "/" in named[0] else (named[0], named[1:])
    try:
        session = _reopen(experiment, results)
    except StoredConfigurationError:
        if runs:
            raise
        session = _session(without_configuration(Layout(shared_path(results), _chosen(experiment, results)[0])))
    print_cancellation(session, runs)


@app.command()
def collect(
    experiments: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT ...]", help="several: one table, with --out")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="latex | markdown | csv | json | html; default: all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder to write to; default: results/EXPERIMENT/tables; -: one format to standard output")
    ] = None,
    allow_incomplete: AllowIncomplete = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite complete tables with incomplete ones of fewer runs")] = False,
    source: Annotated[Path | None, typer.Option("--from", metavar="RUNS.CSV", help="results from elsewhere, one row a run")] = None,
    outliers: Annotated[str | None, typer.Option(metavar="RULE", help="with --from: pooled (default) | common | cell | none")] = None,
    unreplaced: Unreplaced = None,
    width: Width = None,
    numbers: Numbers = None,
    bold: Bold = True,
    marks: Marks = False,
    results: Results = ROOT / "results",
) -> None:
    """Write the tables of an experiment: LaTeX, Markdown, CSV, JSON, an HTML report, confusion matrices. Of several: one table."""
    from jobs.commands.collect import Asked, write_csv_tables, write_joint_tables, write_tables
    from jobs.tables.latex import style_of

    asked = Asked(formats, out, unreplaced, style_of(width, numbers, bold=bold, marks=marks), force)
    if source is not None:
        complete = write_csv_tables(source, outliers, PUBLISHED, asked)
    elif outliers is not None:
        raise UsageError("--outliers goes with --from: an experiment is judged by the rule it was launched with (policy.outliers)")
    elif experiments and len(experiments) > 1:
        complete = write_joint_tables([_reopen(name, results) for name in experiments], asked)
    else:
        session = _reopen(experiments[0] if experiments else None, results)
        complete = write_tables(session, session.look(ask_slurm=False), asked)
    _exit(complete or allow_incomplete)


@app.command()
def sweep(
    arguments: Settings = None,
    cluster: Where = None,
    wait: Annotated[bool | None, typer.Option("--wait/--detach", help="slurm: stay until it has ended; default: --detach")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the points, the stages and the hours; change nothing")] = False,
    scripts: Scripts = False,
    show: Annotated[bool, typer.Option("--show", help="state of the last sweep, and its results so far")] = False,
    cancel_it: Annotated[bool, typer.Option("--cancel", help="end it; running stages write a checkpoint, results stay")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --show: one JSON value, nothing else")] = False,
    data: Data = ROOT / "data",
    results: Results = ROOT / "results",
) -> None:
    """Search sets of cluster counts, and other settings, by validation speakers; never opens the test fold. Safe to repeat: it resumes."""
    from jobs.commands import sweep as console

    modes = [name for name, chosen in (("--dry-run", dry_run), ("--show", show), ("--cancel", cancel_it)) if chosen]
    if len(modes) > 1:
        raise UsageError(f"sweep: {' and '.join(modes)}: one at a time")
    if as_json and not show:
        raise UsageError("sweep: --json goes with --show")
    if show or cancel_it:
        named = arguments or [DEFAULT_EXPERIMENT]
        if len(named) > 1 or "=" in named[0]:
            raise UsageError(f"sweep: {modes[0]} is of the sweep launched last: `sweep [EXPERIMENT] {modes[0]}`, without settings")
        session = _reopen_sweep(named[0], results)
        _note("" if arguments else f"experiment {DEFAULT_EXPERIMENT}: the default, as none is named")
        console.show(session, as_json=as_json) if show else console.cancel(session)
        return
    _check_scripts(scripts, dry_run)
    session = _launch_sweep(arguments or [], cluster, wait, data, results, dry_run=dry_run)
    if dry_run:
        console.print_preview(session, scripts=scripts)
    else:
        _exit(console.launch(session, wait=bool(wait)))


@app.command()
def doctor(
    arguments: Settings = None,
    cluster: Where = None,
    as_json: AsJson = False,
    data: Data = ROOT / "data",
    results: Results = ROOT / "results",
) -> None:
    """Check this machine, what EXPERIMENT needs and, with --cluster slurm, the site: limits, accounting, a probe job on a node."""
    from jobs.commands.doctor import examine
    from jobs.commands.doctor_checks import check_lines, checks_to_json, exit_code
    from jobs.commands.launching import read_experiment, require_file, words_of
    from jobs.experiment.config import Cluster

    words = words_of("doctor", arguments or [], cluster, "demo")
    require_file(words.file, CONFIGS, _corpora(data))
    experiment = read_experiment(words, _code())
    slurm = experiment if experiment.cluster is Cluster.slurm else None
    needs = _needs(experiment, data) if words.named else None
    checks = examine(shared_path(results), source=ROOT, experiment=slurm, tell=lambda text: typer.echo(text, err=True), needs=needs)
    typer.echo(json.dumps(checks_to_json(checks), indent=1) if as_json else "\n".join(check_lines(checks)))
    raise typer.Exit(exit_code(checks))


def _needs(experiment: Experiment, data: Path) -> Needs:
    from jobs.commands.launching import check_corpus
    from jobs.commands.needs import Needs, stages_of
    from ser_core.models.needed_weights import needed_weights
    from ser_core.registry import REGISTRY
    from ser_core.settings import resolve_checkpoints

    problem, code = "", _code()
    methods = {name: experiment.variants[name].method if name in experiment.variants else name for name in experiment.methods}
    for recipe in experiment.recipes.values():
        resolve_checkpoints(recipe, (shared_path(Path()), ROOT))
    try:
        check_corpus(experiment, _corpus(experiment, data, True), code)
    except (UsageError, InputError) as error:
        problem = str(error)
    try:
        stages = stages_of(REGISTRY.call(methods[name], recipe, fold="", seed=0) for name, recipe in experiment.recipes.items())
    except InputError:  # of missing weights, which have a line of their own
        stages = code.stages
    weights = dict.fromkeys(each for name, recipe in experiment.recipes.items() for each in needed_weights(methods[name], recipe))
    return Needs(experiment.corpus, shared_path(data / experiment.corpus), problem, tuple(weights), stages)


def _opening(results: Path) -> Opening:
    from jobs.commands.owners import Opening
    from jobs.sweeps.records import load_sweep
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    return Opening(
        lambda name: _reopen(name, results, patient=False),
        lambda name, digest: load_sweep(Layout(shared_path(results), name), digest, REGISTRY, Recipe, ROOT),
    )


def _export(stage: str, **arguments: Any) -> Sequence[str]:
    from ser_core.registry import REGISTRY

    return REGISTRY.export(stage, **arguments)


add_bundle_commands(app, ROOT, lambda name, results: _reopen(name, results, patient=False))
add_disk_commands(app, ROOT / "results", _opening)
add_export_command(app, ROOT / "results", lambda name, results: _reopen(name, results, patient=False), _export)
add_examples(app)


@app.command(hidden=True)
def control(experiment: str, results: Results = ROOT / "results") -> None:
    """What a controller job in Slurm executes: one pass for an experiment, or a sweep of it. Exit code 1: no job for the next one."""
    from jobs.commands.passes import run_controller

    name, _, digest = experiment.partition("/sweep/")
    if digest:
        sweep = _reopen_sweep(name, results, digest, look_only=False)
        followed = run_controller(sweep, end=sweep.end)
    else:
        followed = run_controller(_reopen(name, results))
    raise typer.Exit(0 if followed else 1)


@app.command(hidden=True)
def worker(description: Path, index: Annotated[int | None, typer.Argument()] = None) -> None:
    """Execute one task of a description: what array elements run."""
    from jobs.worker.main import main as work

    raise typer.Exit(work([str(description), *([] if index is None else [str(index)])]))


def _code() -> Code:
    from jobs.commands.launching import Code
    from ser_core.registry import REGISTRY, VERSIONS
    from ser_core.settings import Recipe

    return Code(REGISTRY, REGISTRY.check, tuple(VERSIONS), Recipe, CONFIGS, PUBLISHED, REGISTRY.check_corpus)


def _launch(arguments: list[str], cluster: str | None, wait: bool | None, data: Path, results: Path, *, dry_run: bool) -> Session:
    from jobs.commands.launching import check_corpus, experiment_to_launch, words_of
    from jobs.experiment.launched import last_launch, launch
    from jobs.store.clock import measure
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    words = words_of("grid", arguments, cluster, DEFAULT_EXPERIMENT)
    experiment, where = experiment_to_launch(words, _code(), results, _corpora(data))
    layout = Layout(shared_path(results), experiment.name)
    _resolve_checkpoints(experiment, layout)
    corpus = _corpus(experiment, data, dry_run)
    check_corpus(experiment, corpus, _code())
    if not dry_run:
        measure(layout.root)
    typed = _typed("grid", arguments, cluster, wait, data, results)
    launched = launch(experiment, corpus, REGISTRY, layout, words.file, typed)
    _note(words.line, where)
    return replace(_session(launched, new=True), former=last_launch(layout, REGISTRY, Recipe))


def _relaunch(named: str | None, results: Path, *, dry_run: bool) -> Session:
    from jobs.commands.launching import check_corpus, check_experiment
    from jobs.experiment.launched import relaunch, require_same_corpus
    from jobs.store.clock import measure
    from ser_core.corpora.manifest import load_manifest
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    name, line = _chosen(named, results)
    layout = Layout(shared_path(results), name)
    if not dry_run:
        measure(layout.root)
    session = _session(relaunch(layout, REGISTRY, Recipe), new=True)
    check_experiment(session.launched.experiment, _code())
    _resolve_checkpoints(session.launched.experiment, session.launched.layout)
    require_same_corpus(session.launched, load_manifest(Path(session.launched.corpus.folder)).digest, session.hints.launch)
    check_corpus(session.launched.experiment, session.launched.corpus, _code())
    _note(line)
    return session


def _resolve_checkpoints(experiment: Experiment, *launched: Layout) -> None:
    """Make paths of checkpoints absolute, and resolve hub names to the commits of earlier launches (the last counts), else of the cache."""
    from jobs.experiment.launched import last_recipes
    from ser_core.models.identity import pin_commit
    from ser_core.settings import commits_of, resolve_checkpoints

    former = commits_of(recipe for layout in launched for recipe in last_recipes(layout))
    lines = []
    for recipe in (experiment.recipe, *experiment.recipes.values()):
        resolve_checkpoints(recipe, (shared_path(Path()), ROOT))
        lines.append(pin_commit(recipe.backbone, former))
    _note(*dict.fromkeys(lines))


def _pin_swept(experiment: Experiment, layouts: Iterable[Layout]) -> None:
    """Make paths of checkpoints absolute, and resolve every hub name that a sweep searches, as `_resolve_checkpoints`."""
    from jobs.experiment.launched import last_recipes
    from jobs.sweeps.preflight import recipes_with
    from ser_core.models.identity import pin_commit
    from ser_core.settings import commits_of, resolve_checkpoints

    former = commits_of(recipe for layout in layouts for recipe in last_recipes(layout))
    for recipe in (experiment.recipe, *experiment.recipes.values()):
        resolve_checkpoints(recipe, (shared_path(Path()), ROOT))
    lines, commits = [], experiment.recipe.backbone.commits
    for recipe in recipes_with(experiment, ("backbone.checkpoint", "backbone.revision")):
        lines.append(pin_commit(recipe.backbone, former))
        commits.update(recipe.backbone.commits)
    _note(*dict.fromkeys(lines))


def _typed(command: str, arguments: list[str], cluster: str | None, wait: bool | None, data: Path, results: Path) -> tuple[str, ...]:
    from jobs.commands.hints import launch_words

    folders = (("--data", data, ROOT / "data"), ("--results", results, ROOT / "results"))
    return launch_words(command, arguments, cluster=cluster, wait=wait, folders=folders)


def _corpora(data: Path) -> list[str]:
    """Names of the prepared corpora."""
    return sorted(path.parent.name for path in data.glob("*/manifest.json"))


def _corpus(experiment: Experiment, data: Path, dry_run: bool) -> Corpus:
    name = experiment.corpus
    folder = shared_path(data / name)
    if not (folder / "manifest.json").is_file():
        if name == "demo" and not dry_run:
            prepare("demo", data=data)
        elif name == "demo":
            raise UsageError("the demo corpus is not prepared yet: run `python launch.py prepare demo` first, or leave out --dry-run")
        else:
            kind = name if name in ("iemocap", "savee", "emodb") else {"librispeech": "unlabelled"}.get(name, "csv")
            more = "" if kind == name else f" --name {name}"
            raise UsageError(
                f"corpus {name!r} is not prepared (no {folder}): run `python launch.py prepare {kind} --source FOLDER{more}`, "
                "or try `python launch.py grid demo`, which needs no data"
            )
    return _prepared(folder)


def _prepared(folder: Path) -> Corpus:
    from jobs.experiment.launched import Corpus
    from ser_core.corpora.manifest import load_manifest

    manifest = load_manifest(folder)
    return Corpus(manifest.corpus, manifest.digest, manifest.folds, str(shared_path(folder)))


def _check_scripts(scripts: bool, dry_run: bool) -> None:
    if scripts and not dry_run:
        raise UsageError("--scripts goes with --dry-run")


def _note(*lines: str) -> None:
    from jobs.commands.console import note

    for line in filter(None, lines):
        note(line)


def _chosen(named: str | None, results: Path) -> tuple[str, str]:
    from jobs.commands.launching import chosen_experiment

    return chosen_experiment(named, results, DEFAULT_EXPERIMENT)


def _reopen(named: str | None, results: Path, *, patient: bool = True) -> Session:
    from jobs.experiment.launched import reopen
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    name, line = _chosen(named, results)
    session = _session(reopen(Layout(shared_path(results), name), REGISTRY, Recipe), patient=patient)
    _note(line)
    return session


def _session(launched: Launched, *, new: bool = False, patient: bool = True) -> Session:
    from jobs.commands.session import Session

    place = _workplace(launched.layout, launched.corpus, launched.since)
    return Session(launched, place, ROOT, PUBLISHED, PRELOAD, new=new, patient=patient)


def _launch_sweep(
    arguments: list[str], cluster: str | None, wait: bool | None, data: Path, results: Path, *, dry_run: bool
) -> SweepSession:
    """A sweep to launch. Everything that can be checked before it starts is checked here."""
    from jobs.commands.launching import experiment_to_launch, words_of
    from jobs.commands.sweep import new_sweep, session_of
    from jobs.store.clock import measure
    from jobs.sweeps.preflight import require_ray
    from jobs.sweeps.records import sweeps_of
    from jobs.sweeps.space import listed_points
    from ser_core.registry import REGISTRY

    words = words_of("sweep", arguments, cluster, DEFAULT_EXPERIMENT)
    experiment, where = experiment_to_launch(words, _code(), results, _corpora(data))
    listed_points(experiment)  # checks that need no corpus come before one is prepared
    require_ray(experiment.sweep.search)
    layout = Layout(shared_path(results), experiment.name)
    if not dry_run:
        measure(layout.root)
    _pin_swept(experiment, (*sweeps_of(layout), layout))
    corpus = _corpus(experiment, data, dry_run)
    typed = _typed("sweep", arguments, cluster, wait, data, results)
    sweep = new_sweep(experiment, words.file, corpus, layout, REGISTRY, code=ROOT, typed=typed)
    _note(words.line, where)
    return session_of(sweep, _workplace(layout, corpus, sweep.launched), ROOT, preload=PRELOAD, new=True, read_only=dry_run)


def _reopen_sweep(experiment: str, results: Path, digest: str = "", *, look_only: bool = True) -> SweepSession:
    """A sweep of an experiment, by default the one launched last. `look_only`: for a person who waits, and nothing is recorded."""
    from jobs.commands.sweep import session_of
    from jobs.sweeps.records import load_sweep, require_latest
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    layout = Layout(shared_path(results), experiment)
    sweep = load_sweep(layout, digest or require_latest(layout), REGISTRY, Recipe, ROOT)
    place = _workplace(layout, sweep.corpus, sweep.launched)
    return session_of(sweep, place, ROOT, preload=PRELOAD, patient=not look_only, read_only=look_only)


def _workplace(layout: Layout, corpus: Corpus, since: float) -> Workplace:
    from jobs.commands.launching import workplace

    return workplace(layout, corpus, since, REGISTRY_NAME, "ser_core.corpora.manifest:load_manifest", PACKAGES)


def _exit(complete: bool) -> None:
    if not complete:
        raise typer.Exit(INCOMPLETE)


def main() -> int:
    """Run the command line; errors that the user can fix are lines on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except (UsageError, SlurmUnavailableError) as error:
        typer.echo(str(error), err=True)
        return 2
    except InputError as error:
        typer.echo("\n".join(shortened(error.problems)), err=True)
        return 2
    except InternalError as error:
        typer.echo(str(error), err=True)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader closed the pipe
        return 0
    except OSError as error:
        if not is_mendable(error):
            raise
        from jobs.store.access import denied_line
        from jobs.store.disk_space import FULL

        plain = f"{error.filename or 'a file'}: {error.strerror}"
        line = denied_line(error) if isinstance(error, PermissionError) else plain
        advice = "make room there (`python launch.py clean` frees what failed)" if error.errno in FULL else "fix that"
        typer.echo(f"{line}; {advice} and run the same command again", err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
