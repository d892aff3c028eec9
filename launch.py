#!/usr/bin/env python3
"""Command line: `prepare` a corpus, launch a `grid`, look at its `status`, `collect` its tables.

Only this file knows both packages: it hands the registry of `ser_core` to `jobs`. Heavy packages are imported by the commands
that need them.
Exit codes: 0 done · 1 internal error · 2 wrong usage, configuration or data · 3 finished but incomplete.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from jobs.errors import UsageError, is_mendable
from ser_core.errors import InputError

if TYPE_CHECKING:
    from jobs.config import Experiment
    from jobs.controller import Report
    from jobs.experiment import Corpus, Launched
    from jobs.slurm import SlurmArrays
    from jobs.status import Status
    from jobs.tasks import Workplace

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs"
DEFAULT_EXPERIMENT = "iemocap"
INCOMPLETE = 3
REGISTRY_NAME = "ser_core.registry:REGISTRY"
PACKAGES = (
    *("torch", "transformers", "fairseq-fixed", "numpy", "scipy", "scikit-learn", "safetensors"),
    *("soundfile", "omegaconf", "submitit", "tensorboard"),
)

Found = TypeVar("Found")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Experiment grids on this machine or a Slurm cluster whose last step is a trustworthy table.",
)

Data = Annotated[Path, typer.Option("--data", envvar="SER_GRID_DATA", help="folder of the prepared corpora")]
Results = Annotated[Path, typer.Option("--results", envvar="SER_GRID_RESULTS", help="folder of the results")]
Name = Annotated[str, typer.Argument(metavar="[EXPERIMENT]", help="name under which the experiment was launched")]


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
    from ser_core.corpora.demo import prepare_demo
    from ser_core.corpora.prepare import prepare as prepare_corpus

    if kind == "demo":
        manifest = _with_progress("demo", lambda tick: prepare_demo(data / (name or "demo"), source or data / "demo-source", tick))
    elif source is None:
        raise UsageError(f"prepare {kind}: say where the corpus lies: --source DIR")
    else:
        found, own = source, name or (source.stem if kind in ("csv", "labels") else kind)
        if not found.exists():
            raise UsageError(f"prepare {kind}: --source {found}: no such file or folder")
        manifest = _with_progress(
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
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE ...]")] = None,
    cluster: Annotated[str | None, typer.Option(help="local | slurm; default: as the experiment says")] = None,
    wait: Annotated[bool | None, typer.Option("--wait/--detach", help="slurm: stay until all is done; default: --detach")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be reused and submitted; touch nothing")] = False,
    data: Data = ROOT / "data",
    results: Results = ROOT / "results",
) -> None:
    """Run every stage of an experiment that is not there yet, and write its tables. Safe to repeat."""
    from jobs.config import Cluster

    launched = _launch(arguments or [], cluster, data, results, dry_run=dry_run)
    slurm = launched.experiment.cluster is Cluster.slurm
    if dry_run:
        _show_plan(launched)
        return
    from jobs.experiment import store

    store(launched)
    if not slurm:
        _finish(launched, _run_here(launched))
    elif wait:
        _finish(launched, _wait_on_slurm(launched))
    else:
        _pass_on_slurm(launched)


@app.command()
def reconcile(experiment: Name = DEFAULT_EXPERIMENT, results: Results = ROOT / "results") -> None:
    """One pass of the controller: submit on Slurm whatever is missing and not under way."""
    from jobs.config import Cluster

    launched = _reopen(experiment, results)
    if launched.experiment.cluster is not Cluster.slurm:
        raise UsageError(f"{experiment} was launched on this machine: `grid {experiment}` goes on with it")
    _pass_on_slurm(launched)


@app.command()
def status(
    experiment: Name = DEFAULT_EXPERIMENT,
    watch: Annotated[bool, typer.Option("--watch", help="look again every few seconds until all is settled")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value, nothing else")] = False,
    results: Results = ROOT / "results",
) -> None:
    """Show where an experiment stands. Looks only; `reconcile` acts."""
    launched = _reopen(experiment, results)
    while True:
        now = _look(launched)
        if as_json:
            from jobs.status import status_to_json

            typer.echo(json.dumps(status_to_json(now), indent=1))
        else:
            _print_status(now, clear=watch)
        if not watch or now.complete:
            return
        time.sleep(min(5.0, launched.experiment.policy.poll_seconds))


@app.command()
def collect(
    experiment: Name = DEFAULT_EXPERIMENT,
    formats: Annotated[list[str] | None, typer.Option("--format", help="latex | markdown | csv | json; default: all")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: results/EXPERIMENT/tables")] = None,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="exit with 0 even if runs are missing")] = False,
    results: Results = ROOT / "results",
) -> None:
    """Write the tables of an experiment: LaTeX that compiles as it stands, Markdown, CSV, JSON, confusion matrices."""
    from jobs.collect import FORMATS

    unknown = [name for name in formats or () if name not in FORMATS]
    if unknown:
        raise UsageError(f"--format {unknown[0]}: known are {', '.join(FORMATS)}")
    if not _write_tables(_reopen(experiment, results), formats or list(FORMATS), out) and not allow_incomplete:
        raise typer.Exit(INCOMPLETE)


@app.command(hidden=True)
def worker(description: Path, index: Annotated[int | None, typer.Argument()] = None) -> None:
    """Execute one task of a description: what array elements run."""
    from jobs.worker import main as work

    raise typer.Exit(work([str(description), *([] if index is None else [str(index)])]))


def _launch(arguments: list[str], cluster: str | None, data: Path, results: Path, *, dry_run: bool) -> Launched:
    from jobs.config import Cluster, load_experiment
    from jobs.experiment import launch
    from jobs.layout import Layout
    from jobs.published import load_published
    from ser_core.registry import REGISTRY, VERSIONS
    from ser_core.settings import Recipe

    named = [text for text in arguments if "=" not in text]
    if len(named) > 1:
        raise UsageError(f"grid: one experiment at a time (got {', '.join(named)}); settings are given as KEY=VALUE")
    overrides = [text for text in arguments if "=" in text]
    name = named[0] if named else DEFAULT_EXPERIMENT
    experiment = load_experiment(name, overrides, configs=CONFIGS, recipe_schema=Recipe, stages=tuple(VERSIONS))
    if cluster is not None:
        if cluster not in Cluster.__members__:
            raise UsageError(f"--cluster {cluster}: known are {', '.join(Cluster.__members__)}")
        experiment = replace(experiment, cluster=Cluster[cluster])
    load_published(CONFIGS / "published.yaml", experiment.table)  # a table there is not is told now, not when all is computed
    REGISTRY.check(experiment.recipe)
    _place_checkpoints(experiment)
    layout = Layout(results.resolve(), experiment.name)
    return launch(experiment, _corpus(experiment, data, dry_run), REGISTRY, layout)


def _place_checkpoints(experiment: Experiment) -> None:
    """Jobs run elsewhere: a checkpoint that is a file or folder here is named by its absolute path."""
    for settings in (experiment.recipe.backbone, experiment.recipe.states.wav2vec):
        for base in (Path.cwd(), ROOT):
            if settings.checkpoint and (base / settings.checkpoint).exists():
                settings.checkpoint = str((base / settings.checkpoint).resolve())


def _corpus(experiment: Experiment, data: Path, dry_run: bool) -> Corpus:
    from jobs.experiment import Corpus
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


def _reopen(name: str, results: Path) -> Launched:
    from jobs.experiment import reopen
    from jobs.layout import Layout
    from ser_core.registry import REGISTRY
    from ser_core.settings import Recipe

    return reopen(Layout(results.resolve(), name), REGISTRY, Recipe)


def _workplace(launched: Launched, code: dict[str, Any]) -> Workplace:
    from jobs.tasks import Workplace

    return Workplace(
        registry=REGISTRY_NAME,
        results=str(launched.layout.root),
        experiment=launched.layout.experiment,
        corpus=launched.corpus.name,
        corpus_folder=launched.corpus.folder,
        corpus_digest=launched.corpus.digest,
        digest_of="ser_core.corpora.manifest:load_manifest",
        code=code,
        packages=PACKAGES,
    )


def _arrays(launched: Launched) -> SlurmArrays:
    from jobs.slurm import SlurmArrays

    return SlurmArrays(launched.experiment, launched.layout, _workplace(launched, {}), source=ROOT)  # the snapshot says which code


def _run_here(launched: Launched) -> Report:
    from jobs.capacity import capacity_here
    from jobs.config import resources_of
    from jobs.controller import run_local
    from jobs.local import LocalExecutor
    from jobs.provenance import code_facts

    def stopping(running: int) -> None:
        typer.echo(f"stopping: {running} running stages write a checkpoint (Ctrl-C again to stop at once)", err=True)

    executor = LocalExecutor(
        place=_workplace(launched, code_facts(ROOT)),
        layout=launched.layout,
        resources=lambda stage: resources_of(launched.experiment, stage),
        capacity=capacity_here(),
        preload=[f"{REGISTRY_NAME}.preload"],
        code=ROOT,
    )
    with executor:
        return run_local(launched.desired, executor, tell=lambda event: typer.echo(event.line), stopping=stopping)


def _wait_on_slurm(launched: Launched) -> Report:
    from jobs.controller import wait_for

    poll = launched.experiment.policy.poll_seconds
    return wait_for(launched.desired, _arrays(launched), poll_seconds=poll, tell=lambda event: typer.echo(event.line))


def _pass_on_slurm(launched: Launched) -> None:
    from jobs.controller import reconcile as one_pass

    report = one_pass(launched.desired, _arrays(launched))
    plan, name = report.plan, launched.layout.experiment
    for batch in plan.batches:
        job = next((report.in_flight[key].job for key in batch.keys if key in report.in_flight), "not taken by Slurm now")
        typer.echo(f"{batch.stage} {batch.method}: {len(batch.tasks)} tasks, array {job.partition('_')[0]}")
    typer.echo(
        f"{len(plan.reused)} stages there, {len(report.submitted)} submitted, {len(plan.waiting)} under way, "
        f"{len(plan.deferred)} deferred, {len(plan.given_up)} given up, {len(plan.blocked)} blocked"
    )
    if plan.complete:
        typer.echo(f"complete: `python launch.py collect {name}` writes the tables")
    elif plan.settled:
        _print_status(_look(launched))
        raise typer.Exit(INCOMPLETE)
    else:
        typer.echo(f"look with `python launch.py status {name}`; `python launch.py reconcile {name}` submits what failed or was deferred")


def _finish(launched: Launched, report: Report) -> None:
    """Tables, or why there are none."""
    from jobs.collect import FORMATS
    from jobs.status import problem_lines, status_of

    name = launched.layout.experiment
    if report.interrupted:
        typer.echo(f"stopped; nothing is lost: `python launch.py grid {name}` with the same settings goes on", err=True)
        raise typer.Exit(INCOMPLETE)
    now = status_of(name, launched.graph, report.facts, report.in_flight, max_attempts=launched.experiment.policy.max_attempts)
    for line in problem_lines(now):
        typer.echo(line, err=True)
    if not _write_tables(launched, list(FORMATS), None):
        typer.echo(f"not complete; logs are in {launched.layout.logs}", err=True)
        raise typer.Exit(INCOMPLETE)


def _write_tables(launched: Launched, formats: list[str], out: Path | None) -> bool:
    """Write and print the tables. Returns whether every run is in."""
    from jobs.collect import collect as write
    from jobs.experiment import read_results, table_states
    from jobs.observe import read_facts
    from jobs.published import load_published
    from jobs.status import status_of
    from jobs.tables import print_tables

    facts = read_facts(launched.graph, launched.layout, since=launched.since)
    now = status_of(launched.layout.experiment, launched.graph, facts, {}, max_attempts=launched.experiment.policy.max_attempts)
    published = load_published(CONFIGS / "published.yaml", launched.experiment.table)
    report = write(launched.layout, launched.graph, read_results(launched, facts), table_states(now), published, formats=formats, out=out)
    print_tables(report.summary, published)
    for path in report.paths:
        if path.parent.name != "confusion" and path.parent.parent.name != "confusion":
            typer.echo(str(path))
    typer.echo(f"{(launched.layout.folder if out is None else out) / 'confusion'}: one matrix per run and method")
    if not report.complete:
        shown = ", ".join(report.missing[:5]) + (f" and {len(report.missing) - 5} more" if len(report.missing) > 5 else "")
        typer.echo(f"incomplete: {len(report.missing)} runs are missing: {shown}", err=True)
    return report.complete


def _look(launched: Launched) -> Status:
    from jobs.config import Cluster
    from jobs.observe import read_facts
    from jobs.status import status_of

    in_flight, live = {}, None
    if launched.experiment.cluster is Cluster.slurm:
        arrays = _arrays(launched)
        in_flight, live = dict(arrays.look_only()), arrays.live_jobs()
    facts = read_facts(launched.graph, launched.layout, live_jobs=live, since=launched.since)
    name, attempts = launched.layout.experiment, launched.experiment.policy.max_attempts
    return status_of(name, launched.graph, facts, in_flight, max_attempts=attempts)


def _print_status(now: Status, clear: bool = False) -> None:
    from jobs.status import problem_lines, status_lines, status_table

    if not sys.stdout.isatty():
        typer.echo("\n".join(status_lines(now)))
        return
    from rich.console import Console

    console = Console()
    if clear:
        console.clear()
    console.print(status_table(now))
    for line in problem_lines(now):
        console.print(line, style="red", markup=False)


def _show_plan(launched: Launched) -> None:
    """What `grid` would do: reuse, tasks, hours, scripts."""
    from jobs.config import Cluster, resources_of
    from jobs.forecast import forecast, forecast_lines
    from jobs.observe import read_facts
    from jobs.plan import Limits, make_plan

    desired, slurm = launched.desired, launched.experiment.cluster is Cluster.slurm
    arrays = _arrays(launched) if slurm else None
    in_flight = dict(arrays.look_only()) if arrays else {}
    facts = read_facts(launched.graph, launched.layout, live_jobs=arrays.live_jobs() if arrays else None, since=launched.since)
    plan = make_plan(
        desired.graph,
        facts,
        in_flight,
        runs_per_task=desired.runs_per_task if slurm else {},
        limits=arrays.limits() if arrays else Limits(),
        max_attempts=desired.max_attempts,
    )
    expected = forecast(desired.graph, facts, plan, lambda stage: resources_of(launched.experiment, stage))
    typer.echo(f"{launched.layout.experiment}: {len(desired.graph.runs)} runs, {len(desired.graph.nodes)} stages; reused {expected.reused}")
    typer.echo("\n".join(forecast_lines(expected)))
    if arrays:
        for preview in arrays.previews(plan.batches, desired.graph, in_flight):
            typer.echo(f"\n# ---- {preview.name}\n{preview.script}")
            for call in preview.refinements:
                typer.echo(f"# then: {call}")


def _with_progress(what: str, work: Callable[[Callable[[int, int], None]], Found]) -> Found:
    """Run `work` with a callback that shows progress: a bar on a terminal, a line every ten percent elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=None)
            return work(lambda done, total: progress.update(task, completed=done, total=total))
    shown = -1

    def line(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if tenth != shown:
            shown = tenth
            typer.echo(f"{what}: {done} of {total}", err=True)

    return work(line)


def main() -> int:
    """Run the command line; errors that the user can mend are lines on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except (UsageError, InputError) as error:
        typer.echo(str(error), err=True)
        return 2
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
