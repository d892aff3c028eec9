"""Fine-tuning: the classification head, adaptors, attributes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ser_core.settings.backbone import SpecAugmentSettings
from ser_core.settings.execution import Precision


class Pooling(Enum):
    """How the classification head averages frames."""

    paper = "paper"  # masked mean over valid frames, then ReLU (section 2.2)
    reference = "reference"  # code: ReLU on the frames first, and the last valid frame is left out


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
