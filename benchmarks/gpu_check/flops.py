"""Floating-point operations and bytes of a step, from the shapes of the models alone. Pure functions; formulas in the docstrings.

A multiplication and an addition are two operations. A product that is trained costs three times its forward pass: itself, the gradient of
its input and that of its weights. Norms, activations, softmax and heads are left out (below 2 % at base size).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ser_core.models.shapes import MATCH_KERNEL, MATCH_STRIDE, Wav2vecConfig, convolved_length

TRAINED = 3  # forward, gradient of the input, gradient of the weights
ADAM_BYTES = 28  # a parameter: weight, gradient and two moments are read, weight and both moments are written, 4 bytes each
# A parameter and part: the weight read and written as bfloat16, that read forward and backward, the gradient read and written to add up.
PART_BYTES = 18
ACTIVATION_BYTES = 34  # a hidden unit, frame and layer, saved for the backward pass in 16 bits (arXiv 2205.05198, equation 2)


def transformer_forward(config: Any, frames: Sequence[int]) -> float:
    """Forward pass of wav2vec 2.0's transformer for utterances of `frames` valid frames.

    Layers: 2 (4 h^2 + 2 h i) a frame and 4 h T^2 an utterance, h hidden and i intermediate size; positional convolution: 2 h (h / g) k a
    frame, g groups, kernel k. With layer drop p a share 1 - p of the layers is computed in training.
    """
    hidden, total = config.hidden_size, sum(frames)
    layers = config.num_hidden_layers * (1 - config.layerdrop)
    products = 2 * (4 * hidden * hidden + 2 * hidden * config.intermediate_size) * total
    attention = 4 * hidden * sum(each * each for each in frames)
    positions = 2 * hidden * (hidden // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings * total
    return float(layers * (products + attention) + positions)


def front_end_forward(config: Any, samples: Sequence[int]) -> float:
    """Forward pass of wav2vec 2.0's convolutions and projection: 2 k c_in c_out for every output frame of a convolution."""
    total = 0.0
    for length in samples:
        inputs = 1
        for kernel, stride, outputs in zip(config.conv_kernel, config.conv_stride, config.conv_dim, strict=True):
            length = max((length - kernel) // stride + 1, 0)
            total += 2 * kernel * inputs * outputs * length
            inputs = outputs
        total += 2 * inputs * config.hidden_size * length
    return total


def states_step(config: Wav2vecConfig, rnn_units: int, samples: Sequence[int]) -> float:
    """A training step of the stage `states`: the extractor forward; aggregator, convolution and BiLSTM trained.

    BiLSTM: 2 directions, 2 * 4 u (c + u) a frame, u units, c channels.
    """
    frozen = trained = 0.0
    for length in samples:
        inputs = 1
        for outputs, kernel, stride in config.conv_feature_layers:
            length = convolved_length(((outputs, kernel, stride),), length)
            frozen += 2 * kernel * inputs * outputs * length
            inputs = outputs
        for outputs, kernel, stride in config.conv_aggregator_layers:
            length = (length - 1) // stride + 1 if length else 0
            trained += 2 * kernel * inputs * outputs * length
            inputs = outputs
        length = max((length - MATCH_KERNEL) // MATCH_STRIDE + 1, 0)
        trained += 2 * MATCH_KERNEL * inputs * inputs * length
        trained += 2 * 8 * rnn_units * (inputs + rnn_units) * length
    return frozen + TRAINED * trained


def finetune_step(config: Any, frames: Sequence[int]) -> float:
    """A step of fine-tuning or of P-TAPT's stage 3 on stored features: the transformer, trained."""
    return TRAINED * transformer_forward(config, frames)


def tapt_step(config: Any, samples: Sequence[int], frames: Sequence[int]) -> float:
    """A step of TAPT: convolutions, projection and transformer, trained. Quantizer and contrastive loss are left out."""
    return TRAINED * (transformer_forward(config, frames) + front_end_forward(config, samples))


def step_bytes(parameters: int, parts: float, config: Any, frames: int) -> float:
    """Least bytes that a step in 16 bits moves: the optimiser, the weights of each part, and activations written and read once."""
    activations = 2 * ACTIVATION_BYTES * config.hidden_size * config.num_hidden_layers * (1 - config.layerdrop) * frames
    return float(parameters * (ADAM_BYTES + PART_BYTES * parts) + activations)
