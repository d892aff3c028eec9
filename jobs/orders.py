"""What a process must know of a stage to compute it: what the leader of a team tells its followers, and goes by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.graph import Node
from jobs.layout import Layout
from jobs.rendezvous import TeamError
from jobs.stages import StopSignal, Team
from jobs.tasks import Workplace, load_registry

SEEN_SECONDS = 60.0  # until a folder that another machine has made is seen: what attribute caches of NFS may hide
SEEN_POLL_SECONDS = 0.2


def order_of(node: Node, place: Workplace, *, upstream: Mapping[str, Path], output: Path, checkpoint: Path, relief: int) -> dict[str, Any]:
    """Everything that determines how a stage is computed, as a JSON value."""
    folders = {"upstream": {role: str(path) for role, path in upstream.items()}, "output": str(output), "checkpoint": str(checkpoint)}
    return {"node": asdict(node), "place": asdict(place), "relief": relief, **folders}


def follow_order(order: Mapping[str, Any], team: Team, stop: StopSignal, tell: Callable[[str], None]) -> None:
    """A follower's part of a stage; what it returns is the leader's to publish. Raises TeamError for a folder that cannot be seen here."""
    _wait_for([Path(folder) for folder in (*order["upstream"].values(), order["output"])])
    compute(order, team, stop, tell)


def compute(order: Mapping[str, Any], team: Team | None, stop: StopSignal, tell: Callable[[str], None]) -> Mapping[str, Any]:
    """What the registry returns for a stage, in any process that computes it; `team` None: it computes alone."""
    node = Node(**order["node"])
    place = Workplace(**{**order["place"], "packages": tuple(order["place"]["packages"])})
    return load_registry(place).run(
        node.stage,
        settings=node.settings,
        runtime=node.runtime,
        corpus=Path(place.corpus_folder),
        fold=node.fold,
        seed=node.seed,
        upstream={role: Path(folder) for role, folder in order["upstream"].items()},
        output=Path(order["output"]),
        checkpoint=Path(order["checkpoint"]),
        should_stop=stop,
        report=lambda line: tell(f"{node.name}: {line}"),
        relief=int(order["relief"]),
        team=team,
        shared=Layout(Path(place.results), place.experiment).cache,
    )


def _wait_for(folders: list[Path], seconds: float = SEEN_SECONDS) -> None:
    """A shared file system may show this machine late what another has made."""
    deadline = time.monotonic() + seconds
    while missing := [folder for folder in folders if not folder.is_dir()]:
        if time.monotonic() >= deadline:
            raise TeamError(f"{missing[0]} is not to be seen on this machine")
        time.sleep(SEEN_POLL_SECONDS)
