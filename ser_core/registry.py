"""Methods and stages: which stages a run needs, the settings that identify each stage, and the entry point that computes one.

The command line imports this module at every start, so it does not import torch: `run` and `preload` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Unpack

from ser_core.corpora.lines import corpus_line, how_to_prepare
from ser_core.corpora.manifest import Manifest, load_manifest
from ser_core.corpora.validation import is_fixed_part, validation_speakers
from ser_core.cost_notes import cost_notes
from ser_core.errors import InputError
from ser_core.keyed import keyed, plain
from ser_core.models.identity import backbone_identity, backbone_origin, pin_commit, wav2vec_identity, wav2vec_origin
from ser_core.models.model_types import method_problem, model_type_of
from ser_core.models.text_identity import text_identity, text_origin
from ser_core.parallel.team import Team
from ser_core.preflight import corpus_problems, trained_on, training_frames
from ser_core.recipe_checks import recipe_problems
from ser_core.settings.finetune import Keep
from ser_core.settings.recipe import Protocol, Recipe, commits_of, resolve_checkpoints
from ser_core.settings.text import AudioMethod
from ser_core.sweep import stage_proxies
from ser_core.two_stages import WHOLE, enter_source, two_stage_key

if TYPE_CHECKING:
    from ser_core.models.needed_weights import NeededWeights

METHODS = ("vft", "tapt", "ptapt", "text", "score", "concat", "cross")
AUDIO = ("vft", "tapt", "ptapt")  # the methods of an experiment that names none
SCORED = ("finetune", "text", "score", "concat", "cross")  # stages that are tested
MEASUREMENTS = ("pretraining_loss",)  # methods that train nothing and have no score: one stage for a whole corpus

FUSIONS = ("score", "concat")  # methods that fuse two runs of the same fold and seed
POOLED = "pooled.safetensors"  # artifact of audio and text runs that `concat` reads (ser_core.training.pooled)
READ_TEXT = ("text", *FUSIONS, "cross")  # methods that read transcripts

# Part of a stage's key: increment it when a stage computes something else, so that existing artifacts are not reused.
VERSIONS: Mapping[str, int] = {
    "states": 3,
    "cluster": 2,
    "tapt": 3,
    "ptapt": 3,
    "source": 1,
    "finetune": 4,
    "text": 1,
    "score": 1,
    "concat": 1,
    "cross": 1,
    "pretraining_loss": 1,
}


@dataclass(frozen=True)
class StageCall:
    """One stage and everything that determines its output except the corpus; `runtime` affects speed and memory only, not the output."""

    stage: str
    version: int
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    fold: str
    seed: int
    upstream: Mapping[str, StageCall] = field(default_factory=dict)  # role -> stage


class StageArguments(TypedDict):
    """Keyword arguments of `SpeechRegistry.run`."""

    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    corpus: Path
    fold: str
    seed: int
    upstream: Mapping[str, Path]
    output: Path
    checkpoint: Path
    relief: int
    should_stop: Callable[[], bool]
    report: Callable[[str], None]
    attempt: NotRequired[int]
    superseded: NotRequired[Callable[[], bool]]
    team: NotRequired[Team | None]
    shared: NotRequired[Path | None]


@dataclass(frozen=True)
class Score:
    """The number by which runs are judged and compared; `jobs` computes it from a confusion matrix, exactly (mean recall over classes)."""

    name: str = "ua"
    label: str = "UA"
    title: str = "Unweighted accuracy"
    of_confusion: str = "ua"


@dataclass(frozen=True)
class Terms:
    """What captions and reports call the data, in the plural."""

    examples: str = "utterances"
    groups: str = "speakers"
    seeds: str = "Seeds differ in fine-tuning only; upstream stages are computed once per fold."


class SpeechRegistry:
    """V-FT, TAPT, P-TAPT, text and fusions. A method ends in one of the stages `SCORED`, the only ones that depend on the run's seed.

    A measurement is one stage, the same for every fold and seed.
    """

    methods = METHODS
    default_methods = AUDIO
    measurements = MEASUREMENTS
    teams = ("states", "tapt", "ptapt", "source", "finetune")
    stages = tuple(VERSIONS)
    recipe_schema = Recipe
    score = Score()
    terms = Terms()
    packages = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "safetensors", "soundfile", "tensorboard")
    makes = ("demo",)  # corpora that need no source
    pinned_keys = ("backbone.checkpoint", "backbone.revision")

    def call(self, method: str, recipe: Recipe, *, fold: str, seed: int, validation: Sequence[str] = ()) -> StageCall:
        """Return the last stage of a run (one of `SCORED`) with its upstream stages, or the stage of a measurement.

        Raises InputError for an unknown method, one that is not defined for the backbone, or a missing checkpoint.

        `validation` (sweeps): speakers that no stage trains on and that fine-tuning is tested on instead of the held-out fold, which no
        stage then opens. They are part of the stages' settings, so these stages have other keys than those of a grid. FIXED_PART
        (`ser_core.corpora.validation`) stands for the corpus' own validation part, on which no stage trains in any case: then only
        `finetune` differs from the grid's.
        """
        tested: dict[str, Any] = {"validation": sorted(set(validation))} if validation else {}
        part: dict[str, Any] = {} if recipe.training_fraction == 1 else {"training_fraction": recipe.training_fraction}
        if recipe.protocol is not Protocol.sessions:
            part["protocol"] = recipe.protocol.name
        kept_out: dict[str, Any] = {} if is_fixed_part(validation) else tested
        runtime = {"execution": plain(recipe.execution), "backbone": plain(recipe.backbone)}
        features = keyed(recipe.features)
        where = {"source_corpus": recipe.two_stage.folder}

        def stage(name: str, settings: dict[str, Any], upstream: Mapping[str, StageCall], number: int, **more: Any) -> StageCall:
            kept = tested if name in SCORED else kept_out
            origin = {"weights": backbone_origin(recipe.backbone)} if "backbone" in settings else {}
            return StageCall(name, VERSIONS[name], {**settings, **kept, **part}, {**runtime, **origin, **more}, fold, number, upstream)

        keep = {} if recipe.finetune.keep is Keep.none else {"keep": recipe.finetune.keep.name}

        def finetune(own: dict[str, Any], upstream: Mapping[str, StageCall]) -> StageCall:
            settings = {"finetune": keyed(recipe.finetune), "features": features, **own}
            stages = two_stage_key(recipe.two_stage, fold)
            if not stages:
                return stage("finetune", settings, upstream, seed, **keep)
            first = {"source": settings["finetune"], "features": features, **own}
            if recipe.two_stage.learning_rate is not None:
                settings["finetune"] = keyed(replace(recipe.finetune, learning_rate=recipe.two_stage.learning_rate))
            settings["two_stage"] = stages
            if "corpus" in stages:
                start = {"start": on_source_corpus(first, stages["corpus"])}
                return stage("finetune", settings, start, seed, **where, **keep)
            if recipe.two_stage.source:
                first = {**first, "part": recipe.two_stage.source}
                upstream = {**upstream, "start": stage("source", first, upstream, recipe.upstream_seed)}
            return stage("finetune", settings, upstream, seed, **keep)

        def on_source_corpus(first: dict[str, Any], read: dict[str, Any]) -> StageCall:
            """The first stage on another corpus: the same for all folds if no speaker is left out."""
            more = {**runtime, "weights": backbone_origin(recipe.backbone), **where}
            settings = {**first, "corpus": read}
            return StageCall("source", VERSIONS["source"], settings, more, fold if read["left_out"] else WHOLE, recipe.upstream_seed)

        if method not in (*METHODS, *MEASUREMENTS):
            raise InputError(f"method {method!r}: unknown; known are {', '.join((*METHODS, *MEASUREMENTS))}")
        if method not in ("vft", *MEASUREMENTS) and (recipe.two_stage.corpus or recipe.two_stage.target_labels):
            raise InputError(f"recipe.two_stage: corpus and label maps are for the method vft only, not {method}; leave them out")
        if method in FUSIONS:
            roles = {"audio": recipe.fusion.audio.name, "text": "text"}
            runs = {role: self.call(each, recipe, fold=fold, seed=seed, validation=validation) for role, each in roles.items()}
            layer = method == "concat"
            fused = {method: keyed(recipe.fusion.layer) if layer else {"text_weight": recipe.fusion.text_weight}, **tested, **part}
            reads: dict[str, Any] = {"reads": {role: [POOLED] for role in roles}} if layer else {}
            return StageCall(method, VERSIONS[method], fused, {"execution": runtime["execution"], **reads}, fold, seed, runs)
        if method == "cross":  # of the methods of its parts it has the weights that these start from
            parts = recipe.fusion.audio.name, "text"
            audio, text = (self.call(each, recipe, fold=fold, seed=seed, validation=validation) for each in parts)
            encoders = {name: each.settings[name] for name, each in (("backbone", audio), ("text_encoder", text)) if name in each.settings}
            tokens = {name: text.settings["text"][name] for name in ("max_tokens", "transcripts")}
            weights = " and ".join(each.runtime["weights"] for each in (audio, text) if "weights" in each.runtime)
            upstream = {role: each for role, each in audio.upstream.items() if role == "backbone"}
            settings = {"cross": keyed(recipe.fusion.cross), "text": tokens, **encoders, **tested, **part}
            more = {**runtime, "text_encoder": text.runtime["text_encoder"], "weights": weights}
            return StageCall(method, VERSIONS[method], settings, more, fold, seed, upstream)
        if method == "text":
            own = keyed(recipe.text)
            own.pop("encoder")
            read = {"text": own, "text_encoder": text_identity(recipe.text.encoder)}
            more = {"text_encoder": plain(recipe.text.encoder), "weights": text_origin(recipe.text.encoder)}
            return StageCall("text", VERSIONS["text"], {**read, **tested, **part}, {"execution": runtime["execution"], **more}, fold, seed)
        if problem := method_problem(method, model_type_of(recipe.backbone) or ""):
            raise InputError(problem)
        backbone = {"backbone": backbone_identity(recipe.backbone)}
        if method == "pretraining_loss":
            measured = {"pretraining_loss": keyed(recipe.pretraining_loss), **backbone}
            more = {"weights": backbone_origin(recipe.backbone)}
            return StageCall(method, VERSIONS[method], measured, {**runtime, **more}, "all", recipe.upstream_seed)
        if method == "vft":
            return finetune(backbone, {})
        if method == "tapt":
            settings = {"tapt": keyed(recipe.tapt), "features": features, **backbone}
            return finetune({}, {"backbone": stage("tapt", settings, {}, recipe.upstream_seed)})
        own = keyed(recipe.states)
        own.pop("wav2vec")
        identity = {"wav2vec": wav2vec_identity(recipe.states.wav2vec)}
        wav2vec = recipe.states.wav2vec
        more = {"wav2vec": plain(wav2vec), "weights": wav2vec_origin(wav2vec)}
        states = stage("states", {"states": own, **identity}, {}, recipe.upstream_seed, **more)
        counts, iterations = sorted(recipe.cluster.counts), recipe.cluster.iterations
        number = recipe.upstream_seed
        clusters = {f"clusters.{k}": stage("cluster", {"k": k, "iterations": iterations}, {"states": states}, number) for k in counts}
        settings = {"ptapt": keyed(recipe.ptapt), "counts": counts, "features": features, **backbone}
        return finetune({}, {"backbone": stage("ptapt", settings, clusters, recipe.upstream_seed)})

    def calls(self, method: str, recipe: Recipe, validation: Mapping[str, Sequence[str]] | None = None) -> Callable[[str, int], StageCall]:
        """Return a function (fold, seed) -> the result of `call`. Upstream stages are built once per fold and shared by its seeds.

        `validation`: fold -> the result of `validation_speakers`; None for the runs of a grid. If it is given, the function raises
        InputError for a fold that it does not contain, because that run would be tested on the held-out fold.
        """

        def kept_out(fold: str) -> Sequence[str]:
            if validation is None:
                return ()
            if not validation.get(fold):
                raise InputError(f"fold {fold!r}: no validation speakers are given for it")
            return validation[fold]

        if method in FUSIONS:  # its upstream runs have the seed of the run
            return lambda fold, seed: self.call(method, recipe, fold=fold, seed=seed, validation=kept_out(fold))
        first = cache(lambda fold: self.call(method, recipe, fold=fold, seed=0, validation=kept_out(fold)))
        return (lambda fold, seed: first(fold)) if method in MEASUREMENTS else lambda fold, seed: replace(first(fold), seed=seed)

    def validation_speakers(self, corpus: Path, fold: str) -> tuple[str, ...]:
        """Return the speakers that a sweep keeps out of training and is scored on when `fold` is held out (`ser_core.corpora.validation`).

        Raises InputError if no speakers can be chosen.
        """
        return validation_speakers(load_manifest(corpus), fold)

    def training_frames(self, corpus: Path, recipe: Recipe, fold: str, validation: Sequence[str] = ()) -> int:
        """Return the number of emotion states (frames) that k-means clusters (`ser_core.preflight.training_frames`)."""
        return training_frames(trained_on(load_manifest(corpus), fold, validation), recipe.states.wav2vec)

    def proxies(self, corpus: Path, fold: str, validation: Sequence[str], clusters: Mapping[int, Path]) -> dict[str, Any]:
        """Return how well the clusters of each k agree with the emotion labels: {"k": {"64": {"purity": ..., "nmi": ...}, ...}}.

        `clusters`: k -> output folder of its cluster stage. Raises InputError if a folder holds clusters of other utterances than the
        training utterances of `fold` without `validation`.
        """
        from ser_core.clustering.agreement import agreement_by_k

        manifest = load_manifest(corpus)
        utterances = trained_on(manifest, fold, validation)
        labels = [manifest.class_index(utterance) for utterance in utterances]
        found = agreement_by_k([utterance.id for utterance in utterances], labels, clusters)
        return {"k": {str(k): {"purity": each.purity, "nmi": each.nmi} for k, each in found.items()}}

    def stage_proxies(self, stage: str, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The proxies in the metrics of a finished stage (`ser_core.sweep`)."""
        return stage_proxies(stage, settings, metrics)

    def load_corpus(self, folder: Path) -> Manifest:
        """Read a prepared corpus. Raises InputError if there is none, or its manifest is damaged."""
        return load_manifest(folder)

    def make_corpus(self, name: str, folder: Path, progress: Callable[[int, int], None]) -> str:
        """Synthesise and prepare the demo corpus in `folder`, its source beside it. Returns a line about it."""
        from ser_core.corpora.demo import prepare_demo

        return corpus_line(prepare_demo(folder, folder.parent / f"{name}-source", progress))

    def how_to_prepare(self, name: str) -> str:
        """Return the command that prepares a corpus of this name."""
        return how_to_prepare(name)

    def needed_weights(self, method: str, recipe: Recipe) -> list[NeededWeights]:
        """Return the checkpoints that a method needs (`ser_core.models.needed_weights`)."""
        from ser_core.models.needed_weights import needed_weights

        return needed_weights(method, recipe)

    def locate(self, recipe: Recipe, folders: Sequence[Path]) -> None:
        """Make paths of checkpoints below one of the folders absolute."""
        resolve_checkpoints(recipe, folders)

    def pin(self, recipe: Recipe, former: Iterable[Mapping[str, Any]], points: Iterable[Recipe] = ()) -> tuple[str, ...]:
        """Set the commit of the recipe's hub name: that of an earlier launch (`former`: recipes, the last counts), else of the cache.

        `points`: recipes of a sweep, whose hub names are resolved instead; the recipe gets the commits of all. Returns lines for the user.
        """
        commits, found = commits_of(former), list(points)
        lines = []
        for each in found or [recipe]:
            lines.append(pin_commit(each.backbone, commits))
            recipe.backbone.commits.update(each.backbone.commits)
        return tuple(filter(None, dict.fromkeys(lines)))

    def pin_corpus(self, method: str, recipe: Recipe, corpus: Path) -> None:
        """Enter digests of what a method reads beside the recordings of `corpus`: its transcripts, the source corpus of two stages."""
        if method in READ_TEXT:
            recipe.text.transcripts = load_manifest(corpus).text_digest
        if method not in MEASUREMENTS:
            enter_source(recipe.two_stage, corpus)

    def check(self, recipe: Recipe) -> None:
        """Raise InputError with one line per value that is out of range."""
        problems = list(recipe_problems(recipe))
        if problems:
            raise InputError(problems)

    def check_corpus(self, corpus: Path, methods: Sequence[tuple[str, Recipe]], folds: Mapping[str, Sequence[str]]) -> None:
        """Raise InputError with one line per setting that the training part of a fold is too small for (`ser_core.preflight`).

        `methods`: each with its recipe. `folds`: held-out fold -> the validation speakers of a sweep, else ().
        """
        manifest = load_manifest(corpus)
        parts = [(each, recipe) for method, recipe in methods for each in (*parts_of(method, recipe), method)]
        problems = [line for method, recipe in parts for line in corpus_problems(method, recipe, manifest, folds)]
        if problems:
            raise InputError(list(dict.fromkeys(problems)))

    def cost_notes(self, corpus: Path, stages: Sequence[Any]) -> tuple[str, ...]:
        """Return lines for a dry run about what is slow (`ser_core.cost_notes`); `stages` have `stage`, `settings`, `fold`."""
        return cost_notes(corpus, stages)

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Compute one stage: artifacts go to `output`, checkpoints to `checkpoint`.

        If the settings contain `validation`, no stage trains on those speakers, `finetune` is tested on them, and no stage opens an
        utterance of the held-out fold: the scores are validation scores (see `call`).

        `team`: the processes that compute the stage together; None: this process alone. The result of rank 0 counts; ConnectionError is
        raised if a process of the team has exited or has not answered for `execution.communication_minutes`.

        `shared`: a cache folder for data that stages of all experiments can reuse and that can be recomputed at any time; None: no cache.

        `relief`: how often the stage has run out of memory. Each time halves the number of utterances per forward pass in training and
        test (at least one); a step accumulates the gradients of its micro-batches. Loss, gradient, masks, crops and negatives of a step
        are those of the whole batch up to the order of summation; only dropout, layer drop and Gumbel noise are drawn per micro-batch.
        Micro-batches do not depend on the size of the team, and so neither do the numbers. `cluster` needs the same memory at any
        relief. A checkpoint can be resumed under another relief and by a team of another size.

        Returns JSON values: `metrics` (numbers, reproducible for a seed), `durations` (seconds), `arithmetic` (`device`: `cpu` or the name
        of the GPU, and `precision`: the autocast type), `warnings` where there are any, and for `finetune` also `confusion` (rows:
        true class), `classes` and `diverged` ("", or the reason why training counts as diverged; the model is tested all the same).
        `runtime["threads"]` is the number of CPU threads; by default torch's setting. Raises Interrupted after writing a checkpoint if
        `should_stop` returned True, Diverged for a loss that is NaN or infinite, InputError for wrong data or settings, and OSError if
        the disk is full or fails.
        """
        from ser_core.stages.run import run_stage

        return run_stage(stage, **arguments)

    def export(
        self,
        stage: str,
        *,
        settings: Mapping[str, Any],
        runtime: Mapping[str, Any],
        upstream: Mapping[str, Path],
        output: Path,
        folder: Path,
        merged: bool,
        facts: Mapping[str, Any],
        train_again: Callable[[Mapping[str, Any]], Path],
        onnx: bool = False,
    ) -> tuple[str, ...]:
        """Write what a finished `finetune` stage has trained into `folder`; returns lines on how it is loaded.

        Arguments as for `run`, with the stage's own artifacts in `output`; `facts` and `train_again` as for every registry. LoRA is written
        in peft's format, or with `merged` as a plain model of transformers; a model that was trained as a whole as a folder for
        transformers' pipeline, trained again if its weights were not kept (`ser_core.stages.export`, `export_whole`); with `onnx` also as
        an ONNX file. Raises InputError for any other stage or run, for `onnx` of a run with adaptors or without the packages that it
        needs, and NotReproduced if the model that was trained again does not predict what the run did.
        """
        if stage != "finetune":
            raise InputError(f"stage {stage}: only runs (finetune) can be exported")
        from ser_core.stages.export import export_run

        return export_run(settings, runtime, upstream, output, folder, merged=merged, facts=facts, train_again=train_again, onnx=onnx)

    def predict(
        self, model: Path | Mapping[str, Any], files: Sequence[str]
    ) -> tuple[tuple[str, ...], Iterator[tuple[Mapping[str, Any], str]]]:
        """Return the names of columns, and for each recording its row with "", or its path and why it cannot be read.

        `model`: an exported folder, or the arguments of `export` that describe a finished `finetune` stage: `stage`, `settings`, `runtime`,
        `upstream`, `output`. Raises InputError for any other model, and for a run whose weights were not kept (`ser_core.stages.predict`).
        """
        if not isinstance(model, Path) and model["stage"] != "finetune":
            raise InputError(f"stage {model['stage']}: only runs of audio (finetune) predict recordings")
        from ser_core.models.kept_model import load_model
        from ser_core.stages.predict import classifier_of_run, columns, predict_files

        if isinstance(model, Path):
            loaded = load_model(model)
        else:
            loaded = classifier_of_run(model["settings"], model["runtime"], model["upstream"], model["output"])
        return columns(loaded), predict_files(loaded, files)

    def preload(self) -> None:
        """Import the modules that stages need, without starting a thread or using a GPU: for a process that forks workers."""
        import omegaconf
        import sklearn.metrics
        import torch.utils.tensorboard
        import transformers.models.wav2vec2.modeling_wav2vec2

        from ser_core.stages import run

        del omegaconf, sklearn, torch, transformers, run


def parts_of(method: str, recipe: Recipe) -> tuple[str, ...]:
    """The methods whose runs a method fuses, or whose pretraining it needs."""
    if method in FUSIONS:
        return recipe.fusion.audio.name, "text"
    return (recipe.fusion.audio.name,) if method == "cross" and recipe.fusion.audio is not AudioMethod.vft else ()


REGISTRY = SpeechRegistry()
