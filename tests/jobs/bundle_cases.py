"""A finished experiment with secrets planted wherever a user, a site or the program may leave them, for the tests of bundles."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.commands.session import Session
from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite
from jobs.experiment.graph import Node
from jobs.experiment.launched import Corpus, launch, store
from jobs.experiment.recipes import Variant
from jobs.store.layout import Layout
from jobs.store.records import Result, file_digest, write_result
from tests.command_line import ROOT
from tests.jobs import fake_registry
from tests.jobs.local_launch import workplace

WEBHOOK, TOKEN, DOTENV = "https://hooks.example.org/T0PSECRET", "token-of-the-environment", "value-of-dot-env"
USER, HOST, ACCOUNT, MAIL = "annaliese", "node0815", "proj4711", "annaliese@example.org"
PLANTED = (WEBHOOK, TOKEN, DOTENV, USER, HOST, ACCOUNT, MAIL, "smtp.example.org", "secret-of-another-site", "hook-of-another-experiment")
SHARED = "The folds of fake share speakers."
POOR = 3  # seed of a run that collapsed
SLOTS = 5


def finished(folder: Path, *, label: str = "Fine-tuned", measured: bool = False) -> Session:
    """An experiment below `folder`/annaliese: one variant, two folds, five slots, one run replaced as an outlier; its code is small.

    `measured`: in place of the variant, the corpus is measured.
    """
    home = folder / USER
    root = _code(home / "checkout")
    layout = Layout(home / "results", "exp")
    experiment = Experiment(
        name="exp",
        corpus="fake",
        methods=["length"] if measured else ["plain"],
        variants={} if measured else {"plain": Variant("vft", label, {"checkpoint": f"/home/{USER}/weights.pt"})},
        seeds=SLOTS,
        cluster=Cluster.slurm,
        site="mine",
        recipe={"checkpoint": f"~{USER}/weights.pt"},
        policy=Policy(webhook=WEBHOOK, mail=MAIL, mail_server="smtp.example.org"),
        slurm=SlurmSite(
            account=ACCOUNT, environment={"API": TOKEN, "THREADS": "8"}, prologue=[f"export KEY={TOKEN}"], python=f"/home/{USER}/py"
        ),
    )
    corpus = fake_registry.make_corpus(home / "corpus")
    source = {"path": f"/home/{USER}/corpora/fake", "kind": "csv"}
    (corpus / "manifest.json").write_text(json.dumps({"digest": "d1", "source": source, "utterances": [{"id": "u1", "label": "/a/"}]}))
    typed = ("grid", "exp", "--results", str(layout.root))
    launched = launch(experiment, Corpus("fake", "d1", ("1", "2"), str(corpus), (SHARED,)), fake_registry.REGISTRY, layout, typed=typed)
    store(launched)
    session = Session(launched, workplace(home), root, ROOT / "configs" / "published.yaml")
    report = session.look(ask_slurm=False)
    while missing := [node for key, node in report.graph.nodes.items() if not report.facts[key].done]:
        for node in missing:
            compute(layout, node)
        report = session.look(ask_slurm=False)
    assert measured or report.judgements.dropped
    return session


def compute(layout: Layout, node: Node) -> None:
    """Write the result of a stage, with the provenance of a job of the planted user on the planted host."""
    folder = layout.stage(node.stage, node.key)
    output = folder.attempt(1).output
    output.mkdir(parents=True)
    (output / "predictions.csv").write_text(f"id,predicted\nu{node.seed},sad\n")
    (output / "weights.safetensors").write_bytes(b"weights")
    scored = node.stage == "finetune"
    right = 0 if not scored else 6 if node.seed == POOR and node.fold == "1" else 40 + (7 * node.seed + int(node.fold)) % 5
    provenance = {
        **{"commit": "0123456789abcdef", "packages": {"torch": "2.13.0"}, "python": "3.12.1", "seconds": 3.5, "peak_rss_bytes": 1},
        **{"host": HOST, "folder": f"/home/{USER}/results/exp/snapshots/1", "changed": [f"{USER}.py"], "slurm_job": "4711_3"},
        **{"slurm": {"job_nodelist": HOST, "job_partition": "gpu"}, "arithmetic": {"device": "abacus", "precision": "exact"}},
        "runtime": {"weights": "random", "backbone": {"checkpoint": f"/home/{USER}/weights.pt"}},
    }
    result = Result(
        key=node.key,
        stage=node.stage,
        version=node.version,
        fold=node.fold,
        seed=node.seed,
        corpus="fake",
        corpus_digest="d1",
        settings=node.settings,
        upstream=node.upstream,
        attempt=1,
        metrics={} if scored else {"length": 12.5, "utterances": 8},
        provenance=provenance,
        confusion=((right, 50 - right), (10, 40)) if scored else (),
        classes=("angry", "sad") if scored else (),
        artifacts={path.name: file_digest(path) for path in sorted(output.iterdir())},
    )
    write_result(folder, result)


def _code(root: Path) -> Path:
    """A checkout of a few files that is no git repository, with secrets beside the code and in it."""
    files = {
        "launch.py": "print('launch')\n",
        "jobs/statistics.py": "mean = 1\n",
        "jobs/leaks.py": f"# export NAME={DOTENV}\n",
        "configs/recipe/paper.yaml": "{}\n",
        "configs/site/mine.yaml": f"account: {ACCOUNT}\nenvironment: {{API: {TOKEN}}}\n",
        "configs/site/other.yaml": "environment: {API: secret-of-another-site}\n",
        "configs/experiment/other.yaml": "policy: {webhook: hook-of-another-experiment}\n",
        "constraints.txt": "torch==2.13.0\n",
        ".env": f"NAME={DOTENV}\nexport SHORT=8\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
