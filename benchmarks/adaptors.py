"""Time of a fine-tuning step with each adaptor on each backbone, beside a step of full fine-tuning, in one process.

    python benchmarks/adaptors.py
    python benchmarks/adaptors.py --size base --models wav2vec2 --precision float32 --repeat 5

A step is forward, backward and Adam on one batch of random features in one part, without the front end and without layer drop. Of each
backbone all settings are computed in turn, `--repeat` times, with the same dropout seeds; each ratio is the median of the ratios within a
repetition, so that other work on the machine changes it little. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training import ADAPTED
from ser_core.models.backbone import load_encoder
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.model_types import MODEL_TYPES
from ser_core.models.trained import parameter_counts
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.finetune import Adaptor, AdaptorSettings
from ser_core.stages.finetune import adaptors_of

FULL = "full"
CLASSES = 4
SHORTEST, LONGEST = 100, 350  # frames of 20 ms
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192, "conv_dim": [64] * 7},
    "base": {},
}


class Model:
    """A classifier with one setting of adaptors, and its optimiser."""

    def __init__(self, model_type: str, size: str, setting: str) -> None:
        torch.manual_seed(0)
        config = {**SIZES[size], "mask_time_prob": 0.65, "layerdrop": 0.0, "model_type": model_type}
        encoder = load_encoder(BackboneSettings(checkpoint=None, config=config))
        kinds = [] if setting == FULL else [Adaptor[kind] for kind in setting.split("+")]
        self.network = EmotionClassifier(encoder, CLASSES, adaptors=adaptors_of(AdaptorSettings(kinds=kinds))).train()
        self.hidden: int = encoder.config.hidden_size
        self.trained, self.parameters = parameter_counts(self.network)
        self._optimiser = torch.optim.Adam([each for each in self.network.parameters() if each.requires_grad], 1e-6)

    def step(self, frames: torch.Tensor, seed: int, dtype: torch.dtype) -> tuple[float, float]:
        """CPU seconds and seconds of one step."""
        features = torch.randn(len(frames), int(frames.max()), self.hidden, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        cpu, clock = time.process_time(), time.monotonic()
        self._optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(self.network(features, frames).float(), torch.arange(len(frames)) % CLASSES)
        torch.autograd.backward(loss)
        self._optimiser.step()
        return time.process_time() - cpu, time.monotonic() - clock


def measure(model_type: str, options: argparse.Namespace) -> None:
    """Print the steps of all settings on one backbone."""
    frames = torch.randint(SHORTEST, LONGEST + 1, (options.utterances,), generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    models = {setting: Model(model_type, options.size, setting) for setting in (FULL, *options.settings)}
    taken: dict[str, list[tuple[float, float]]] = {setting: [] for setting in models}
    for each in models.values():
        each.step(frames, 0, dtype)  # allocates
    for seed in range(options.repeat):
        for setting, each in models.items():
            taken[setting].append(each.step(frames, seed, dtype))
    for setting, each in models.items():
        cpu, clock = (statistics.median(values) for values in zip(*taken[setting], strict=True))
        ratios = [one[0] / other[0] for one, other in zip(taken[setting], taken[FULL], strict=True)]
        by_clock = statistics.median(one[1] / other[1] for one, other in zip(taken[setting], taken[FULL], strict=True))
        print(
            f"{model_type:<15} {setting:<13} {each.trained:>11,} {100 * each.trained / each.parameters:>6.2f} {cpu:>8.3f} {clock:>8.3f} "
            f"{statistics.median(ratios):>8.2f} {min(ratios):>5.2f} to {max(ratios):.2f} {by_clock:>9.2f}",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODEL_TYPES), default=["wav2vec2", "hubert", "wavlm"])
    parser.add_argument("--settings", nargs="+", choices=ADAPTED, default=list(ADAPTED), help="beside full fine-tuning")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="base: the defaults of transformers")
    parser.add_argument("--utterances", type=int, default=4, help=f"of a step, {SHORTEST} to {LONGEST} frames each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.size}, {options.utterances} utterances, {options.precision}, {options.threads} threads, median of {options.repeat}")
    print(f"{'backbone':<15} {'trains':<13} {'parameters':>11} {'%':>6} {'CPU s':>8} {'s':>8} {'/ full':>8} {'range':>12} {'by clock':>9}")
    for model_type in options.models:
        measure(model_type, options)


if __name__ == "__main__":
    main()
