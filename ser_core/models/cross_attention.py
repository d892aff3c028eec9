"""Classifier of two sequences of states: cross-attention both ways, a feed-forward layer, the mean of each, a linear layer on both."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossBlock(nn.Module):
    """One sequence attends to the other; attention and feed-forward layer are each added to their input and normalised (LayerNorm)."""

    def __init__(self, width: int, other: int, heads: int, units: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, kdim=other, vdim=other, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout), nn.Linear(units, width))
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, own: Tensor, other: Tensor, other_valid: Tensor) -> Tensor:
        """Return (B, T, width) of states (B, T, width) that attend to the valid ones (B, S) bool of others (B, S, width of the other)."""
        found, _ = self.attention(own, other, other, key_padding_mask=~other_valid, need_weights=False)
        hidden = self.attention_norm(own + self.dropout(found))
        result: Tensor = self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))
        return result


class CrossAttention(nn.Module):
    """Logits of utterances from their states in audio and text, which may have different widths; `heads` divides both."""

    def __init__(self, audio: int, text: int, classes: int, *, heads: int, units: int, dropout: float) -> None:
        super().__init__()
        self.audio = CrossBlock(audio, text, heads, units, dropout)
        self.text = CrossBlock(text, audio, heads, units, dropout)
        self.head = nn.Linear(audio + text, classes)

    def forward(self, audio: Tensor, frames: Tensor, text: Tensor, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of padded states (B, T, width) of audio with (B,) valid frames, and of text with (B,) tokens."""
        audio_valid, text_valid = valid(frames, audio.shape[1]), valid(tokens, text.shape[1])
        heard = mean_of(self.audio(audio, text, text_valid), audio_valid)
        read = mean_of(self.text(text, audio, audio_valid), text_valid)
        logits: Tensor = self.head(torch.cat([heard, read], dim=-1))
        return logits


def valid(counts: Tensor, longest: int) -> Tensor:
    """Return (B, longest) bool: the first `counts` (B,) of each row."""
    return torch.arange(longest, device=counts.device) < counts[:, None]


def mean_of(states: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean (B, width) of the chosen ones (B, T) bool of states (B, T, width)."""
    weights = chosen.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)
