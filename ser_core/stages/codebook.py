"""How evenly a pretraining uses its codebook: curves of the perplexity of each group, and whether all frames have got the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from ser_core.models.tapt import code_perplexity
from ser_core.training.curves import References, Row

PERPLEXITIES = ("code_perplexity", "prob_perplexity")  # of the most likely codes, and of the mean probabilities
# A group that uses two codes has a perplexity of 1.5 if one of seven frames has the rarer one. Trained codebooks of 320 use hundreds.
COLLAPSED_PERPLEXITY = 1.5
# Nats a masked frame. Guessing among the target and 100 negatives costs ln(101) = 4.6. Near 0 it means with such a codebook that hardly any
# negative is left: one with the codes of its target is left out.
COLLAPSED_LOSS = 0.1


@dataclass(frozen=True)
class Codebook:
    """The codes of a quantizer: one of `entries` from each of `groups`."""

    groups: int
    entries: int

    @property
    def sums(self) -> int:
        """Elements of the sums that `perplexities` reads."""
        return len(PERPLEXITIES) * self.groups * self.entries

    def perplexities(self, sums: Tensor) -> dict[str, float]:
        """Values for the curves from `code_counts` and `code_sums` of `TaptLoss`, one after the other in `sums`, over any frames."""
        both = sums.view(len(PERPLEXITIES), self.groups, self.entries)
        frames = int(both[0, 0].sum())
        named = {name: code_perplexity(each, frames).tolist() for name, each in zip(PERPLEXITIES, both, strict=True)}
        return {self._curve(group, name): value for name, values in named.items() for group, value in enumerate(values)}

    def references(self) -> References:
        """Of each curve: its value if all entries are equally frequent."""
        reference = (float(self.entries), "entries of each group of the codebook")
        return {self._curve(group, name): reference for group in range(self.groups) for name in PERPLEXITIES}

    def collapse(self, rows: Sequence[Row], epoch_steps: int, diversity_weight: float) -> str:
        """Return a warning if all entries of the curves in the last epoch have collapsed codes and hardly any loss, else "".

        `rows`: entries of the curves; those of versions without perplexities do not count. Before the end of the first epoch there is none.
        """
        name = PERPLEXITIES[0]
        last = rows[-1][0] if rows else 0
        recent = takewhile(lambda row: row[0] > last - epoch_steps, reversed(rows))
        found = [values for _, values in recent if self._curve(0, name) in values]
        if not found or last < epoch_steps:
            return ""
        perplexity = max(values[self._curve(group, name)] for values in found for group in range(self.groups))
        loss = max(values["train/loss"] for values in found)
        if perplexity >= COLLAPSED_PERPLEXITY or loss >= COLLAPSED_LOSS:
            return ""
        return (
            f"the codebook has collapsed: over the last epoch the perplexity of its codes was at most {perplexity:.2f} of {self.entries} "
            f"in every group, and the loss at most {loss:.2g}. A frame with the same codes is no negative, so nothing is left to learn. "
            f"A larger recipe.tapt.diversity_weight (now {diversity_weight:g}, added once a batch beside a sum over its masked frames) "
            "favours even use of the codes"
        )

    @staticmethod
    def _curve(group: int, name: str) -> str:
        return f"codebook/group_{group + 1}/{name}"
