"""How a stage is computed: device, precision, attention kernel, cached features, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
