"""`init` writes the file of an experiment on a prepared corpus, with every key explained; `config` prints settings and their sources."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from jobs.commands.console import note, print_lines, say
from jobs.commands.launching import Words, read_experiment
from jobs.commands.program import Program
from jobs.errors import UsageError
from jobs.experiment.launched import Corpus
from jobs.experiment.layers import experiment_file, read_yaml
from jobs.experiment.origins import setting_lines, settings_of
from jobs.experiment.schema_keys import experiment_keys
from jobs.experiment.template import render
from jobs.store.layout import valid_experiment_name
from jobs.text import counted, did_you_mean


def prepared_corpus(name: str, corpora: Collection[str]) -> str:
    """The name, if a corpus of that name is prepared. UsageError otherwise."""
    if name not in corpora:
        hint = did_you_mean(name, corpora, otherwise=f"prepared are: {', '.join(corpora) or 'none'}")
        command = f"`python launch.py prepare csv --source FILE.csv --name {name}`"
        raise UsageError(f"--corpus {name}: no prepared corpus of that name; {hint}; {command} prepares one")
    return name


def write_experiment(name: str, corpus: Corpus, like: str, out: Path | None, program: Program) -> Path:
    """Write the file of a new experiment with the settings of another one, and print what to do next. Returns the file.

    What the other one says of its own corpus (`folds`, `table`) is left out. UsageError for a file that exists.
    """
    file = out or program.own_configs / "experiment" / f"{name}.yaml"
    if out is None:
        file.parent.mkdir(parents=True, exist_ok=True)
    if not valid_experiment_name(name):
        raise UsageError(f"init {name}: use letters, digits, '_', '.', '-' (at most 64), and not 'store'")
    if file.exists():
        raise UsageError(f"{file} exists: edit it, or choose another name")
    if not file.parent.is_dir():
        raise UsageError(f"--out {file}: no such folder {file.parent}")
    like = program.file_of(like)
    origin = read_experiment(Words(like, ()), program)
    values = values_like(cast(Mapping[str, Any], _plain(experiment_file(like, program.configs))), name, corpus.name)
    head = (
        f"Experiment {name} on the corpus {corpus.name} ({counted(len(corpus.folds), 'fold')}), with the settings of {origin.name}.",
        "A key in a comment has the default that it shows; delete the `# ` before it to set it. See docs/experiments.md.",
        f"`python launch.py config {out or name} --changed` prints what is set, and where.",
    )
    file.write_text(render(head, experiment_keys(program.plugin(origin.registry).registry.recipe_schema), values), encoding="utf-8")
    named = str(out) if out else name
    size = ", ".join(counted(*each) for each in ((len(origin.methods), "method"), (len(corpus.folds), "fold"), (origin.seeds, "seed")))
    say(f"{file}: {size}, with the settings of {origin.name}")
    check, dry_run = f"`python launch.py doctor {named}`", f"`python launch.py grid {named} --dry-run`"
    note(f"next: {check} checks what it needs, {dry_run} shows what it would compute")
    return file


def values_like(values: Mapping[str, Any], name: str, corpus: str) -> dict[str, Any]:
    """The settings of an experiment for another name and corpus; nested, as in its file."""
    own = dict(values)
    if own.get("corpus") != corpus:
        own.pop("folds", None)
        own.pop("table", None)
        if isinstance(own.get("sweep"), Mapping):
            own["sweep"] = {key: value for key, value in own["sweep"].items() if key != "folds"}
    return {**own, "name": name, "corpus": corpus}


def print_config(words: Words, program: Program, *, changed: bool) -> None:
    """Print each setting of an experiment as `KEY=VALUE  # source`; `changed`: without those at their default."""
    experiment = read_experiment(words, program)
    settings = settings_of(experiment, words.file, words.overrides, program.configs, cluster_typed=words.cluster is not None)
    here = f"{Path.cwd()}/"
    print_lines(setting_lines([replace(each, source=each.source.removeprefix(here)) for each in settings], changed=changed))


def _plain(file: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(read_yaml(file), resolve=False)
