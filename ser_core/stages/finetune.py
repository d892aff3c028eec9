"""Fine-tuning (V-FT in section 2.2, training in 3.2): a classifier on a frozen front end, tested once on the held-out fold.

In a sweep the test split is the validation speakers, who are excluded from training; `run_stage` chooses the split.

With `attributes.weight` the model also predicts valence, activation and dominance, or (weight 1) nothing else; its linear layer has the
logits of the classes first, then the attributes. Without logits, the class of an utterance is the nearest in its attributes. The loss of
the attributes, 1 - CCC, is that of the whole batch: if a step has several parts, a first pass without gradient, with the same dropout,
sums what it needs over all parts (`ser_core.training.concordance`).

With `recipe.two_stage` it trains on the target part of the corpus, from the classifier that the stage `source` has trained on the source
part or on another corpus: all its trained weights, the head included. Parts of it can be frozen.

Artifacts: `predictions.csv` (class probabilities of every test utterance, attributes), the training curves, outside of sweeps
`pooled.safetensors` (`ser_core.training.pooled`) and, with adaptors, `adaptors/`: the trained weights of adaptors and head
(`ser_core.models.adaptor_files`). With `finetune.keep`, if the whole transformer was trained and predicts classes, `model/`: the whole
classifier (`ser_core.models.kept_model`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.corpora.manifest import DIMENSIONS, SAMPLE_RATE
from ser_core.features.features import FrozenFeatures
from ser_core.keyed import keyed
from ser_core.models.adaptor_files import load_adaptors, save_adaptors
from ser_core.models.adaptors import AdaptorShape
from ser_core.models.backbone import frame_count, load_encoder
from ser_core.models.classifier import (
    ClassifierAdaptors,
    EmotionClassifier,
    class_weights,
    label_weight,
    parameters_of,
    weighted_cross_entropy,
)
from ser_core.models.kept_model import save_model
from ser_core.models.trained import parameter_counts, train_only
from ser_core.parallel.group import stop_together
from ser_core.settings.backbone import Padding
from ser_core.settings.execution import Precision
from ser_core.settings.finetune import Adaptor, AdaptorSettings, BottleneckStart, FinetuneSettings, HeadKind
from ser_core.stages.context import StageContext, parse_settings
from ser_core.stages.tested import tested_result
from ser_core.training.attributes import AttributeTask, attribute_task, nearest_class_logits, score_attributes
from ser_core.training.augmentation import row_generators, spans
from ser_core.training.batches import Batch, StepPlan, halved, longest_first, shuffled_epoch
from ser_core.training.concordance import batch_sums, ccc_loss, part_term
from ser_core.training.divergence import divergence_reason, prior_loss
from ser_core.training.evaluate import PREDICTIONS, evaluate, score, whole_features, write_predictions
from ser_core.training.loop import LocalParts, Objective, PartLoss, StepParts, TrainingResult, seed_part
from ser_core.training.pooled import write_pooled
from ser_core.training.schedule import constant
from ser_core.training.splits import Split

ADAPTORS = "adaptors"  # folder of the trained weights in the stage's output
MODEL = "model"  # folder of the whole classifier
START = "start"  # role of the stage whose classifier fine-tuning starts from
CLASSIFIER = "classifier"  # folder of its weights


@dataclass(frozen=True)
class Part:
    """A micro-batch with its rows of the masks. `total_weight` (labels), `samples` (longest utterance), `rows` are of the whole step."""

    step: int
    count: int  # of the parts of the step
    rows: int
    positions: Batch
    labels: Tensor
    time_mask: Tensor
    feature_mask: Tensor
    total_weight: Tensor
    samples: int


class Finetuning(Objective):
    """Weighted cross-entropy of an utterance classifier with SpecAugment; with `task` also 1 - CCC of the attributes."""

    model: EmotionClassifier

    def __init__(
        self, context: StageContext, settings: FinetuneSettings, model: EmotionClassifier, task: AttributeTask | None = None
    ) -> None:
        self.model = model
        self._task = task
        self._batch_sums = torch.zeros(0)  # of the attributes of the current step, if it has several parts
        self._context = context
        self._settings = settings
        split = context.training
        self.limit = round(settings.max_seconds * SAMPLE_RATE)  # samples of an utterance
        self._lengths = [min(samples, self.limit) for samples in split.samples]
        self._weights = class_weights(split.class_counts()).to(context.device)
        self.epoch_steps = len(shuffled_epoch(len(split), settings.batch_size, context.seed, 0))
        self._plan = StepPlan(lambda epoch: shuffled_epoch(len(split), settings.batch_size, context.seed, epoch))
        arithmetic = context.arithmetic(settings.precision)
        padding, cache = context.features.padding, context.execution.feature_cache
        self.features = FrozenFeatures(model.wav2vec2, split, self.limit, padding, cache, arithmetic, context.shared)

    def plan(self, step: int) -> StepParts:
        context, split = self._context, self._context.training
        batch = longest_first(self._plan.batch(step), self._lengths)
        labels = torch.tensor([split.labels[position] for position in batch])
        total = label_weight(labels.to(context.device), self._weights)
        spec_augment = self._settings.spec_augment
        rngs = row_generators(context.seed, step, [split.utterances[position].id for position in batch], spec_augment.spans_per)
        config = self.model.wav2vec2.config
        frames = [max(1, frame_count(config, self._lengths[position])) for position in batch]
        # Drawn for the whole step: its rows may share one generator.
        time_mask, feature_mask = spans(spec_augment, frames, max(frames), config.hidden_size, rngs)
        longest = self._lengths[batch[0]]
        alike = context.features.padding is Padding.reference  # then every row is padded to the step's longest
        slices = context.row_parts([longest if alike else self._lengths[position] for position in batch], config.model_type)
        parts = [
            Part(step, len(slices), len(batch), batch[rows], labels[rows], time_mask[rows], feature_mask[rows], total, longest)
            for rows in slices
        ]
        return StepParts(parts, [len(part.positions) * self._lengths[part.positions[0]] for part in parts], len(batch))

    def before_step(self, parts: LocalParts) -> None:
        """Sum the moments of the attributes over all parts of the step: predictions with the dropout of the loss, without gradient."""
        if self._task is None or parts.count == 1:
            return
        sums = torch.zeros(6, len(DIMENSIONS), dtype=torch.float64, device=self._context.device)
        with torch.no_grad():
            for number, part in parts.loaded.items():
                seed_part(self._context.seed, part.step, number)
                sums += self._attribute_sums(self._outputs(part), part, self._task)
        self._context.group.all_reduce_([sums])
        self._batch_sums = sums

    def loss(self, part: Part) -> PartLoss:
        outputs, task = self._outputs(part), self._task
        if task is not None and task.alone:
            loss, shown = self._attribute_loss(outputs, part, task)
            return PartLoss(loss, shown, torch.zeros((), device=loss.device), 0)
        labels = part.labels.to(outputs.device, non_blocking=True)
        logits = outputs[:, : len(self._weights)]
        loss = weighted_cross_entropy(logits, labels, self._weights, part.total_weight)
        correct = (logits.argmax(-1) == labels).sum()
        if task is None:
            return PartLoss(loss, loss, correct, len(labels))
        own, shown = self._attribute_loss(outputs, part, task)
        share = 1 - task.weight
        return PartLoss(share * loss + task.weight * own, share * loss + task.weight * shown, correct, len(labels))

    def _outputs(self, part: Part) -> Tensor:
        """Return the outputs of the model for a part, (utterances, classes + attributes)."""
        features, frames = self.features.padded(part.positions, samples=part.samples)
        time_mask = part.time_mask[:, : features.shape[1]]
        frames, time_mask, feature_mask = (each.to(features.device, non_blocking=True) for each in (frames, time_mask, part.feature_mask))
        outputs: Tensor = self.model(features, frames, time_mask, feature_mask)
        return outputs

    def _attribute_sums(self, outputs: Tensor, part: Part, task: AttributeTask) -> Tensor:
        return batch_sums(outputs[:, -len(DIMENSIONS) :], task.targets[part.positions].to(outputs.device, non_blocking=True))

    def _attribute_loss(self, outputs: Tensor, part: Part, task: AttributeTask) -> tuple[Tensor, Tensor]:
        """Return the part's term of the attributes' loss, and its share of the loss of the step by its utterances."""
        sums = self._attribute_sums(outputs, part, task)
        if part.count == 1:
            loss = ccc_loss(sums)
            return loss, loss
        return part_term(sums, self._batch_sums), ccc_loss(self._batch_sums) * (len(part.positions) / part.rows)


def adaptors_of(settings: AdaptorSettings) -> ClassifierAdaptors | None:
    """Return what a classifier with these settings trains beside its head; None: the whole transformer."""
    kinds = set(settings.kinds)
    if not kinds:
        return None
    shape = AdaptorShape(
        bottleneck=settings.bottleneck_units if Adaptor.ba in kinds else 0,
        identity_start=settings.bottleneck_start is BottleneckStart.zero,
        rank=settings.lora_rank if Adaptor.lora in kinds else 0,
        alpha=settings.lora_alpha,
        targets=tuple(settings.lora_targets),
        gate=Adaptor.wg in kinds,
    )
    return ClassifierAdaptors(shape, layer_sum=Adaptor.ws in kinds)


def classifier_of(encoder: Any, outputs: int, settings: FinetuneSettings, adaptors: ClassifierAdaptors | None) -> EmotionClassifier:
    """Build the network that fine-tuning with these settings trains, with random weights of head and adaptors."""
    units = settings.head.projector_units if settings.head.kind is HeadKind.projector else 0
    return EmotionClassifier(encoder, outputs, settings.head.pooling, adaptors, units)


@dataclass(frozen=True)
class Fitted:
    """A trained classifier, whose outputs begin with the logits of `classes` classes (0: attributes alone)."""

    settings: FinetuneSettings
    model: EmotionClassifier
    task: AttributeTask | None
    classes: int
    prior: float  # loss of the best constant prediction
    trained: TrainingResult
    diverged: str  # the reason; "": it is not
    front_end: float  # seconds
    parameters: tuple[int, int]  # trained, all
    pooled: NDArray[np.float32] | None = None  # inputs of the last layer, (training utterances, units), if asked for
    pooling: float = 0.0  # seconds that they took

    @property
    def alone(self) -> bool:
        """Whether it predicts attributes and no classes."""
        return not self.classes


def fit(context: StageContext, settings: FinetuneSettings, frozen: Sequence[str] = (), *, pooled: bool = False) -> Fitted:
    """Train a classifier on the training split, from the weights of an upstream classifier (role `start`) if there is one.

    `frozen`: names of `TrainedPart` that stay as they were upstream. They are trained parameters of the classifier all the same: they are
    saved with it. `pooled`: then compute the inputs of its last layer for all training utterances.
    """
    split = context.training
    encoder = load_encoder(context.backbone(), attention=context.execution.attention)
    context.seed_initialisation()
    adaptors = adaptors_of(settings.adaptors)
    task = attribute_task(settings.attributes.weight, split.utterances)
    classes = 0 if task is not None and task.alone else len(split.classes)
    outputs = classes + (0 if task is None else len(DIMENSIONS))
    model = classifier_of(encoder, outputs, settings, adaptors).to(context.device)
    if START in context.upstream:
        load_adaptors(model, context.upstream[START] / CLASSIFIER)
    trainable = [name for name, each in model.named_parameters() if each.requires_grad]
    train_only(model, set(trainable) - set(parameters_of(model, frozen)))
    counts = parameter_counts(model)
    objective = Finetuning(context, settings, model, task)
    if len(split) < settings.batch_size:
        context.report(
            f"{context.stage}: fewer than a batch of training utterances ({len(split)} of {settings.batch_size}): one step an epoch"
        )
    prior = prior_loss(split.class_counts(), class_weights(split.class_counts()).tolist())
    if task is not None:
        prior = (1 - task.weight) * prior + task.weight  # the CCC of a constant prediction is 0
    started = time.monotonic()
    with stop_together(context.group):
        objective.features.fill(context.should_stop, context.progress())
    front_end = time.monotonic() - started
    trained = context.train(
        objective,
        steps=settings.epochs * objective.epoch_steps,
        learning_rate=settings.learning_rate,
        schedule=constant(),
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        steps_per_epoch=objective.epoch_steps,
        references={"train/loss": (prior, "loss of the class prior" if task is None else "loss of the best constant prediction")},
    )
    train_only(model, trainable)
    diverged = divergence_reason(trained.loss, prior)
    if diverged:
        context.report(f"{context.stage}: diverged: {diverged}")
    started = time.monotonic()
    vectors = _training_vectors(objective, context) if pooled else None
    return Fitted(settings, model, task, classes, prior, trained, diverged, front_end, counts, vectors, time.monotonic() - started)


def _training_vectors(objective: Finetuning, context: StageContext) -> NDArray[np.float32]:
    """Return the inputs of the last layer, (training utterances, units), of the seconds that training reads, without dropout and masks.

    From the features of the training, or in the same way as those of the test where those depend on the batch.
    """
    features, model = objective.features, objective.model
    if features.padding is not Padding.independent:
        arithmetic, cache = context.arithmetic(Precision.float32), context.execution.feature_cache
        split, limit = context.training, objective.limit
        features = FrozenFeatures(model.wav2vec2, split, limit, Padding.independent, cache, arithmetic, context.shared, once=True)
        context.group.suspend_watchdog()
        features.fill(lambda: False, context.progress())
    size = halved(context.execution.evaluation_batch, context.relief)
    return evaluate(model, context.training, size, features, context.group)[1]


def facts_of(fitted: Fitted, context: StageContext) -> dict[str, Any]:
    """Return what the file of a classifier's weights states."""
    projector = fitted.model.projector
    return {
        "adaptors": keyed(fitted.settings.adaptors),
        "classes": list(context.training.classes) if fitted.classes else [],
        "pooling": fitted.settings.head.pooling.name,
        **({} if projector is None else {"pooling": "mean", "projector_units": projector.out_features}),
        **({} if fitted.task is None else {"attributes": {"names": list(DIMENSIONS), **dataclasses.asdict(fitted.task.scale)}}),
    }


@dataclass(frozen=True)
class Predicted:
    """Predictions of a test split: `logits` (utterances, classes), `attributes` (utterances, 3) in the corpus' scale.

    `pooled`: inputs of the last layer, (utterances, units).
    """

    pooled: NDArray[np.float32]
    logits: NDArray[np.float32]
    attributes: NDArray[np.float64] | None


def _predicted(fitted: Fitted, context: StageContext, test: Split) -> Predicted:
    features = whole_features(fitted.model, test, context.execution.feature_cache, context.shared)
    context.group.suspend_watchdog()
    features.fill(lambda: False, context.progress())
    size = halved(context.execution.evaluation_batch, context.relief)
    found, pooled = evaluate(fitted.model, test, size, features, context.group)
    logits, task, split = found[:, : fitted.classes], fitted.task, context.training
    if task is None:
        return Predicted(pooled, logits, None)
    attributes = task.scale.restored(found[:, fitted.classes :].astype(np.float64))
    return Predicted(pooled, nearest_class_logits(attributes, split.utterances, split.classes) if fitted.alone else logits, attributes)


def run(
    context: StageContext,
    open_test: Callable[[], Split],
    open_source: Callable[[], Split | None] = lambda: None,
    frozen: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, then open the test split and score it. A diverged model is tested too; `diverged` states the reason.

    `open_source`: with two stages, the test split of the source, None if it has none. The metrics then have the UA of source and target
    after either stage. `frozen`: as for `fit`.
    """
    settings = parse_settings(FinetuneSettings, context.settings["finetune"])
    fitted = fit(context, settings, frozen, pooled="validation" not in context.settings)
    started = time.monotonic()
    test = open_test()
    predicted = _predicted(fitted, context, test)
    if context.group.is_leader:
        write_predictions(context.output / PREDICTIONS, predicted.logits, test, predicted.attributes)
        if fitted.pooled is not None:
            write_pooled(context.output, (context.training, fitted.pooled), (test, predicted.pooled))
        if fitted.settings.adaptors.kinds:
            save_adaptors(fitted.model, context.output / ADAPTORS, facts_of(fitted, context))
        elif context.runtime.get("keep") and not fitted.alone and not fitted.diverged:
            save_model(fitted.model, context.training.classes, context.output / MODEL)
    result = tested_result(
        fitted.trained,
        predicted.logits,
        context.training,
        test,
        parameters=fitted.parameters,
        prior=fitted.prior,
        diverged=fitted.diverged,
        further={} if predicted.attributes is None else score_attributes(predicted.attributes, test.utterances),
    )
    if fitted.alone:
        del result["metrics"]["training_accuracy"]
    if START in context.upstream:
        result["metrics"] |= _both_stages(fitted, context, test, open_source())
    result["durations"] |= {"front_end": fitted.front_end, "pooling": fitted.pooling, "test": time.monotonic() - started}
    return result


def _both_stages(fitted: Fitted, context: StageContext, target: Split, source: Split | None) -> dict[str, float]:
    """Return the UA of the source after the second stage, and of source and target after the first, whose weights the model has then."""

    def ua(split: Split) -> float:
        return score(_predicted(fitted, context, split).logits, split).ua

    after = {} if source is None else {"ua_source": ua(source), "source_utterances": len(source)}
    load_adaptors(fitted.model, context.upstream[START] / CLASSIFIER)
    before = {} if source is None else {"ua_source_before": ua(source)}
    return {**after, **before, "ua_target_before": ua(target)}
