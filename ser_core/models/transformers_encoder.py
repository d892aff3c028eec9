"""transformers' own encoders on padded batches: states of the layers, and padding that does not reach valid frames.

Computes whatever the modules of the encoder compute, on any device.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor


def by_transformers(encoder: Any, hidden: Tensor, valid: Tensor | None, *, states: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return the output of a transformers encoder (`Wav2Vec2Model.encoder`) for (B, T, hidden), and with `states` the layers' states.

    `valid` (B, T) bool: the frames that are not padding; None: all. The states are those of `ser_core.models.encoder.run_states`.
    """
    if valid is not None:
        # transformers zeroes padding of its input in place; zeroed out of place here, so that the caller's tensor stays as it is.
        hidden = hidden.masked_fill(~valid[..., None], 0)
    inputs: list[Tensor] = []
    outputs: dict[int, Tensor] = {}

    def keep_output(number: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            outputs[number] = output[0] if isinstance(output, tuple) else output

        return hook

    with contextlib.ExitStack() as hooks:
        if valid is not None:
            for layer in getattr(encoder.pos_conv_embed, "layers", ()):
                hooks.callback(layer.register_forward_hook(_zero_padding(valid)).remove)
        if states:
            # The output of the encoder's first dropout is the input of its first block.
            hooks.callback(encoder.dropout.register_forward_hook(lambda _module, _args, output: inputs.append(output)).remove)
            for number, layer in enumerate(encoder.layers):
                hooks.callback(layer.register_forward_hook(keep_output(number)).remove)
        output: Tensor = encoder(hidden, attention_mask=valid).last_hidden_state
    if not states:
        return output, []
    found = inputs[:1]
    for number in range(len(encoder.layers)):
        found.append(outputs.get(number, found[-1]))
    return output, found


def _zero_padding(valid: Tensor) -> Any:
    """Hook that sets the padding (B, channels, T) behind one positional convolution of data2vec to zero, where the next one reads it.

    transformers lets its layer norm make the padding nonzero, so that valid frames depend on the length of the batch.
    """

    def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output.masked_fill(~valid[:, None], 0)

    return hook
