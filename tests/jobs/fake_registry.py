"""A small registry with real work for tests of the job system: stages add up numbers and write them to files.

Every start of a stage leaves a line in the corpus folder's `starts/KEY-LIKE-NAME`, every end in `ends/`, so that tests count executions
on disk. A recipe is {"failing": {"STAGE METHOD FOLD SEED": BEHAVIOUR}, "work": COUNT, "seconds": PAUSE}, with "STAGE METHOD * *" for all of
a stage that have no entry of their own. Behaviours:

    fail:N, kill:N, exit:N, comm:N     an exception, SIGKILL, a silent exit, a peer that is gone: the first N times
    hang:N, stall:N                    never ends, the first N times: does not hear, or leaves without a checkpoint when asked
    sleep:SECONDS, deaf:SECONDS        leaves with a checkpoint when asked, or does not hear
    oom:N, hostoom:N                   memory of GPU or host runs out while `relief` is below N
    meet:N                             waits until N stages are computed at the same time
    card:MB                            takes so much of the memory in the corpus's file `card`, which all processes share as they would a
                                       GPU's, and keeps it until another one was refused and has left; halved by every relief
    eat:MB, write:MB                   takes so much memory, halved by every relief; writes an artifact of that size
    nan, diverge, collapse             a metric or a loss that is not finite; a training loss that never left that of the class prior
    low                                the accuracy of chance
    refuse, broken                     the user's to mend; `broken` until the corpus has a file `mended`

Of a team, the processes wait for one another a few times and share what the leader knows, and one of them may the first time

    lost:R, frozen:R, stuck:R          be killed, be stopped, or break its promise to get on, while the others wait for it
    full:R                             run out of memory, as long as there is no `relief`
    wrong:R                            fail by itself
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from jobs.experiment.graph import Graph, Slot, build_graph, seeds_of_slots
from jobs.experiment.registry import StageArguments
from jobs.store.attempts import process_start
from jobs.store.records import write_text
from tests.waiting import wait_until

METHODS = ("vft", "tapt", "ptapt")
MEASUREMENTS = ("length",)
NAME = "tests.jobs.fake_registry:REGISTRY"
DIGEST_OF = "tests.jobs.fake_registry:read_digest"
PRELOADED: list[int] = []


@dataclass(frozen=True)
class FakeCall:
    stage: str
    settings: Mapping[str, Any]
    fold: str
    seed: int
    runtime: Mapping[str, Any] = field(default_factory=dict)
    upstream: Mapping[str, FakeCall] = field(default_factory=dict)
    version: int = 1


class FakeStopError(Exception):
    interrupted = True


class FakeDivergedError(Exception):
    diverged = True


class OutOfMemoryError(RuntimeError):
    """By the name and with the words of torch's own."""


class FakeInputError(Exception):
    def __init__(self, problems: tuple[str, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class FakeRegistry:
    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS

    @property
    def measurements(self) -> tuple[str, ...]:
        return MEASUREMENTS

    @property
    def teams(self) -> tuple[str, ...]:
        return ("states", "tapt", "ptapt", "finetune")

    def calls(self, method: str, recipe: Any) -> Callable[[str, int], FakeCall]:
        return lambda fold, seed: self.call(method, recipe, fold=fold, seed=seed)

    def call(self, method: str, recipe: Any, *, fold: str, seed: int) -> FakeCall:
        def stage(name: str, seed: int, **upstream: FakeCall) -> FakeCall:
            failing = recipe.get("failing", {})
            behaviour = failing.get(f"{name} {method} {fold} {seed}", failing.get(f"{name} {method} * *", ""))
            kept = {"keep": recipe.get("keep")} if name == "finetune" and recipe.get("keep") else {}
            runtime = {"behaviour": behaviour, "seconds": recipe.get("seconds", 0.0), **kept}
            return FakeCall(name, {"work": recipe.get("work", 10)}, fold, seed, runtime, upstream)

        if method == "length":
            return stage("length", 0)
        if method == "vft":
            return stage("finetune", seed)
        if method == "tapt":
            return stage("finetune", seed, backbone=stage("tapt", 0))
        states = stage("states", 0)
        return stage("finetune", seed, backbone=stage("ptapt", 0, labels=stage("cluster", 0, states=states)))

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Add up numbers, or behave as the recipe says; `oom:N` and `hostoom:N` need a `relief` of N to come through."""
        settings, runtime, corpus, seed = arguments["settings"], arguments["runtime"], arguments["corpus"], arguments["seed"]
        output, checkpoint, relief, team = arguments["output"], arguments["checkpoint"], arguments["relief"], arguments.get("team")
        report = arguments["report"]
        key = output.parents[2].name
        if team is not None and team.rank:
            begun = int(team.share())
            report(f"rank {team.rank} of {team.size}, {team.local_rank} of its machine")
            _together(team, runtime["behaviour"], begun, relief, output)
            return {}
        begun = _note(corpus / "starts" / key)
        if team is not None:
            _together(team, runtime["behaviour"], int(team.share(str(begun))), relief, output)
        report(f"start {begun} with {os.environ.get('OMP_NUM_THREADS')} threads, preloaded {bool(PRELOADED)}")
        _behave(runtime["behaviour"], begun, relief, checkpoint, arguments["should_stop"])
        _take(runtime["behaviour"], relief, corpus, output)
        _share(runtime["behaviour"], relief, corpus)
        time.sleep(runtime["seconds"])
        total = seed + sum(range(settings["work"]))
        for folder in arguments["upstream"].values():
            total += json.loads((folder / "sum.json").read_text())["sum"]
        (output / "sum.json").write_text(json.dumps({"sum": total}))
        (output / "parts").mkdir()
        (output / "parts" / "note.txt").write_text(stage)
        if runtime.get("keep"):
            (output / "model").mkdir()
            (output / "model" / "weights").write_text(stage)
        _note(corpus / "ends" / key)
        if stage == "length":
            return {"metrics": {"length": total / 4, "utterances": 8}}
        ua = float("nan") if runtime["behaviour"] == "nan" else 50.0 + total % 50
        confusion = [[4, 0], [4, 0]] if runtime["behaviour"] == "low" else [[3, 1], [0, 4]]
        returned: dict[str, Any] = {
            "metrics": {"ua": ua, "nested": {"parts": [total, 1.5]}},
            "confusion": confusion,
            "classes": ["angry", "sad"],
        }
        returned["arithmetic"] = {"device": "abacus", "precision": "exact"}
        if relief:
            returned["warnings"] = [f"computed with relief {relief}"]
        if runtime["behaviour"] == "collapse":
            return {**returned, "diverged": "training loss 0.693 is still at the class prior, 0.693"}
        return returned


REGISTRY = FakeRegistry()


def preload() -> None:
    """Called once in the fork server."""
    PRELOADED.append(os.getpid())


def read_digest(folder: Path) -> str:
    """Digest of a fake corpus: the text of its one file."""
    return (folder / "digest").read_text()


def make_corpus(folder: Path, digest: str = "d1") -> Path:
    """A corpus folder as this registry reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "digest", digest)  # atomically: workers of another launch may be reading it
    return folder


def make_graph(
    recipe: Mapping[str, Any] | None = None,
    *,
    methods: tuple[str, ...] = METHODS,
    folds: tuple[str, ...] = ("1", "2"),
    seeds: int = 2,
    generations: Mapping[Slot, int] | None = None,
) -> Graph:
    """The graph of a small experiment."""
    slots = seeds_of_slots(methods, folds, seeds=seeds, first_seed=0, generations=generations)
    return build_graph(REGISTRY, recipe or {}, corpus="fake", corpus_digest="d1", methods=methods, folds=folds, seeds=slots)


def count(corpus: Path, what: str) -> dict[str, int]:
    """Key -> how often a stage has started (`starts`) or ended well (`ends`)."""
    folder = corpus / what
    return {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()} if folder.is_dir() else {}


def _behave(behaviour: str, begun: int, relief: int, checkpoint: Path, should_stop: Callable[[], bool]) -> None:
    name, _, argument = behaviour.partition(":")
    if name == "oom" and relief < int(argument):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB")
    if name == "hostoom" and relief < int(argument):
        raise MemoryError
    if name == "comm" and begun <= int(argument):
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4242")
    if name == "diverge":
        raise FakeDivergedError("the loss is nan at step 7")
    if name == "fail" and begun <= int(argument):
        raise ValueError(f"made to fail, start {begun}\nwith a second line")
    if name == "refuse":
        raise FakeInputError(("no such checkpoint: name another", "and a second problem"))
    if name == "storage" and begun <= int(argument):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/corpus/u1.flac")
    if name == "kill" and begun <= int(argument):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exit" and begun <= int(argument):
        os._exit(7)
    while name in ("hang", "stall") and begun <= int(argument):
        time.sleep(0.02)
        if name == "stall" and should_stop():
            raise FakeStopError("asked to stop, with nothing to save")
    if name in ("sleep", "deaf"):
        end = time.monotonic() + float(argument)
        while time.monotonic() < end and not (checkpoint / "state.json").exists():
            time.sleep(0.02)
            if name == "sleep" and should_stop():
                (checkpoint / "state.json").write_text("{}")
                raise FakeStopError("asked to stop at step 3")


def _together(team: Any, behaviour: str, begun: int, relief: int, output: Path) -> None:
    """Wait for all of a team, a few times; the one that is told to does not come."""
    name, _, argument = behaviour.partition(":")
    culprit = name in ("lost", "frozen", "stuck", "wrong", "full") and team.rank == int(argument) and begun == 1
    for step in range(3):
        team.advance(3.0 if name == "stuck" and team.rank == int(argument) else 60.0)
        if culprit and step == 1:
            _fall_out(name, relief)
        (output.parent / f"step{step}.{team.rank}").touch()
        while len(list(output.parent.glob(f"step{step}.*"))) < team.size:
            time.sleep(0.02)
    team.advance(0.0)


def _fall_out(name: str, relief: int) -> None:
    if name == "lost":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "full" and not relief:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB")
    if name == "wrong":
        raise KeyError("no such layer")
    if name == "stuck":
        time.sleep(600)


def _take(behaviour: str, relief: int, corpus: Path, output: Path) -> None:
    """Memory, disk, or offence."""
    name, _, argument = behaviour.partition(":")
    if name == "eat":
        bytes((int(argument) << 20) >> relief)
    if name == "write":
        (output / "large.bin").write_bytes(bytes(int(argument) << 20))
    if name == "broken" and not (corpus / "mended").exists():
        raise ValueError(f"broken in process {os.getpid()}")


def _share(behaviour: str, relief: int, corpus: Path) -> None:
    """Company: wait for it, or compete with it."""
    name, _, argument = behaviour.partition(":")
    if name == "meet":
        _enter(corpus / "inside", 1)
        _wait_for(lambda: (corpus / "met").exists() or len(_inside(corpus / "inside")) >= int(argument))
        (corpus / "met").touch()
    if name == "card":
        with (corpus / "card").open() as card:
            fcntl.flock(card, fcntl.LOCK_EX)
            wanted = int(argument) >> relief
            if wanted + sum(_inside(corpus / "held").values()) > int(card.read()):
                (corpus / "refused").write_text(str(os.getpid()))
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB")
            _enter(corpus / "held", wanted)
        _wait_for(lambda: (corpus / "refused").exists() and not Path("/proc", (corpus / "refused").read_text() or "self").exists())


def _enter(folder: Path, value: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).write_text(str(value))


def _inside(folder: Path) -> dict[str, int]:
    """Processes that have entered a folder and live -> what they wrote."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {name: int((folder / name).read_text() or 0) for name in names if process_start(int(name))}


def _wait_for(true: Callable[[], bool]) -> None:
    if not wait_until(true, step=0.01):
        raise TimeoutError("the other process did not reach this point")


def _note(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())
