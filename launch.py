#!/usr/bin/env python3
"""Command line: `prepare` a corpus, launch a `grid`, look at its `status`, `explain` a run, `collect` the tables, `sweep` settings.

Only this file knows both packages: it hands the registry of `ser_core` to `jobs`. What a command does with an experiment is in
jobs.commands.session (jobs.sweeps.session), what it prints in jobs.commands.console; heavy packages are imported by the commands
that need them.
Exit codes: 0 done · 1 internal error · 2 wrong usage, configuration or data · 3 finished but incomplete.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.errors import InternalError, SlurmUnavailableError, UsageError, is_mendable
from ser_core.errors import InputError

if TYPE_CHECKING:
    from jobs.commands.session import Launcher
    from jobs.experiment.config import Experiment
    from jobs.experiment.launched import Corpus, Launched
    from jobs.store.layout import Layout
    from jobs.sweeps.session import SweepLauncher
    from jobs.worker.task import Workplace

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs"
PUBLISHED = CONFIGS / "published.yaml"
DEFAULT_EXPERIMENT = "iemocap"
INCOMPLETE = 3
REGISTRY_NAME = "ser_core.registry:REGISTRY"
RECIPE_NAME = "ser_core.settings:Recipe"
PACKAGES = (
    *("torch", "transformers", "fairseq-fixed", "numpy", "scipy", "scikit-learn", "safetensors"),
    *("soundfile", "omegaconf", "submitit", "tensorboard"),
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Experiment grids on this machine or a Slurm cluster whose last step is a trustworthy table.",
)

Data = Annotated[Path, typer.Option("--data", envvar="SER_GRID_DATA", help="folder of the prepared corpora")]
Results = Annotated[Path, typer.Option("--results", envvar="SER_GRID_RESULTS", help="folder of the results")]
Name = Annotated[str, typer.Argument(metavar="[EXPERIMENT]", help="name under which the experiment was launched")]
RUN = "RUN: METHOD/FOLD/SLOT, or at least 6 digits of a stage's key"
Words = Annotated[list[str], typer.Argument(metavar="[EXPERIMENT] RUN", help=f"{RUN}; of two words the first is the experiment")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE ...]")]
Where = Annotated[str | None, typer.Option("--cluster", help="local | slurm; default: as the experiment says")]


@app.command()
def prepare(
    kind: Annotated[str, typer.Argument(metavar="CORPUS", help="iemocap | savee | emodb | csv | labels | demo")],
    source: Annotated[Path | None, typer.Option(help="the corpus as it was handed out; a file for csv and labels")] = None,
    name: Annotated[str | None, typer.Option(help="what the prepared corpus is called; default: its kind, or the source's name")] = None,
    audio: Annotated[Path | None, typer.Option(help="labels: folder of the recordings; default: that of the file")] = None,
    four_classes: Annotated[bool, typer.Option("--four-classes", help="emodb: only the four classes of IEMOCAP")] = False,
    check_counts: Annotated[bool, typer.Option(help="compare classes and folds with the published counts")] = True,
    data: Data = ROOT / "data",
) -> None:
    """Check a corpus, convert it to 16 kHz mono, write its manifest. Everything that is wrong is listed by file name."""
    from jobs.commands.console import with_progress
    from ser_core.corpora.demo import prepare_demo
    from ser_core.corpora.prepare import prepare as prepare_corpus

    if kind == "demo":
        manifest = with_progress("demo", lambda tick: prepare_demo(data / (name or "demo"), source or data / "demo-source", tick))
    elif source is None:
        raise UsageError(f"prepare {kind}: say where the corpus lies: --source DIR")
    else:
        found, own = source, name or (source.stem if kind in ("csv", "labels") else kind)
        if not found.exists():
            raise UsageError(f"prepare {kind}: --source {found}: no such file or folder")
        manifest = with_progress(
            own,
            lambda tick: prepare_corpus(
                kind, found, data / own, name=own, check_counts=check_counts, four_classes=four_classes, audio=audio, progress=tick
            ),
        )
    speakers = len({utterance.speaker for utterance in manifest.utterances})
    typer.echo(
        f"{manifest.corpus}: {len(manifest.utterances)} utterances, {manifest.seconds / 60:.1f} min, {speakers} speakers, "
        f"classes {', '.join(manifest.classes)}, folds {', '.join(manifest.folds)}; digest {manifest.digest[:12]}; in {manifest.folder}"
    )


@app.command()
def grid(
    arguments: Settings = None,
    cluster: Where = None,
    wait: Annotated[bool | None, typer.Option("--wait/--detach", help="slurm: stay until all is done; default: --detach")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be reused and submitted; touch nothing")] = False,
    data: Data = ROOT / "data",
    results: Results = ROOT / "results",
) -> None:
    """Run every stage of an experiment that is not there yet, and write its tables. Safe to repeat; lifts a `cancel`."""
    from jobs.commands import console
    from jobs.experiment.launched import store

    file = next((text for text in arguments or [] if "=" not in text), DEFAULT_EXPERIMENT)
    launcher = _launch(_experiment(arguments or [], cluster, "grid"), file, data, results, dry_run=dry_run)
    if dry_run:
        console.print_plan(launcher)
        return
    if launcher.on_slurm:
        launcher.arrays.limits()  # that Slurm does not answer is told before anything is written
    store(launcher.launched)
    if launcher.on_slurm:
        launcher.hand_on_code()
    if not launcher.on_slurm:
        _exit(console.finish(launcher, launcher.run_here(tell=console.tell, stopping=console.stopping)))
    elif wait:
        _exit(console.finish(launcher, launcher.wait_on_slurm(tell=console.tell)))
    else:
        _exit(console.make_pass(launcher))


@app.command()
def reconcile(experiment: Name = DEFAULT_EXPERIMENT, results: Results = ROOT / "results") -> None:
    """One pass of the controller on Slurm: submit whatever is missing and not under way, and see to it that a controller is there."""
    from jobs.commands.console import make_pass

    launcher = _reopen(experiment, results)
    if not launcher.on_slurm:
        raise UsageError(f"{experiment} was launched on this machine: `grid {experiment}` goes on with it")
    if launcher.cancelled:
        raise UsageError(f"{experiment} is cancelled: `{launcher.command}` with the same settings goes on")
    _exit(make_pass(launcher))


@app.command()
def status(
    experiment: Name = DEFAULT_EXPERIMENT,
    watch: Annotated[bool, typer.Option("--watch", help="again and again until nothing is left to do")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value, nothing else")] = False,
    look: Annotated[bool, typer.Option("--look", help="only look: make no pass of the controller")] = False,
    requests: Annotated[bool, typer.Option("--requests", help="only: was the time and memory enough that was asked of Slurm?")] = False,
    results: Results = ROOT / "results",
) -> None:
    """Show where an experiment stands. On Slurm it also submits whatever is missing, as every pass of the controller does."""
    from jobs.commands.console import show_requests, show_status

    if watch and as_json:
        raise UsageError("status: --json is one value: leave out --watch")
    if requests:
        show_requests(_reopen(experiment, results, patient=False), as_json=as_json)
        return
    show_status(_reopen(experiment, results, patient=False), look_only=look, as_json=as_json, watch=watch)


@app.command()
def explain(words: Words, results: Results = ROOT / "results") -> None:
    """Print what happened to a run: its seeds, every attempt of every stage, the policy that followed, and what comes next."""
    from jobs.commands.console import print_explanation

    experiment, run = _named(words, "explain")
    print_explanation(_reopen(experiment, results, patient=False), run)


@app.command()
def logs(
    words: Words,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on as it grows, until the attempt is over or Ctrl-C")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="number of the attempt; default: the newest")] = None,
    lines: Annotated[int | None, typer.Option(min=0, help="only the last N lines; default: all")] = None,
    stage: Annotated[str | None, typer.Option(help="of the run, e.g. tapt; default: the last that was begun")] = None,
    results: Results = ROOT / "results",
) -> None:
    """Print the log of a run: of the newest attempt of its last stage that was begun."""
    from jobs.commands.console import print_log

    experiment, run = _named(words, "logs")
    _exit(print_log(_reopen(experiment, results, patient=False), run, stage=stage, attempt=attempt, lines=lines, follow=follow))


@app.command()
def cancel(
    words: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [RUN ...]", help=f"{RUN}; default: everything")] = None,
    results: Results = ROOT / "results",
) -> None:
    """Cancel an experiment, or single runs of it, until it is launched again. Results stay; what runs on Slurm leaves a checkpoint."""
    from jobs.commands.console import print_cancellation

    named = words or []
    experiment, runs = (DEFAULT_EXPERIMENT, named) if not named or "/" in named[0] else (named[0], named[1:])
    launcher = _reopen(experiment, results)
    print_cancellation(launcher.cancel(runs), launcher, whole=not runs)


@app.command()
def collect(
    experiment: Name = DEFAULT_EXPERIMENT,
    formats: Annotated[list[str] | None, typer.Option("--format", help="latex | markdown | csv | json; default: all")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: results/EXPERIMENT/tables")] = None,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="exit with 0 even if runs are missing")] = False,
    source: Annotated[Path | None, typer.Option("--from", metavar="RUNS.CSV", help="results from elsewhere, one row a run")] = None,
    outliers: Annotated[str | None, typer.Option(metavar="RULE", help="with --from: pooled (default) | cell | none")] = None,
    results: Results = ROOT / "results",
) -> None:
    """Write the tables of an experiment: LaTeX that compiles as it stands, Markdown, CSV, JSON, confusion matrices."""
    from jobs.commands.console import write_foreign_tables, write_tables
    from jobs.tables.collect import check_formats

    check_formats(formats or ())
    if source is not None:
        complete = write_foreign_tables(source, outliers, PUBLISHED, formats, out)
    elif outliers is not None:
        raise UsageError("--outliers goes with --from: an experiment is judged by the rule it was launched with (policy.outliers)")
    else:
        launcher = _reopen(experiment, results)
        complete = write_tables(launcher, launcher.look(ask_slurm=False), formats, out)
    _exit(complete or allow_incomplete)


@app.command()
def sweep(
    arguments: Settings = None,
    cluster: Where = None,
    wait: Annotated[bool | None, typer.Option("--wait/--detach", help="slurm: stay until it has ended; default: --detach")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the points, the stages and the hours; touch nothing")] = False,
    show: Annotated[bool, typer.Option("--show", help="where the last sweep stands, and what it says so far")] = False,
    cancel_it: Annotated[bool, typer.Option("--cancel", help="end it; stages under way leave a checkpoint, results stay")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --show: one JSON value, nothing else")] = False,
    data: Data = ROOT / "data",
    results: Results = ROOT / "results",
) -> None:
    """Search sets of cluster counts, and other settings, by validation speakers; never opens the test fold. Safe to repeat: it goes on."""
    from jobs.commands import sweep as console

    modes = [name for name, chosen in (("--dry-run", dry_run), ("--show", show), ("--cancel", cancel_it)) if chosen]
    if len(modes) > 1:
        raise UsageError(f"sweep: {' and '.join(modes)}: one at a time")
    if as_json and not show:
        raise UsageError("sweep: --json goes with --show")
    if show or cancel_it:
        launcher = _reopen_sweep(arguments or [], modes[0], results)
        console.show(launcher, as_json=as_json) if show else console.cancel(launcher)
        return
    launcher = _launch_sweep(arguments or [], cluster, data, results, dry_run=dry_run)
    if dry_run:
        console.print_preview(launcher)
    elif not launcher.on_slurm:
        _exit(console.run_here(launcher))
    else:
        _exit(console.run_on_slurm(launcher, wait=bool(wait)))


@app.command(hidden=True)
def tune(folder: Path) -> None:
    """Drive a sweep inside the Ray of its allocation: what the first node runs."""
    from jobs.commands.sweep import drive

    _exit(drive(folder))


@app.command()
def doctor(
    arguments: Settings = None,
    cluster: Where = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value, nothing else")] = False,
    results: Results = ROOT / "results",
) -> None:
    """Say what this machine can do and, with --cluster slurm, what the site can: limits, accounting, a probe job on a compute node."""
    from jobs.commands.doctor import examine
    from jobs.commands.doctor_checks import check_lines, checks_to_json, exit_code
    from jobs.experiment.config import Cluster

    experiment = _experiment(arguments or ["demo"], cluster, "doctor")
    slurm = experiment if experiment.cluster is Cluster.slurm else None
    checks = examine(results.resolve(), source=ROOT, experiment=slurm, tell=lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(checks_to_json(checks), indent=1) if as_json else "\n".join(check_lines(checks)))
    raise typer.Exit(exit_code(checks))


@app.command(hidden=True)
def control(experiment: str, results: Results = ROOT / "results") -> None:
    """One link of the chain of controllers: what the small job in Slurm runs."""
    from jobs.commands.console import serve_as_link

    serve_as_link(_reopen(experiment, results))


@app.command(hidden=True)
def worker(description: Path, index: Annotated[int | None, typer.Argument()] = None) -> None:
    """Execute one task of a description: what array elements run."""
    from jobs.worker.main import main as work

    raise typer.Exit(work([str(description), *([] if index is None else [str(index)])]))


def _experiment(arguments: list[str], cluster: str | None, command: str) -> Experiment:
    """The experiment that `[EXPERIMENT] [KEY=VALUE ...]` names, checked as far as can be without its corpus."""
    from jobs.commands.notify import check_notify
    from jobs.control.outliers import check_rule
    from jobs.experiment.config import Cluster, load_experiment
    from jobs.tables.published import load_published
    from ser_core.registry import REGISTRY, VERSIONS
    from ser_core.settings import Recipe

    named = [text for text in arguments if "=" not in text]
    if len(named) > 1:
        raise UsageError(f"{command}: one experiment at a time (got {', '.join(named)}); settings are given as KEY=VALUE")
    overrides = [text for text in arguments if "=" in text]
    name = named[0] if named else DEFAULT_EXPERIMENT
    experiment = load_experiment(name, overrides, configs=CONFIGS, recipe_schema=Recipe, stages=tuple(VERSIONS), teams=REGISTRY.teams)
    if cluster is not None:
        if cluster not in Cluster.__members__:
            raise UsageError(f"--cluster {cluster}: known are {', '.join(Cluster.__members__)}")
        experiment = replace(experiment, cluster=Cluster[cluster])
    load_published(PUBLISHED, experiment.table)  # what cannot end well is told now, not when all is computed
    REGISTRY.check(experiment.recipe)
    check_rule(experiment.policy.outliers, experiment.seeds, experiment.policy.sigmas)
    check_notify(experiment.policy)
    return experiment


def _launch(experiment: Experiment, file: str, data: Path, results: Path, *, dry_run: bool) -> Launcher:
    from jobs.experiment.launched import launch
    from jobs.store.layout import Layout
    from ser_core.registry import REGISTRY

    _place_checkpoints(experiment)
    layout = Layout(results.resolve(), experiment.name)
    return _launcher(launch(experiment, _corpus(experiment, data, dry_run), REGISTRY, layout, file), new=True)


def _place_checkpoints(experiment: Experiment) -> None:
    """Jobs run elsewhere: a checkpoint that is a file or folder here is named by its absolute path."""
    for settings in (experiment.recipe.backbone, experiment.recipe.states.wav2vec):
        for base in (Path.cwd(), ROOT):
            if settings.checkpoint and (base / settings.checkpoint).exists():
                settings.checkpoint = str((base / settings.checkpoint).resolve())


def _corpus(experiment: Experiment, data: Path, dry_run: bool) -> Corpus:
    from jobs.experiment.launched import Corpus
    from ser_core.corpora.manifest import load_manifest

    name = experiment.corpus
    folder = (data / name).resolve()
    if not (folder / "manifest.json").is_file():
        if name == "demo" and not dry_run:
            prepare("demo", data=data)
        elif name == "demo":
            raise UsageError("the demo corpus is not there yet: run `python launch.py prepare demo` first, or leave out --dry-run")
        else:
            kind = name if name in ("iemocap", "savee", "emodb") else "csv"
            more = "" if kind == name else f" --name {name}"
            raise UsageError(
                f"corpus {name!r} is not prepared (no {folder}): run `python launch.py prepare {kind} --source WHERE_IT_LIES{more}`, "
                "or try `python launch.py grid demo`, which needs no data"
            )
    manifest = load_manifest(folder)
    return Corpus(manifest.corpus, manifest.digest, manifest.folds, str(folder))


def _reopen(name: str, results: Path, *, patient: bool = True) -> Launcher:
    from jobs.experiment.launched import reopen
    from jobs.store.layout import Layout
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    return _launcher(reopen(Layout(results.resolve(), name), REGISTRY, Recipe), patient=patient)


def _launcher(launched: Launched, *, new: bool = False, patient: bool = True) -> Launcher:
    from jobs.commands.session import Launcher

    place = _workplace(launched.layout, launched.corpus, launched.since)
    preload = [f"{REGISTRY_NAME}.preload"]
    return Launcher(launched, place, ROOT, PUBLISHED, preload=preload, new=new, patient=patient)


def _launch_sweep(arguments: list[str], cluster: str | None, data: Path, results: Path, *, dry_run: bool) -> SweepLauncher:
    """A sweep, checked to the last thing that can be told before it begins."""
    from jobs.store.layout import Layout
    from jobs.sweeps.preflight import check_sweep, points_of, require_ray
    from jobs.sweeps.records import Sweep
    from jobs.sweeps.session import SweepLauncher
    from jobs.sweeps.space import space_of
    from jobs.sweeps.trial import sweep_digest
    from ser_core.registry import REGISTRY

    experiment = _experiment(arguments, cluster, "sweep")
    space = space_of(experiment)
    points_of(experiment, space)  # what needs no corpus is told before one is made
    require_ray(experiment.sweep.search)
    _place_checkpoints(experiment)
    corpus, layout = _corpus(experiment, data, dry_run), Layout(results.resolve(), experiment.name)
    validation = check_sweep(experiment, space, REGISTRY, corpus)
    since = time.time()
    found = Sweep(
        experiment=experiment,
        config=next((text for text in arguments if "=" not in text), DEFAULT_EXPERIMENT),
        corpus=corpus,
        layout=layout,
        place=_workplace(layout, corpus, since),
        recipe_schema=RECIPE_NAME,
        validation=validation,
        launched=since,
        digest=sweep_digest(experiment, corpus, validation, REGISTRY),
        code=str(ROOT),
        preload=(f"{REGISTRY_NAME}.preload",),
    )
    return SweepLauncher(found, REGISTRY, ROOT)


def _reopen_sweep(arguments: list[str], mode: str, results: Path) -> SweepLauncher:
    """The sweep of an experiment that was launched last."""
    from jobs.store.layout import Layout
    from jobs.sweeps.session import SweepLauncher, reopen
    from ser_core.registry import REGISTRY

    if len(arguments) > 1 or any("=" in text for text in arguments):
        raise UsageError(f"sweep: {mode} is of the sweep launched last: `sweep [EXPERIMENT] {mode}`, without settings")
    layout = Layout(results.resolve(), arguments[0] if arguments else DEFAULT_EXPERIMENT)
    return SweepLauncher(reopen(layout), REGISTRY, ROOT)


def _workplace(layout: Layout, corpus: Corpus, since: float) -> Workplace:
    from jobs.worker.task import Workplace

    return Workplace(
        registry=REGISTRY_NAME,
        results=str(layout.root),
        experiment=layout.experiment,
        corpus=corpus.name,
        corpus_folder=corpus.folder,
        corpus_digest=corpus.digest,
        digest_of="ser_core.corpora.manifest:load_manifest",
        packages=PACKAGES,
        launched=since,
    )


def _named(words: list[str], command: str) -> tuple[str, str]:
    """The experiment and the run of `[EXPERIMENT] RUN`."""
    from jobs.commands.explain import names_run

    if len(words) > 2:
        raise UsageError(f"{command}: one run at a time: {command} [EXPERIMENT] RUN")
    if len(words) == 1 and not names_run(words[0]):
        raise UsageError(f"{command}: {words[0]!r} names no run: {command} [EXPERIMENT] RUN; {RUN}")
    return (words[0] if len(words) == 2 else DEFAULT_EXPERIMENT), words[-1]


def _exit(complete: bool) -> None:
    if not complete:
        raise typer.Exit(INCOMPLETE)


def main() -> int:
    """Run the command line; errors that the user can mend are lines on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except (UsageError, SlurmUnavailableError, InputError) as error:
        typer.echo(str(error), err=True)
        return 2
    except InternalError as error:
        typer.echo(str(error), err=True)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say to it
        return 0
    except OSError as error:
        if not is_mendable(error):
            raise
        typer.echo(f"{error.filename or 'a file'}: {error.strerror}; mend that and run the same command again", err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
