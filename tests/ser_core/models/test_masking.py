"""Where masks fall: never on padding, in whole spans, as many as the recipe says, on any length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_core.errors import InputError
from ser_core.models.masking import feature_mask, time_mask


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    extra=st.integers(0, 20),
    span=st.integers(1, 40),
    probability=st.floats(0, 1),
    minimum=st.integers(0, 3),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_is_never_masked(
    lengths: list[int], extra: int, span: int, probability: float, minimum: int, shared: bool, seed: int
) -> None:
    """Whatever the lengths (shorter than a span, or empty), no masked frame lies behind a row's valid ones."""
    frames = max(lengths) + extra
    rng = np.random.default_rng(seed)
    mask = time_mask(np.array(lengths), frames, probability=probability, span=span, minimum=minimum, rng=rng, shared_count=shared)
    assert mask.shape == (len(lengths), frames)
    assert mask.dtype == bool
    for row, length in zip(mask, lengths, strict=True):
        assert not row[length:].any()
        if probability > 0 and minimum > 0 and length > 0 and not shared:
            assert row.any()


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(length=st.integers(40, 400), span=st.integers(2, 15), seed=st.integers(0, 99))
def test_whole_spans(length: int, span: int, seed: int) -> None:
    """In a row long enough every run of masked frames is at least one span long: spans start where they fit."""
    mask = time_mask(np.array([length]), length, probability=0.1, span=span, minimum=2, rng=np.random.default_rng(seed))[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    assert (edges[1::2] - edges[::2] >= span).all()


def test_count() -> None:
    """Distinct starts, and on average probability * length / span of them: int(x + U[0, 1)) rounds without bias."""
    rng = np.random.default_rng(0)
    lengths = np.full(4000, 333)
    mask = time_mask(lengths, 333, probability=0.03, span=1, minimum=2, rng=rng)
    counts = mask.sum(1)
    assert set(counts) == {9, 10}  # 0.03 * 333 = 9.99
    assert abs(counts.mean() - 9.99) < 0.02
    assert (time_mask(lengths, 333, probability=1e-6, span=1, minimum=2, rng=rng).sum(1) == 2).all()


def test_shared_count_comes_from_the_padded_length() -> None:
    """`reference` draws as many spans for a short row as for the longest, and cuts those that fall on padding."""
    rng = np.random.default_rng(0)
    lengths = np.array([1000, 500] * 200)
    mask = time_mask(lengths, 1000, probability=0.02, span=1, minimum=0, rng=rng, shared_count=True)
    assert (mask[::2].sum(1) == 20).all()
    assert 8.5 < mask[1::2].sum(1).mean() < 11.5
    assert len(set(mask[1::2].sum(1))) > 3


def test_same_generator_same_mask() -> None:
    """The mask is a function of the generator handed in, and numpy's global one is left alone."""
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = (time_mask(np.array([99, 50]), 99, probability=0.1, span=5, minimum=2, rng=np.random.default_rng(3)) for _ in range(2))
    assert (first == second).all()
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]


def test_features() -> None:
    """At least one span of channels for each row, never all of them."""
    mask = feature_mask(50, 768, probability=0.05, span=64, minimum=1, rng=np.random.default_rng(0))
    assert set(mask.sum(1)) == {64}
    assert len({tuple(row) for row in mask}) > 40


def test_features_of_a_small_model() -> None:
    """A span that would zero every channel is refused with the setting to change, instead of training on nothing."""
    with pytest.raises(InputError, match="feature_length=64 would zero all 32 channels"):
        feature_mask(2, 32, probability=0.05, span=64, minimum=1, rng=np.random.default_rng(0))
    assert not feature_mask(2, 32, probability=0, span=64, minimum=1, rng=np.random.default_rng(0)).any()
