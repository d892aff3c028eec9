"""Which parameters of a model train: an explicit list of names. All others are frozen and get no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Let exactly these parameters require a gradient. Raises ValueError for a name that the model does not have, or an empty list."""
    chosen = set(names)
    known = {name for name, _ in model.named_parameters()}
    if chosen - known or not chosen:
        raise ValueError(f"parameters to train: {', '.join(sorted(chosen - known)) or 'none'}; the model has {len(known)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def below(model: nn.Module, *parts: str) -> list[str]:
    """Return the names of the parameters of parts of a model, such as `wav2vec2.encoder`. Raises ValueError for a part without any."""
    found: list[str] = []
    for part in parts:
        names = [name for name, _ in model.named_parameters() if name == part or name.startswith(f"{part}.")]
        if not names:
            raise ValueError(f"{part}: no part of {type(model).__name__} with parameters")
        found += names
    return found


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters (single values, not tensors)."""
    sizes: Sequence[tuple[bool, int]] = [(each.requires_grad, each.numel()) for each in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)
