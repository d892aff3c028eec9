"""Typed settings of the recipe. Every number of the paper is defined here once, with its section.

The classes are OmegaConf schemas: reading a configuration with an unknown key or a value of the wrong type raises an error.
Section numbers are those of Chen & Rudnicky, arXiv 2110.06309; "code" is the authors' public implementation.
The defaults are the preset `paper` (configs/recipe/paper.yaml): the paper where it speaks, the code where it does not, and no utterance's
features depend on its batch. The preset `published` (configs/recipe/published.yaml) follows the code in everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, ClassVar

from ser_core.metric_columns import ATTRIBUTE_METRICS, KIND_METRICS, STAGE_METRICS, TARGET_METRICS, Adaptation, MetricColumn
from ser_core.sweep import P_TAPT, SweptMethod


class Pooling(Enum):
    """How the classification head averages frames."""

    paper = "paper"  # masked mean over valid frames, then ReLU (section 2.2)
    reference = "reference"  # code: ReLU on the frames first, and the last valid frame is left out


class SpansPer(Enum):
    """What a number of masked spans is drawn for."""

    utterance = "utterance"  # from the utterance's own length; an utterance's mask does not depend on its batch
    batch = "batch"  # code: one number for all rows, from the padded length; spans are then cut to the valid frames


class NegativeFrames(Enum):
    """Frames of an utterance's row that the negatives of the contrastive loss are drawn from."""

    valid = "valid"  # all frames of the utterance
    padded = "padded"  # code: all frames of the padded row


class Padding(Enum):
    """Whether padding affects an utterance's features."""

    independent = "independent"  # features depend on the utterance alone
    reference = "reference"  # code: zero-padded batches pass through the front end's group norm, so features depend on the batch


class Precision(Enum):
    """Autocast type of the stages that train by gradient descent."""

    auto = "auto"  # bfloat16 on a GPU or CPU with bfloat16 instructions, float16 on an older GPU, else float32
    float32 = "float32"  # no autocast
    bfloat16 = "bfloat16"
    float16 = "float16"


class FeatureCache(Enum):
    """Where the outputs of a frozen front end are cached; all choices give bit-identical results."""

    store = "store"  # on disk, shared by all stages with the same front end and corpus; in memory if there is no shared folder
    memory = "memory"  # in memory, for the stage alone
    none = "none"  # recomputed at every step, as in the authors' code


class Attention(Enum):
    """Attention kernel of the encoder."""

    sdpa = "sdpa"  # torch's scaled_dot_product_attention
    eager = "eager"  # matrix products and a softmax


class Normalise(Enum):
    """Whether waves are normalised to zero mean and unit variance before the backbone."""

    auto = "auto"  # as the checkpoint's preprocessor_config.json states, for models with layer norms in the convolutions; else not
    never = "never"
    always = "always"


@dataclass
class BackboneSettings:
    """A speech model (ser_core/models/model_types.py): a checkpoint (Hugging Face name or folder), or random weights from `config`."""

    checkpoint: str | None = "facebook/wav2vec2-base"  # Hugging Face name, or a folder; null: random weights
    revision: str | None = None  # of a Hugging Face name
    config: dict[str, Any] = field(default_factory=dict)  # model_type (default: wav2vec2) and keys of its configuration in transformers
    init_seed: int = 0  # of random weights
    normalise: Normalise = Normalise.auto  # waves to zero mean and unit variance
    commits: dict[str, str] = field(default_factory=dict)  # hub name -> commit; set by a launch (ser_core.models.hub), not part of a key


@dataclass
class Wav2vecSettings:
    """wav2vec v1: a fairseq checkpoint (`wav2vec_large.pt`), or a model with random weights from `config` and `init_seed`."""

    checkpoint: str | None = None  # path of wav2vec_large.pt; null: random weights
    config: dict[str, Any] = field(default_factory=dict)  # fields of ser_core.models.shapes.Wav2vecConfig, used when checkpoint is null
    init_seed: int = 0  # of random weights


@dataclass
class FeatureSettings:
    """Padding of the front end's input (not stated in the paper; the code pads)."""

    padding: Padding = Padding.independent  # whether padding affects an utterance's features


@dataclass
class SpecAugmentSettings:
    """Spans masked during training (lengths and probabilities from the code)."""

    spans_per: SpansPer = SpansPer.utterance  # what a number of spans is drawn for
    time_length: int = 15  # frames of a span
    time_probability: float = 0.08  # share of the frames in spans, overlaps counted twice
    time_minimum: int = 0  # spans of each utterance, or of the batch
    feature_length: int = 64  # channels of a span
    feature_probability: float = 0.05  # share of the channels in spans, overlaps counted twice
    feature_minimum: int = 1  # spans at least


class HeadKind(Enum):
    """Layers of the classification head."""

    linear = "linear"  # one layer on the averaged frames
    projector = "projector"  # a layer on every frame, their mean, a layer: earlier code of the first author of arXiv 2402.11747


@dataclass
class HeadSettings:
    """The classification head."""

    pooling: Pooling = Pooling.paper  # how frames are averaged, in front of a linear head
    kind: HeadKind = HeadKind.linear  # its layers
    projector_units: int = 256  # outputs of the layer on every frame of a projector head


class Adaptor(Enum):
    """What is trained instead of the whole transformer; the head always is (ser_core/models/adaptors.py)."""

    head = "head"  # nothing else
    ba = "ba"  # a bottleneck behind every block
    lora = "lora"  # low-rank additions to projections
    ws = "ws"  # a weighted sum of all layers in front of the head
    wg = "wg"  # a gate behind every block


class BottleneckStart(Enum):
    """How the output weights of a bottleneck start."""

    zero = "zero"  # at zero, so that training starts from the base model (ours)
    normal = "normal"  # N(0, 0.02), as in the earlier code of the first author of arXiv 2402.11747


@dataclass
class AdaptorSettings:
    """Adaptors of arXiv 2402.11747. Sizes: of its first author's earlier code, where not stated otherwise."""

    kinds: list[Adaptor] = field(default_factory=list)  # of head, ba, lora, ws, wg; []: the whole transformer is trained
    bottleneck_units: int = 64  # of each bottleneck
    bottleneck_start: BottleneckStart = BottleneckStart.zero  # of its output weights
    lora_rank: int = 8  # of the added products
    lora_alpha: float = 1.0  # they are scaled by alpha / rank; 1 is loralib's default
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])  # the paper's; or of PROJECTIONS, preflight.py


@dataclass
class AttributeSettings:
    """Valence, activation and dominance as targets of fine-tuning (arXiv 2402.11747); the loss is 1 - CCC of a batch, their mean."""

    weight: float = 0.0  # of the attributes' loss; that of the classes has 1 - weight. 0: classes only, 1: attributes only


class Keep(Enum):
    """Which runs keep the weights of the trained model (docs/export.md); adaptors are kept in any case."""

    none = "none"
    best_slot = "best_slot"  # of each cell the run with the best score, once `clean` has freed the others
    all = "all"


@dataclass
class FinetuneSettings:
    """Fine-tuning (V-FT in section 2.2, training in 3.2): IEMOCAP 15 epochs of batch 64, SAVEE 30 epochs of batch 32."""

    epochs: int = 15  # passes over the training utterances
    batch_size: int = 64  # utterances
    learning_rate: float = 1e-4  # constant
    max_seconds: float = 10.0  # training utterances are cut to their first seconds
    head: HeadSettings = field(default_factory=HeadSettings)
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)
    precision: Precision = Precision.auto  # autocast type
    adaptors: AdaptorSettings = field(default_factory=AdaptorSettings)
    clip_norm: float = 0.0  # a gradient of a larger norm is scaled down to it; 0: never
    attributes: AttributeSettings = field(default_factory=AttributeSettings)
    keep: Keep = Keep.none  # which runs keep the trained weights, for export and predict; not part of a stage's key


@dataclass
class TaptSettings:
    """Continued wav2vec 2.0 pretraining (TAPT in section 2.2, training in 3.2)."""

    steps: int = 20_000  # of the optimiser
    learning_rate: float = 1e-4  # at its maximum
    warmup_steps: int = 100  # linear rise of the rate
    flat_fraction: float = 0.05  # share of the steps at the maximum; then a linear decay to 0
    batch_seconds: float = 250.0  # audio of a batch
    max_seconds: float = 10.0  # random crop
    buckets: int = 50  # of similar length, at most
    batches_per_bucket: float = 1.5  # at least, so that the batches of a small corpus differ between epochs; 0: always `buckets` buckets
    drop_last: bool = False  # drop the last incomplete batch, which has the longest utterances; False: equal batches, nothing dropped
    negatives: int = 100  # of each masked frame
    negative_frames: NegativeFrames = NegativeFrames.valid  # where they are drawn from
    temperature: float = 0.1  # of the contrastive loss
    diversity_weight: float = 0.1  # of the batch's diversity, added once to the sum over masked frames
    attention_mask: bool = True  # False: the transformer attends to padding (the code passes no mask)
    mask_minimum: int = 2  # spans; their length and probability are those of the backbone's configuration
    mask_spans_per: SpansPer = SpansPer.utterance  # what a number of spans is drawn for
    precision: Precision = Precision.auto  # autocast type


@dataclass
class StatesSettings:
    """P-TAPT stage 1, emotion states from wav2vec v1 (section 2.3)."""

    wav2vec: Wav2vecSettings = field(default_factory=Wav2vecSettings)
    steps: int = 10_000  # of the optimiser
    learning_rate: float = 1e-4  # at its maximum
    warmup_fraction: float = 0.05  # share of the steps in which the rate rises
    flat_fraction: float = 0.05  # share of the steps at the maximum; then a linear decay to 0
    batch_size: int = 64  # utterances
    validation_fraction: float = 0.1  # share of the training utterances that choose the best model
    validate_every: int = 0  # steps; 0: once per epoch
    rnn_units: int = 256  # per direction
    head_units: int = 128  # hidden units of the classifier of a frame
    spec_augment: SpecAugmentSettings = field(default_factory=lambda: SpecAugmentSettings(time_minimum=2))
    precision: Precision = Precision.auto  # autocast type


@dataclass
class ClusterSettings:
    """P-TAPT stage 2, k-means on frames of the training folds (section 2.3)."""

    counts: list[int] = field(default_factory=lambda: [64, 512, 4096])  # the published script's; the paper names none
    iterations: int = 20  # of k-means at most


@dataclass
class PtaptSettings:
    """P-TAPT stage 3, pretraining on pseudo-labels (section 2.3)."""

    steps: int = 20_000  # of the optimiser
    learning_rate: float = 1e-4  # at its maximum
    warmup_steps: int = 100  # linear rise of the rate
    flat_fraction: float = 0.05  # share of the steps at the maximum; then a linear decay to 0
    batch_seconds: float = 250.0  # audio of a batch
    max_seconds: float = 10.0  # random crop
    buckets: int = 50  # of similar length, at most
    batches_per_bucket: float = 1.5  # at least, so that the batches of a small corpus differ between epochs; 0: always `buckets` buckets
    drop_last: bool = False  # drop the last incomplete batch; False: equal batches, nothing dropped
    mask_length: int = 15  # frames of a span
    mask_probability: float = 0.06  # share of the frames in spans, overlaps counted twice
    mask_minimum: int = 2  # spans at least
    mask_spans_per: SpansPer = SpansPer.utterance  # what a number of spans is drawn for
    head_units: int = 256  # hidden units of the head of each k
    precision: Precision = Precision.auto  # autocast type


@dataclass
class PretrainingLossSettings:
    """Pretraining loss of the untouched checkpoint on a whole corpus (Table 3); spans as in the backbone's configuration."""

    draws: int = 3  # of masks, negatives and noise for each utterance; the loss is their mean
    negatives: int = 100  # of each masked frame, from all other frames of the utterance
    temperature: float = 0.1  # of the contrastive loss
    diversity_weight: float = 0.1  # of the diversity of an utterance's codes, added once to the sum over its masked frames
    mask_minimum: int = 2  # spans of an utterance
    precision: Precision = Precision.float32  # autocast type


class SharedSpeakers(Enum):
    """Speaker names that both corpora of two stages have."""

    refuse = "refuse"  # no launch
    same = "same"  # the same persons: the first stage leaves out the speakers of the held-out fold
    different = "different"  # different persons: the first stage trains on all of its corpus


class TrainedPart(Enum):
    """A trained part of a classifier, which the second stage can freeze."""

    head = "head"
    transformer = "transformer"  # without adaptors
    ba = "ba"
    lora = "lora"
    ws = "ws"
    wg = "wg"


@dataclass
class TwoStageSettings:
    """Fine-tuning in two stages, from acted to natural speech (arXiv 2402.11747): on two parts of a corpus, or on two corpora."""

    source: str = ""  # regular expression: the part that the first stage trains on, with the settings of `finetune`; "": no first stage
    target: str = ""  # the part that `finetune` trains on, starting from the first stage, and is tested on; "": the whole corpus, one stage
    corpus: str = ""  # prepared corpus that the first stage trains on (all of it if source is ""); "": the experiment's own
    source_labels: dict[str, str | None] = field(default_factory=dict)  # its label -> common label, null: left out; {}: as they are
    target_labels: dict[str, str | None] = field(default_factory=dict)  # the same for the experiment's corpus, also without a first stage
    shared_speakers: SharedSpeakers = SharedSpeakers.refuse  # what equal speaker names in both corpora mean
    freeze: list[TrainedPart] = field(default_factory=list)  # parts of the first stage's classifier that the second does not train
    folder: str = ""  # of the source corpus, set by a launch; not part of a key
    digest: str = ""  # of the source corpus, set by a launch
    left_out: dict[str, list[str]] = field(default_factory=dict)  # held-out fold -> speakers of the source corpus, set by a launch

    @property
    def active(self) -> bool:
        """Whether fine-tuning is anything but one stage on the corpus as it is."""
        return bool(self.target or self.corpus or self.target_labels)

    @property
    def first(self) -> str:
        """What the first stage trains on, for tables; "": there is no first stage."""
        pattern = f"utterances of the pattern {self.source}" if self.source else ""
        return f"{self.corpus}{f', {pattern}' if pattern else ''}" if self.corpus else pattern

    def sentences(self) -> list[str]:
        """What is trained and how labels are mapped, for captions."""
        if not self.active:
            return []
        second = f"on utterances of the pattern {self.target}" if self.target else "on the corpus of the table"
        found = [f"fine-tuning {f'first on {self.first}, then ' if self.first else ''}{second}"] if self.target or self.first else []
        for whose, labels in ((self.corpus, self.source_labels if self.corpus else {}), ("the corpus of the table", self.target_labels)):
            if labels:
                mapped = ", ".join(f"{label} as {common}" if common else f"{label} left out" for label, common in labels.items())
                found.append(f"labels of {whose}: {mapped}")
        return [*found, *([f"frozen in the second stage: {', '.join(each.name for each in self.freeze)}"] if self.freeze else [])]


@dataclass
class TextEncoderSettings:
    """A text encoder of transformers: a folder, a Hugging Face name in the local cache, or random weights from `config`."""

    checkpoint: str | None = "google-bert/bert-base-uncased"  # folder or Hugging Face name, never downloaded; null: random weights
    revision: str | None = "86b5e0934494bd15c9632b12f734a8a67f723594"  # the commit of a Hugging Face name, which must be given
    config: dict[str, Any] = field(default_factory=dict)  # model_type and keys of its configuration in transformers
    init_seed: int = 0  # of random weights
    tokenizer: str | None = None  # folder with the tokenizer; null: the checkpoint's


@dataclass
class TextSettings:
    """Fine-tuning of a text encoder on transcripts; rate, batch size and epochs are among those of BERT (arXiv 1810.04805, A.3)."""

    encoder: TextEncoderSettings = field(default_factory=TextEncoderSettings)
    epochs: int = 4  # passes over the training utterances
    batch_size: int = 32  # utterances
    learning_rate: float = 2e-5  # constant
    max_tokens: int = 128  # of an utterance, special tokens included; the rest is cut off (IEMOCAP: 98 words at most)
    precision: Precision = Precision.auto  # autocast type
    transcripts: str = ""  # digest of the corpus' transcripts, set by a launch

    def encoder_name(self) -> str:
        """The encoder, as captions name it."""
        if self.encoder.checkpoint is None:
            return f"text encoder {self.encoder.config.get('model_type')} with random weights (init_seed {self.encoder.init_seed})"
        return f"text encoder {PurePath(self.encoder.checkpoint).name}"


class AudioMethod(Enum):
    """The method of audio that is fused with text."""

    vft = "vft"
    tapt = "tapt"
    ptapt = "ptapt"


@dataclass
class FusedLayerSettings:
    """Training of the linear layer of the method `concat`; values: published code of arXiv 2406.08353, for layers on frozen encoders."""

    epochs: int = 100  # passes over the training utterances
    batch_size: int = 64  # utterances
    learning_rate: float = 5e-4  # constant


@dataclass
class CrossSettings:
    """Classifier of the method `cross`, on frozen encoders as in arXiv 2406.08353; training: its published code, as for the layer."""

    heads: int = 8  # of each attention; divides the widths of both encoders
    units: int = 1024  # of the feed-forward layers
    dropout: float = 0.1  # of attention and feed-forward layers
    epochs: int = 100  # passes over the training utterances
    batch_size: int = 64  # utterances
    learning_rate: float = 5e-4  # constant
    precision: Precision = Precision.auto  # autocast type


@dataclass
class FusionSettings:
    """Fusion of audio and text by the methods `score` and `concat` (of two runs of the same fold and seed) and `cross`."""

    audio: AudioMethod = AudioMethod.vft  # the method of audio
    text_weight: float = 0.5  # of `score`: of the text's log-probabilities; those of audio have 1 - text_weight. Fixed, not fitted
    layer: FusedLayerSettings = field(default_factory=FusedLayerSettings)
    cross: CrossSettings = field(default_factory=CrossSettings)


class Protocol(Enum):
    """Which utterances a fold of a corpus of acted dialogs is trained and tested on (ser_core/corpora/scripts.py)."""

    sessions = "sessions"  # all of the other folds, all of the held-out fold
    scripts_disjoint = "scripts_disjoint"  # no script is on both sides; the scripts that folds are tested on are divided among them


@dataclass
class ExecutionSettings:
    """How a stage is computed; not part of a stage's key."""

    device: str = "auto"  # auto | cpu | cuda
    attention: Attention = Attention.sdpa  # kernel of the encoder
    feature_cache: FeatureCache = FeatureCache.store  # of the outputs of a frozen front end
    micro_batch: int = 0  # utterances per forward pass in training; 0: by length (AUTO_PART_SECONDS in ser_core/training/device.py)
    evaluation_batch: int = 8  # utterances of similar length per forward pass in the test
    checkpoint_minutes: float = 10.0  # between checkpoints
    communication_minutes: float = 10.0  # timeout of collective operations
    log_every: int = 10  # steps


@dataclass
class Recipe:
    """The settings of the stages of all methods."""

    swept: ClassVar[SweptMethod] = P_TAPT  # the method whose settings `sweep` searches

    # No departures from a preset; tables state revision and digest of the weights that were used.
    not_of_preset: ClassVar[tuple[str, ...]] = (
        *("preset", "execution", "finetune.keep", "backbone.revision", "backbone.commits", "states.wav2vec.checkpoint"),
        *("text.encoder", "text.transcripts"),
        *("two_stage.folder", "two_stage.digest", "two_stage.left_out"),
    )

    # only methods with the same values are compared by tests
    compared_within: ClassVar[tuple[str, ...]] = ("training_fraction", "protocol", "two_stage.target", "two_stage.target_labels")

    preset: str = "paper"  # configs/recipe/NAME.yaml, which the other settings override; not part of a stage's key
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    tapt: TaptSettings = field(default_factory=TaptSettings)
    states: StatesSettings = field(default_factory=StatesSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    ptapt: PtaptSettings = field(default_factory=PtaptSettings)
    pretraining_loss: PretrainingLossSettings = field(default_factory=PretrainingLossSettings)
    two_stage: TwoStageSettings = field(default_factory=TwoStageSettings)
    text: TextSettings = field(default_factory=TextSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    protocol: Protocol = Protocol.sessions  # which utterances of a fold are trained and tested on
    training_fraction: float = 1.0  # of the training utterances that every stage trains on (ser_core.corpora.subsets)
    upstream_seed: int = 0  # of states, cluster, tapt and ptapt, computed once per fold for all seeds, and of pretraining_loss

    def trained(self, method: str) -> tuple[str, ...]:
        """What a method of the registry trains, for the captions of tables: the model and the length of each training."""
        from ser_core.models.model_types import label_of

        if method in ("score", "concat"):
            parts = (*self.trained(self.fusion.audio.name), *self.trained("text"))
            if method == "score":
                return (*parts, f"fused by the mean of log-probabilities, weight of text {self.fusion.text_weight:g}")
            return (*parts, f"fused by a linear layer on both pooled vectors, trained for {_times(self.fusion.layer.epochs, 'epoch')}")
        if method == "cross":
            frozen = (*self.trained(self.fusion.audio.name)[:-1], self.trained("text")[0])  # without their fine-tuning
            return (*frozen, f"both frozen, cross-attention on them trained for {_times(self.fusion.cross.epochs, 'epoch')}")
        if method == "text":
            read = f"{self.text.encoder_name()} on reference transcripts"
            return (read, f"fine-tuning of {_times(self.text.epochs, 'epoch')}, protocol {self.protocol.name}")
        model = self.backbone.checkpoint or f"{label_of(self.backbone)} with random weights (init_seed {self.backbone.init_seed})"
        found = [f"backbone {PurePath(model).name if model.startswith('/') else model}"]
        if method == "pretraining_loss":
            return ()
        if method == "tapt":
            found.append(f"TAPT of {_times(self.tapt.steps, 'step')}")
        if method == "ptapt":
            found.append(f"P-TAPT of {_times(self.ptapt.steps, 'step')} on k = {', '.join(map(str, self.cluster.counts))}")
        found += self.two_stage.sentences()
        kinds = " + ".join(kind.name for kind in self.finetune.adaptors.kinds)
        what = f" ({kinds} only)" if kinds else ""
        return (*found, f"fine-tuning{what} of {_times(self.finetune.epochs, 'epoch')}{self._targets()}")

    def reads(self, method: str) -> tuple[str, ...]:
        """The keys of the recipe that the stages of a method may read: all but those that only other methods read."""
        audio = ("backbone", "features", "finetune", "two_stage", *(("upstream_seed",) if self.two_stage.source else ()))
        own = {
            "vft": audio,
            "tapt": (*audio, "tapt", "upstream_seed"),
            "ptapt": (*audio, "states", "cluster", "ptapt", "upstream_seed"),
            "text": ("text",),
            "pretraining_loss": ("backbone", "pretraining_loss", "upstream_seed"),
        }
        own["score"] = own["concat"] = (*own[self.fusion.audio.name], "text", "fusion")
        pretraining = [key for key in own[self.fusion.audio.name] if key not in audio]
        own["cross"] = ("backbone", *(("features", "upstream_seed", *pretraining) if pretraining else ()), "text", "fusion")
        some = {key for keys in own.values() for key in keys}
        return tuple(each.name for each in fields(self) if each.name not in some or each.name in own.get(method, some))

    def further_metrics(self, method: str) -> tuple[MetricColumn, ...]:
        """The metrics of a method's results that tables show beside the accuracies, where a run has any of them."""
        audio = method not in ("text", "score", "concat", "cross")
        attributes = ATTRIBUTE_METRICS if audio and self.finetune.attributes.weight else ()
        tested_source = not self.two_stage.corpus or bool(self.two_stage.left_out)
        stages = () if not (audio and self.two_stage.first) else STAGE_METRICS if tested_source else TARGET_METRICS
        return (*attributes, *stages, *KIND_METRICS)

    def adaptation(self, method: str) -> Adaptation | None:
        """What the first of two stages is trained on, and the metric of results with the UA before the second; None for one stage."""
        if (method != "vft" and self.two_stage.corpus) or method in ("text", "score") or not self.two_stage.first:
            return None
        return Adaptation(self.two_stage.first)

    def _targets(self) -> str:
        """What fine-tuning is trained to predict, if not the classes alone."""
        weight = self.finetune.attributes.weight
        if not weight:
            return ""
        return " on attributes (1 - CCC)" if weight == 1 else f" on classes and attributes (1 - CCC, weight {weight:g})"


def commits_of(recipes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the commits of hub models in stored recipes (JSON values); a recipe of an earlier version has none."""
    found: dict[str, str] = {}
    for recipe in recipes:
        backbone = recipe.get("backbone")
        commits = backbone.get("commits") if isinstance(backbone, Mapping) else None
        found |= {str(name): str(commit) for name, commit in commits.items()} if isinstance(commits, Mapping) else {}
    return found


def resolve_checkpoints(recipe: Recipe, folders: Iterable[Path]) -> None:
    """Replace checkpoint names that are a file or folder below one of `folders` by absolute paths: jobs run in other folders."""
    named: tuple[tuple[Any, str], ...] = (
        *((settings, "checkpoint") for settings in (recipe.backbone, recipe.states.wav2vec, recipe.text.encoder)),
        (recipe.text.encoder, "tokenizer"),
    )
    for settings, key in named:
        for folder in folders:
            name = getattr(settings, key)
            if name and (folder / name).exists():
                setattr(settings, key, str((folder / name).absolute()))


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
