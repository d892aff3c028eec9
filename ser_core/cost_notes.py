"""What a dry run says of stages that compute a frozen front end at every step, since their features depend on the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance, load_manifest
from ser_core.corpora.parts import part
from ser_core.corpora.subsets import subset
from ser_core.corpora.two_corpora import relabelled, source_split
from ser_core.preflight import trained_on
from ser_core.two_stages import load_source

FINE_TUNING = ("finetune", "source")


def cost_notes(corpus: Path, stages: Sequence[Any]) -> tuple[str, ...]:
    """Return a line if there are such stages; `stages` have `stage`, `settings`, `runtime`, `fold`."""
    repeated = [call for call in stages if call.stage in (*FINE_TUNING, "ptapt") and call.settings["features"]["padding"] != "independent"]
    if not repeated:
        return ()
    manifest = load_manifest(corpus)
    hours = sum(_front_end_hours(manifest, call) for call in repeated)
    once = sum(utterance.samples for utterance in manifest.utterances) / SAMPLE_RATE / 3600
    counted = f"{len(repeated)} stages compute" if len(repeated) > 1 else "1 stage computes"
    return (
        f"recipe.features.padding=reference: {counted} the front end at every training step, on batches padded "
        f"to one length: {hours:.1f} hours of audio without the padding. Features are not stored; `independent` features would be "
        f"computed once, from {once:.1f} hours of audio",
    )


def _front_end_hours(manifest: Manifest, call: Any) -> float:
    """Hours of audio that pass the front end while a stage trains."""
    if call.stage == "ptapt":
        return float(call.settings["ptapt"]["steps"] * call.settings["ptapt"]["batch_seconds"] / 3600)
    settings = call.settings[call.stage]
    if read := call.settings.get("corpus"):
        source = relabelled(load_source(call.runtime["source_corpus"], read["digest"]), read["labels"])
        return _hours(source_split(source, read["part"], read["left_out"])[0], settings)
    manifest = relabelled(manifest, call.settings.get("two_stage", {}).get("labels", {}))
    pattern = call.settings.get("part") or call.settings.get("two_stage", {}).get("target", "")
    trained = part(trained_on(manifest, call.fold, call.settings.get("validation", ())), pattern)
    chosen = subset(manifest, call.fold, trained, call.settings.get("training_fraction", 1))
    return _hours(chosen, settings)


def _hours(chosen: Sequence[Utterance], settings: Mapping[str, Any]) -> float:
    """Hours of audio in all epochs of fine-tuning on utterances."""
    seconds = [utterance.samples / SAMPLE_RATE for utterance in chosen]
    return float(settings["epochs"] * sum(min(each, settings["max_seconds"]) for each in seconds) / 3600)
