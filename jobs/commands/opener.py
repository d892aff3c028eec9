"""Opens experiments and sweeps for the commands: to launch, launched again, or as they were launched; each with its own registry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.console import note, say, with_progress
from jobs.commands.launching import check_corpus, check_experiment, chosen_experiment, workplace
from jobs.commands.program import Program
from jobs.commands.session import Session
from jobs.control.required_artifacts import require_artifacts
from jobs.errors import StoredConfigurationError, UsageError, problems_of
from jobs.experiment.launched import (
    Corpus,
    Launched,
    last_launch,
    last_recipes,
    launch,
    relaunch,
    reopen,
    require_same_corpus,
    stored_registry,
    without_configuration,
)
from jobs.experiment.layers import experiment_file, registry_name
from jobs.store.clock import measure
from jobs.store.layout import Layout, shared_path

if TYPE_CHECKING:
    from jobs.commands.launching import Words
    from jobs.commands.needs import Needs
    from jobs.commands.owners import Opening
    from jobs.commands.sweep import SweepSession
    from jobs.experiment.config import Experiment
    from jobs.experiment.plugin import Plugin, Weights
    from jobs.sweeps.records import Sweep


@dataclass(frozen=True)
class Place:
    """The folders of a command."""

    data: Path
    results: Path

    def layout(self, experiment: str) -> Layout:
        return Layout(shared_path(self.results), experiment)


@dataclass(frozen=True)
class Opener:
    """Opens the experiments of one program."""

    program: Program

    def launch(self, words: Words, place: Place, typed: tuple[str, ...], *, dry_run: bool) -> Session:
        """An experiment to launch with the settings of its file. Everything that can be checked before it starts is checked here."""
        experiment, where = self._experiment(words, place)
        plugin, layout = self.program.plugin(experiment.registry), place.layout(experiment.name)
        self._resolve(experiment, plugin, layout)
        corpus = self._corpus(experiment, plugin, place.data, dry_run=dry_run)
        check_corpus(experiment, corpus, self.program)
        if not dry_run:
            measure(layout.root)
        launched = launch(experiment, corpus, plugin.registry, layout, words.file, typed)
        require_artifacts(launched.graph, layout)
        missing = [f"{each.key}: {each.missing}" for each in _weights(experiment, plugin) if each.missing and not each.downloadable]
        _note(words.line, where, *missing)
        former = self._stored_plugin(layout, otherwise=plugin).registry
        return replace(self._session(launched, plugin, new=True), former=last_launch(layout, former, former.recipe_schema))

    def relaunch(self, named: str | None, results: Path, *, dry_run: bool) -> Session:
        """An experiment to launch with the settings of its last launch."""
        name, line = self.chosen(named, results)
        layout = Layout(shared_path(results), name)
        if not dry_run:
            measure(layout.root)
        plugin = self._stored_plugin(layout)
        session = self._session(relaunch(layout, plugin.registry, plugin.registry.recipe_schema), plugin, new=True)
        launched = session.launched
        check_experiment(launched.experiment, self.program)
        self._resolve(launched.experiment, plugin, launched.layout)
        require_same_corpus(launched, plugin.registry.load_corpus(Path(launched.corpus.folder)).digest, session.hints.launch)
        check_corpus(launched.experiment, launched.corpus, self.program)
        require_artifacts(launched.graph, layout)
        _note(line)
        return session

    def reopen(self, named: str | None, results: Path, *, patient: bool = True) -> Session:
        """An experiment as it was launched last. `patient` False: Slurm is asked once, because a person waits for the answer."""
        name, line = self.chosen(named, results)
        layout = Layout(shared_path(results), name)
        plugin = self._stored_plugin(layout)
        session = self._session(reopen(layout, plugin.registry, plugin.registry.recipe_schema), plugin, patient=patient)
        _note(line)
        return session

    def without_configuration(self, named: str | None, results: Path) -> Session:
        """What `cancel` needs of an experiment whose settings cannot be read."""
        layout = Layout(shared_path(results), self.chosen(named, results)[0])
        return self._session(without_configuration(layout), None)

    def launch_sweep(self, words: Words, place: Place, typed: tuple[str, ...], *, dry_run: bool) -> SweepSession:
        """A sweep to launch. Everything that can be checked before it starts is checked here."""
        from jobs.commands.sweep import new_sweep, session_of
        from jobs.sweeps.preflight import recipes_with, require_ray
        from jobs.sweeps.records import sweeps_of
        from jobs.sweeps.space import listed_points

        experiment, where = self._experiment(words, place, sweep=True)
        listed_points(experiment)  # checks that need no corpus come before one is prepared
        require_ray(experiment.sweep.search)
        plugin, layout = self.program.plugin(experiment.registry), place.layout(experiment.name)
        if not dry_run:
            measure(layout.root)
        self._locate(experiment, plugin)
        former = [recipe for each in (*sweeps_of(layout), layout) for recipe in last_recipes(each)]
        _note(*plugin.registry.pin(experiment.recipe, former, recipes_with(experiment, tuple(plugin.registry.pinned_keys))))
        corpus = self._corpus(experiment, plugin, place.data, dry_run=dry_run)
        sweep = new_sweep(experiment, words.file, corpus, layout, plugin.registry, code=self.program.root, typed=typed)
        _note(words.line, where)
        place_of_stages = workplace(layout, corpus, sweep.launched, plugin)
        return session_of(sweep, place_of_stages, self.program.root, preload=(plugin.preload,), new=True, read_only=dry_run)

    def reopen_sweep(self, experiment: str, results: Path, digest: str = "", *, look_only: bool = True) -> SweepSession:
        """A sweep of an experiment, by default the one launched last. `look_only`: for a person who waits, and nothing is recorded."""
        from jobs.commands.sweep import session_of
        from jobs.sweeps.records import require_latest

        layout = Layout(shared_path(results), experiment)
        sweep, plugin = self._sweep(layout, digest or require_latest(layout))
        place = workplace(layout, sweep.corpus, sweep.launched, plugin)
        return session_of(sweep, place, self.program.root, preload=(plugin.preload,), patient=not look_only, read_only=look_only)

    def records(self, results: Path) -> Opening:
        """How the commands on a whole folder of results open what is in it."""
        from jobs.commands.owners import Opening

        def grid(name: str) -> Session:
            return self.reopen(name, results, patient=False)

        return Opening(grid, lambda name, digest: self._sweep(Layout(shared_path(results), name), digest)[0])

    def needs(self, experiment: Experiment, data: Path) -> Needs:
        """What an experiment needs beside a site that works, for `doctor`."""
        from jobs.commands.needs import Needs, stages_of

        registry, problem = self.program.plugin(experiment.registry).registry, ""
        for recipe in experiment.recipes.values():
            registry.locate(recipe, self._folders)
        try:
            corpus = self._corpus(experiment, self.program.plugin(experiment.registry), data, dry_run=True)
            check_corpus(experiment, corpus, self.program)
        except Exception as error:
            if not (isinstance(error, UsageError) or problems_of(error)):
                raise
            problem = str(error)
        try:
            stages = stages_of(registry.calls(experiment.method_of(name), recipe)("", 0) for name, recipe in experiment.recipes.items())
        except Exception as error:
            if not problems_of(error):  # of missing weights, which have a line of their own
                raise
            stages = tuple(registry.stages)
        weights = _weights(experiment, self.program.plugin(experiment.registry))
        return Needs(experiment.corpus, shared_path(data / experiment.corpus), problem, weights, stages)

    def chosen(self, named: str | None, results: Path) -> tuple[str, str]:
        """The experiment that a command is about, and a line that names it where the user did not."""
        return chosen_experiment(named, results, self.program.experiment)

    def prepared(self, folder: Path, like: str) -> Corpus:
        """A prepared corpus, as the registry of the experiment `like` reads it."""
        file = experiment_file(self.program.file_of(like), self.program.configs)
        try:
            return self._prepared(folder, self.program.plugin(registry_name(file, ())))
        except Exception as error:
            if not problems_of(error):
                raise
            raise UsageError(f"{error}; of a corpus that another registry reads, name an experiment with --like") from error

    def _prepared(self, folder: Path, plugin: Plugin) -> Corpus:
        found = plugin.registry.load_corpus(folder)
        return Corpus(found.corpus, found.digest, tuple(found.folds), str(shared_path(folder)), tuple(found.caption))

    def _experiment(self, words: Words, place: Place, *, sweep: bool = False) -> tuple[Experiment, str]:
        from jobs.commands.launching import experiment_to_launch

        return experiment_to_launch(words, self.program, place.results, corpora(place.data), sweep=sweep)

    def _sweep(self, layout: Layout, digest: str) -> tuple[Sweep, Plugin]:
        from jobs.sweeps.records import load_sweep, sweep_layout

        plugin = self._stored_plugin(sweep_layout(layout, digest))
        return load_sweep(layout, digest, plugin.registry, plugin.registry.recipe_schema, self.program.root), plugin

    def _session(self, launched: Launched, plugin: Plugin | None, *, new: bool = False, patient: bool = True) -> Session:
        """`plugin` None: of an experiment whose registry is not known, which can only be cancelled."""
        known = plugin or self.program.plugin("")
        place = workplace(launched.layout, launched.corpus, launched.since, known)
        return Session(
            launched, place, self.program.root, self.program.published, (known.preload,), new=new, patient=patient, home=self.program.home
        )

    def _stored_plugin(self, layout: Layout, otherwise: Plugin | None = None) -> Plugin:
        """The registry of an experiment's last launch. StoredConfigurationError, or `otherwise`, if it cannot be imported any more."""
        name = stored_registry(layout)
        try:
            return self.program.plugin(name)
        except UsageError as error:
            if otherwise is not None:
                return otherwise
            raise StoredConfigurationError(f"stored configuration of {layout.experiment}: {error}") from error

    @property
    def _folders(self) -> tuple[Path, Path]:
        """Where names of files in a recipe are looked for: where the user stands, and in the folder of the program."""
        return shared_path(Path()), self.program.root

    def _locate(self, experiment: Experiment, plugin: Plugin) -> None:
        for recipe in (experiment.recipe, *experiment.recipes.values()):
            plugin.registry.locate(recipe, self._folders)

    def _resolve(self, experiment: Experiment, plugin: Plugin, layout: Layout) -> None:
        """Make names of files in the recipes absolute, and resolve names that may change as at earlier launches."""
        self._locate(experiment, plugin)
        former = last_recipes(layout)
        recipes = (experiment.recipe, *experiment.recipes.values())
        _note(*dict.fromkeys(line for recipe in recipes for line in plugin.registry.pin(recipe, former)))

    def _corpus(self, experiment: Experiment, plugin: Plugin, data: Path, *, dry_run: bool) -> Corpus:
        """The prepared corpus of an experiment, made if that needs no source; the recipes get what their methods read of it."""
        name = experiment.corpus
        folder = shared_path(data / name)
        if not is_prepared(folder):
            if name not in plugin.registry.makes:
                how = plugin.registry.how_to_prepare(name) or f"prepare it there{_made(plugin)}"
                raise UsageError(f"corpus {name!r} is not prepared (no {folder}): {how}")
            if dry_run:
                first = f"run `python launch.py prepare {name}` first, or leave" if plugin.name == self.program.registry else "leave"
                raise UsageError(f"the {name} corpus is not prepared yet: {first} out --dry-run")
            say(with_progress(name, lambda tick: plugin.registry.make_corpus(name, folder, tick)))
        for method, recipe in experiment.recipes.items():
            variant = experiment.variants.get(method)
            plugin.registry.pin_corpus(method if variant is None else variant.method, recipe, folder)
        return self._prepared(folder, plugin)


def _weights(experiment: Experiment, plugin: Plugin) -> tuple[Weights, ...]:
    """The checkpoints that the methods of an experiment need, each once."""
    methods = ((experiment.method_of(name), recipe) for name, recipe in experiment.recipes.items())
    return tuple(dict.fromkeys(each for method, recipe in methods for each in plugin.registry.needed_weights(method, recipe)))


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared corpus: it has a manifest."""
    return (folder / "manifest.json").is_file()


def corpora(data: Path) -> list[str]:
    """Names of the prepared corpora."""
    return sorted(path.parent.name for path in data.glob("*/manifest.json"))


def _note(*lines: str) -> None:
    for line in filter(None, lines):
        note(line)


def _made(plugin: Plugin) -> str:
    """Names the corpora that the registry makes, for the message on another one."""
    return f", or name one that the registry makes: {', '.join(plugin.registry.makes)}" if plugin.registry.makes else ""
