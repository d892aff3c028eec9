"""The model card of an export: metadata of the hub (YAML front matter with a model index) and text. Pure.

Fields: https://huggingface.co/docs/hub/model-cards and https://github.com/huggingface/hub-docs (modelcard.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# metric in results, `type` and `args` of the hub's model index, name
METRICS: Sequence[tuple[str, str, Mapping[str, str], str]] = (
    ("ua", "recall", {"average": "macro"}, "unweighted accuracy (UA, macro recall)"),
    ("wa", "accuracy", {}, "weighted accuracy (WA)"),
    ("macro_f1", "f1", {"average": "macro"}, "macro F1"),
)

ONNX = """
`model.onnx` gives the same logits without torch, one utterance at a time:

```python
import json
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {"waveform": wave[None]})[0][0]
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
```

Do not normalise the wave: where the model needs that, it is part of the graph.
"""


def model_card(facts: Mapping[str, Any], classes: Sequence[str], weights: str, *, onnx: bool = False) -> str:
    """Return the text of README.md.

    `facts` as in `jobs.commands.model_facts`: `experiment`, `run`, `corpus`, `method`, `label`, `fold`, `seed`, `metrics` of this run,
    `cells` (fold -> metrics of its runs), `planned` runs, `interval`, `licence`, `commit`, `packages`. `weights`: what training began with.
    `onnx`: model.onnx is beside the card.
    """
    import yaml

    estimates = cross_validated(facts["cells"])
    runs = sum(map(len, facts["cells"].values()))
    over = f"mean over {_counted(len(facts['cells']), 'fold')} of {_counted(runs, 'cross-validation run')}"
    name = f"{facts['corpus']}-{facts['method']}"
    metrics = [
        {
            "type": kind,
            "name": f"{title}, cross-validated estimate of the method: {over}",
            "value": round(estimates[key], 4),
            **({"args": dict(args)} if args else {}),
        }
        for key, kind, args, title in METRICS
        if key in estimates
    ]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "audio-classification",
        **({"license": facts["licence"]} if facts["licence"] else {}),
        "tags": ["audio-classification", "speech-emotion-recognition"],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "audio-classification", "name": "speech emotion recognition"},
                        "dataset": {"type": facts["corpus"], "name": facts["corpus"]},
                        "metrics": metrics,
                    }
                ],
            }
        ],
    }
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n{_text(name, facts, classes, weights, estimates, over, ONNX if onnx else '')}"


def cross_validated(cells: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean over folds of the mean over runs of every metric that all runs have; {} without runs."""
    folds = [runs for runs in cells.values() if runs]
    names = [key for key, *_ in METRICS if folds and all(key in run for runs in folds for run in runs)]
    return {key: sum(sum(run[key] for run in runs) / len(runs) for runs in folds) / len(folds) for key in names}


def _text(
    name: str, facts: Mapping[str, Any], classes: Sequence[str], weights: str, estimates: Mapping[str, float], over: str, usage: str
) -> str:
    finished = sum(map(len, facts["cells"].values()))
    missing = "" if finished >= facts["planned"] else f" {finished} of {_counted(facts['planned'], 'run')} have a result so far."
    interval = facts["interval"]
    named = {key: title for key, _, _, title in METRICS}
    rows = [f"| {named[key]} | {100 * value:.2f} % | {_percent(facts['metrics'].get(key))} |" for key, value in estimates.items()]
    bounds = f" 95 % interval of UA over folds and seeds: {interval[0]:.2f} to {interval[1]:.2f} %." if interval else ""
    packages = ", ".join(f"{package} {version}" for package, version in sorted(facts["packages"].items()))
    licence = facts["licence"] or "not stated. The corpus and the pretrained weights have licences of their own, which bind this model"
    return f"""
# {name}

Classifies the emotion of an utterance from speech (16 kHz): {", ".join(classes)}.

- Corpus: {facts["corpus"]}. Method: {facts["label"]}. Run {facts["run"]} of experiment {facts["experiment"]}, seed {facts["seed"]}.
- Trained on all folds but {facts["fold"]}, whose recordings it has not heard in training.
- Training began with: {weights or "weights that are not on record"}.
- Code: commit {facts["commit"] or "unknown"}; {packages or "packages not on record"}.
- Licence: {licence}.

## Evaluation

| metric | cross-validated estimate of the method | this run, on fold {facts["fold"]} |
|---|---|---|
{chr(10).join(rows)}

The first column is the {over}.{missing}{bounds} It is an estimate for
models trained like this one, on speakers that they have not heard; it is not a test of these weights.
The second column is a test of these weights, on one fold only.

## Use

```python
from transformers import pipeline

classify = pipeline("audio-classification", model=FOLDER, trust_remote_code=True, top_k=None)
classify(wave)  # numpy array (samples,), float32 in -1 to 1, 16 kHz, mono; or the path of a file, where ffmpeg is installed
```

`trust_remote_code=True` executes `modeling_ser_grid.py` of this folder; it imports transformers and torch only.
An utterance gives the same result in a batch as alone: the model computes every utterance of a batch
by itself, so `batch_size` above 1 saves no time.
{usage}
## Intended use and limits

For research on speech emotion recognition. It assigns one of the classes above to every input, also to
noise, silence and other emotions. The probabilities are outputs of a softmax and are not calibrated.
It has learned the speakers, language, recording conditions and labels of one corpus, and is known to
be right only as often as the table states, on that corpus. It does not tell what a person feels, and
is not fit for decisions about persons.
"""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
