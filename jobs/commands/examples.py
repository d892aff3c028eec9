"""Two examples of each command of `launch.py`, which end its `--help`."""

from __future__ import annotations

from collections.abc import Mapping

import typer

EXAMPLES: Mapping[str, tuple[str, str]] = {  # command -> its words after `python launch.py`
    "prepare": (
        "prepare iemocap --source /data/IEMOCAP_full_release",
        "prepare csv --source my_corpus.csv --name mine --folds leave-one-speaker-out",
    ),
    "init": ("init mine --corpus mine", "init small --corpus mine --like emodb --out small.yaml"),
    "config": ("config mine --changed", "config iemocap seeds=20 recipe.preset=published"),
    "grid": ("grid demo", "grid iemocap --cluster slurm site=mysite seeds=20 --dry-run"),
    "resume": ("resume iemocap", "resume iemocap --wait"),
    "reconcile": ("reconcile iemocap", "reconcile iemocap --results /project/results"),
    "status": ("status iemocap --watch", "status iemocap --json"),
    "explain": ("explain iemocap tapt/1/0", "explain iemocap 3f9c2ab41d"),
    "logs": ("logs iemocap tapt/1/0 --follow", "logs iemocap tapt/1/0 --stage tapt --lines 50"),
    "cancel": ("cancel iemocap", "cancel iemocap tapt/1/0 tapt/1/1"),
    "collect": ("collect iemocap --format latex --out paper/tables", "collect --from runs.csv"),
    "export": ("export emodb tapt/03/0 --out model --licence mit", "export emodb-peft lora/03/0 --out merged --merge"),
    "predict": ("predict emodb tapt/03/0 a.wav b.flac", "predict model --list files.txt --format jsonl --out emotions.jsonl"),
    "bundle": ("bundle iemocap", "bundle iemocap --out supplement.zip --numbers siunitx"),
    "verify": ("verify supplement.zip", "verify supplement.zip --out rendered"),
    "sweep": ("sweep demo", "sweep iemocap --cluster slurm 'sweep.counts=[8,64,512]' --dry-run"),
    "doctor": ("doctor iemocap", "doctor --cluster slurm site=mysite"),
    "list": ("list", "list --json"),
    "du": ("du", "du --results /project/results"),
    "clean": ("clean iemocap --dry-run", "clean iemocap --whole --keep-tables"),
}


def add_examples(app: typer.Typer, program: str) -> None:
    """End the help of each command that has examples with them. `program`: the words before the command."""
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        if name in EXAMPLES:
            command.epilog = "\n\n".join(("Examples:", *(f"{program} {words}" for words in EXAMPLES[name])))
