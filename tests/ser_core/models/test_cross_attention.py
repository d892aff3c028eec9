"""Cross-attention of two sequences: what padding and order change, and its size."""

from __future__ import annotations

import torch

from ser_core.models.cross_attention import CrossAttention
from ser_core.models.trained import parameter_counts


def test_padding_changes_nothing_and_each_sequence_counts() -> None:
    """An utterance alone and padded in a batch; other states of either sequence give other logits."""
    torch.manual_seed(0)
    model = CrossAttention(16, 32, 3, heads=2, units=8, dropout=0.1).eval()
    audio, text = torch.randn(2, 7, 16), torch.randn(2, 5, 32)
    frames, tokens = torch.tensor([7, 4]), torch.tensor([2, 5])
    found = model(audio, frames, text, tokens)
    assert found.shape == (2, 3)
    for row in range(2):
        heard, read = audio[row : row + 1, : frames[row]], text[row : row + 1, : tokens[row]]
        alone = model(heard, frames[row : row + 1], read, tokens[row : row + 1])
        assert torch.allclose(alone[0], found[row], atol=1e-5)
        assert not torch.allclose(model(heard + 1, frames[row : row + 1], read, tokens[row : row + 1]), alone, atol=1e-3)
        assert not torch.allclose(model(heard, frames[row : row + 1], read.flip(-1), tokens[row : row + 1]), alone, atol=1e-3)


def test_size_of_the_default() -> None:
    """Two blocks of attention (4 x 768 x 768), two norms and a layer of 1024 units each, and the linear layer."""
    attention = 4 * 768 * 768 + 4 * 768
    feed_forward = 2 * 768 * 1024 + 1024 + 768
    with torch.device("meta"):
        model = CrossAttention(768, 768, 4, heads=8, units=1024, dropout=0.1)
    assert parameter_counts(model) == (2 * (attention + feed_forward + 4 * 768) + 4 * (2 * 768 + 1),) * 2
