"""Cost of controlling a large experiment: time, memory and system calls of one controller pass, calls of Slurm, and submission.

    python benchmarks/controller.py                                  # passes over 10 000 and 100 000 runs, Slurm calls
    python benchmarks/controller.py --sections submission --runs 300 # 300 runs accepted by a real Slurm (the test cluster, started here)

`pass`: the results of a whole grid are written to disk as plain files, then new processes make passes over them as `reconcile` does: open
the experiment and build its graph, read the facts of every stage, judge runs, plan what is missing. `first`: no earlier pass; `cold`: in a
new process after an earlier pass; `warm`: the second pass of a process. `changed`: since the last pass one run in a hundred was withdrawn
and one in a hundred has the result of another attempt. Nothing is submitted. `after retries`: every run got its result by its second
attempt, the first one was killed.
`slurm`: the same with job arrays; Slurm's commands are replaced by stubs that count calls and report an empty queue. One run in a hundred
is missing, so there is something to submit.
`submission`: seconds until every run of a grid is accepted: one array per stage and method, submitit's `map_array`, and its `submit` in a
loop. The jobs are held. Only this section needs Slurm.
`growth`: CPU seconds relative to the smallest grid. This ratio, not the seconds, carries over to other machines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.store.layout import Layout
from jobs.store.records import SCHEMA, Claim, Result

ROOT = Path(__file__).resolve().parents[1]
NAME = "large"
SLOTS = 100  # default number of seeds per cell
METHODS = 3
CLASSES = ("angry", "happy", "neutral", "sad")
PER_CLASS, RECALL, SPREAD = 125, 0.62, 0.03  # test utterances per class, mean recall and its sd
KEY, SEED, COUNT = "@KEY@", "987654321", "@COUNT@"  # placeholders in the text of a result
EVERY = 100  # one run in EVERY changes
CALLS = ("squeue", "sacct", "sbatch", "scontrol")


# ---- the experiment


def open_experiment(folder: Path) -> Any:
    """Open the experiment of a folder as a controller does: imports, configuration, graph."""
    from jobs.experiment.launched import reopen
    from ser_core.registry import REGISTRY
    from ser_core.settings.recipe import Recipe

    return reopen(Layout(folder, NAME), REGISTRY, Recipe)


def launch_grid(folder: Path, runs: int, slots: int) -> Any:
    """Launch a grid of about `runs` runs in a new folder, without starting it."""
    from jobs.experiment.config import load_experiment
    from jobs.experiment.launched import Corpus, launch, store
    from ser_core.registry import REGISTRY
    from ser_core.settings.recipe import Recipe

    folds = tuple(f"{number:04d}" for number in range(max(1, round(runs / METHODS / slots))))
    experiment = load_experiment(
        "emodb", [f"name={NAME}", f"seeds={slots}", "cluster=slurm"], configs=ROOT / "configs", recipe_schema=Recipe
    )
    launched = launch(experiment, Corpus("emodb", "d" * 64, folds, "/nowhere"), REGISTRY, Layout(folder, NAME))
    store(launched)
    return launched


def make_store(folder: Path, runs: int, slots: int) -> int:
    """Write the result of every stage of a grid, including reserve seeds for dropped runs; return the number of stages."""
    from jobs.control.controller import desired_of, look

    launched = launch_grid(folder, runs, slots)
    written: set[str] = set()
    while True:
        now = look(desired_of(launched))
        missing = [key for key in now.graph.nodes if key not in written]
        if not missing:
            return len(now.graph.nodes)
        for key in missing:
            write_stage(launched.layout, now.graph.nodes[key], 1, whole=bool(now.graph.children[key]))
        written.update(missing)


def write_stage(layout: Layout, node: Any, attempt: int, *, whole: bool) -> None:
    """Write a finished stage as its worker does, without fsync; not `whole`: only the files that a pass reads."""
    stage = layout.stage(node.stage, node.key)
    stage.path.mkdir(parents=True, exist_ok=True)
    if whole:
        output = stage.attempt(attempt).output
        output.mkdir(parents=True)
        (output / "predictions.csv").touch()
        claim = stage.attempt(attempt).claim
        claim.write_text(json.dumps({"schema": SCHEMA, **asdict(Claim(attempt, "n1", 1, "", 1.0, f"{attempt}_0", "n1"))}))
        os.utime(claim, (1, 1))  # an old claim
    text = result_text(node.stage, node.method, node.fold, attempt, json.dumps([node.settings, node.runtime, node.upstream]))
    text = text.replace(KEY, node.key).replace(SEED, str(node.seed))
    if node.stage == "finetune":
        text = text.replace(COUNT, json.dumps(draw_confusion(node.key), indent=1))
    (stage.path / "new.json").write_text(text)
    (stage.path / "new.json").rename(stage.result)


@lru_cache(maxsize=1000)
def result_text(stage: str, method: str, fold: str, attempt: int, node: str) -> str:
    """The text of a result, with placeholders where stages of the same kind differ."""
    settings, runtime, upstream = json.loads(node)
    run = stage == "finetune"
    measured = {"seconds": 24.0 + attempt, "runtime": runtime, "host": "n1", "packages": {f"package-{each}": "1.2.3" for each in range(10)}}
    measured |= {"seconds_before": 0.0, "peak_rss_bytes": 1 << 30, "device": "cpu", "processes": 1}
    result = Result(KEY, stage, 1, fold, int(SEED), "emodb", "d" * 64, settings, upstream, attempt, {"steps": 156}, measured)
    value = {"schema": SCHEMA, **asdict(result), "artifacts": {"predictions.csv": "e" * 64}, "classes": CLASSES if run else ()}
    value["confusion"] = [COUNT] if run else ()
    return json.dumps(value, indent=1, sort_keys=True).replace(f'[\n  "{COUNT}"\n ]', COUNT) + "\n"


def draw_confusion(name: str) -> tuple[tuple[int, ...], ...]:
    """A random confusion matrix."""
    drawn = random.Random(name)
    rows = []
    for each in range(len(CLASSES)):
        right = min(PER_CLASS, max(0, round(drawn.gauss(RECALL, SPREAD) * PER_CLASS)))
        row = [(PER_CLASS - right) // (len(CLASSES) - 1)] * len(CLASSES)
        row[each] = right
        row[each - 1] += PER_CLASS - sum(row)
        rows.append(tuple(row))
    return tuple(rows)


def change_runs(launched: Any, first: int) -> int:
    """Withdraw one result in EVERY and replace another by that of another attempt; return how many were changed."""
    runs = launched.graph.runs
    for run in runs[first::EVERY]:
        write_stage(launched.layout, launched.graph.nodes[run.key], first, whole=True)
        launched.layout.stage("finetune", run.key).result.unlink()
    replaced = runs[first + 1 :: EVERY]
    for run in replaced:
        write_stage(launched.layout, launched.graph.nodes[run.key], first, whole=True)
    return len(runs[first::EVERY]) + len(replaced)


def retry_runs(launched: Any) -> None:
    """Give every run the result of attempt 2; attempt 1 has a claim and no outcome."""
    for run in launched.graph.runs:
        node, stage = launched.graph.nodes[run.key], launched.layout.stage("finetune", run.key)
        for attempt in (1, 2):
            write_stage(launched.layout, node, attempt, whole=not stage.attempt(attempt).claim.exists())


# ---- one process that makes passes


def idle_executor() -> Any:
    """An executor without capacity."""
    from jobs.control.executor_protocol import Executor, Limits

    class Idle(Executor):
        def limits(self) -> Limits:
            return Limits()

        def in_flight(self) -> Mapping[str, Any]:
            return {}

        def submit(self, batch: Any, graph: Any, upstream: Mapping[str, Any]) -> Mapping[str, Any]:
            return {}

        def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
            return ()

    return Idle()


def counted_arrays(launched: Any, folder: Path) -> tuple[Any, Counter[str]]:
    """Job arrays with stubs of Slurm's commands: every submission is accepted, the queue is empty; calls are counted."""
    from jobs.slurm.client import SlurmClient
    from jobs.slurm.executor import SlurmArrays
    from jobs.worker.task import Workplace

    calls: Counter[str] = Counter()

    class Counting(SlurmClient):
        def _run(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
            calls[command[0]] += 1
            return subprocess.CompletedProcess(list(command), 0, "", "")

        def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: Any) -> str:
            calls["sbatch"] += 1
            return str(1000 + calls["sbatch"])

    place = Workplace("ser_core.registry:REGISTRY", str(folder), NAME, "emodb", "/nowhere", launched.corpus.digest)
    return SlurmArrays(launched.experiment, launched.layout, place, source=make_source(folder), client=Counting()), calls


def make_source(folder: Path) -> Path:
    """A folder with the code that a submission reads; the rest does not depend on the size of the grid."""
    source = folder / "source"
    if not source.exists():
        shutil.copytree(ROOT / "slurm_templates", source / "slurm_templates")
        shutil.copyfile(ROOT / "launch.py", source / "launch.py")
    return source


def make_passes(folder: Path, passes: int, *, began: float, slurm: bool, change: int) -> None:
    """Make passes in this process, one line of JSON each. `change`: which runs change before the second pass; 0: none."""
    from jobs.control.controller import desired_of, reconcile

    opened = time.time()
    launched = open_experiment(folder)
    opening = time.time() - opened
    executor, calls = counted_arrays(launched, folder) if slurm else (idle_executor(), Counter())
    desired = desired_of(launched)
    for number in range(passes):
        if number and change:
            change_runs(launched, change)
        calls.clear()
        began, used = (time.time(), time.process_time()) if number else (began, 0.0)
        report = reconcile(desired, executor)
        desired = replace(desired, graph=report.graph)
        measured = {
            "seconds": time.time() - began,
            "processor": time.process_time() - used,
            "opening": 0.0 if number else opening,
            "megabytes": peak_megabytes(),
            "runs": len(report.graph.runs),
            "dropped": len(report.judgements.dropped),
            "missing": sum(len(batch.keys) for batch in report.plan.batches),
            "calls": dict(calls),
        }
        print(json.dumps(measured), flush=True)


def peak_megabytes() -> float:
    """Peak memory of this process; the one of `getrusage` includes its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def ask(folder: Path, passes: int, *, slurm: bool = False, change: int = 0, trace: Path | None = None) -> list[dict[str, Any]]:
    """Passes of a new process; the first one is timed from the start of the process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--passes", str(passes), "--change", str(change)]
    command += ["--stand-in"] if slurm else []
    command += ["--began", repr(time.time())]
    if trace is not None:
        command = ["strace", "-f", "-c", "-o", str(trace), *command]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a pass failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def system_calls(folder: Path) -> int:
    """System calls of a process that makes one pass, including its start; 0 without strace."""
    if not shutil.which("strace"):
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        trace = Path(temporary) / "trace"
        ask(folder, 1, trace=trace)
        rows = [line.split() for line in trace.read_text().splitlines()]
        return sum(int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total")


# ---- submission to a real Slurm


@contextmanager
def test_cluster() -> Iterator[Any]:
    """The test cluster with partitions down: submitted jobs are accepted and stay pending."""
    from tests.slurm_cluster.cluster import Cluster
    from tests.slurm_cluster.configuration import ClusterSettings

    folder = Path(tempfile.mkdtemp(prefix="bench"))
    cluster = Cluster(folder, ClusterSettings())
    try:
        cluster.up()
        for partition in ("main", "high"):
            cluster.run("scontrol", "update", f"PartitionName={partition}", "State=DOWN")
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


def measure_submission(runs: int, slots: int, folder: Path) -> Iterator[tuple[str, float, int, int]]:
    """Measure each way of submission: seconds, calls of sbatch, array elements in the queue."""
    import submitit

    from jobs.control.controller import desired_of, reconcile
    from jobs.slurm.executor import SlurmArrays
    from jobs.worker.task import Workplace

    launched = launch_grid(folder / "results", runs, slots)
    place = Workplace("ser_core.registry:REGISTRY", str(folder / "results"), NAME, "emodb", "/nowhere", launched.corpus.digest)
    parameters = {"time": 60, "mem": "3GB", "cpus_per_task": 1}

    def ours() -> None:
        reconcile(desired_of(launched), SlurmArrays(launched.experiment, launched.layout, place, source=make_source(folder)))

    def array() -> None:
        executor = submitit.SlurmExecutor(folder=folder / "array")
        executor.update_parameters(**parameters, array_parallelism=runs)
        executor.map_array(time.sleep, [1] * len(launched.graph.runs))

    def loop() -> None:
        executor = submitit.SlurmExecutor(folder=folder / "loop")
        executor.update_parameters(**parameters)
        for _ in launched.graph.runs:
            executor.submit(time.sleep, 1)

    with test_cluster() as cluster:
        log, bin_folder = folder / "sbatch.log", folder / "bin"
        bin_folder.mkdir()
        real = shutil.which("sbatch", path=cluster.environment["PATH"])
        (bin_folder / "sbatch").write_text(f'#!/bin/sh\necho >> {log}\nexec {real} "$@"\n')
        (bin_folder / "sbatch").chmod(0o755)
        os.environ.update(cluster.environment, PATH=f"{bin_folder}:{cluster.environment['PATH']}")
        for name, submit in (
            (f"this program: {len(launched.graph.nodes)} stages of {len(launched.graph.runs)} runs, with dependencies", ours),
            ("submitit, map_array", array),
            ("submitit, submit in a loop", loop),
        ):
            log.write_text("")
            began = time.perf_counter()
            submit()
            seconds = time.perf_counter() - began
            held = len(cluster.run("squeue", "-h", "-r").splitlines())
            yield name, seconds, len(log.read_text().splitlines()), held
            cluster.clear()


# ---- tables


@dataclass(frozen=True)
class Row:
    """One measured pass."""

    what: str
    measured: Mapping[str, Any]
    system_calls: int = 0

    def cells(self, smaller: Row | None) -> tuple[str, ...]:
        """The row of the table; `smaller` is the same pass over the smallest grid."""
        measured = self.measured
        growth = f"{measured['processor'] / smaller.measured['processor']:.1f}" if smaller and smaller is not self else ""
        calls = " ".join(f"{name} {measured['calls'][name]}" for name in CALLS if name in measured["calls"])
        return (
            f"{measured['runs']}",
            self.what,
            f"{measured['missing']}",
            f"{measured['seconds']:.2f}",
            f"{measured['processor']:.2f}",
            f"{measured['opening']:.2f}" if measured["opening"] else "",
            growth,
            f"{measured['megabytes']:.0f}",
            f"{self.system_calls}" if self.system_calls else "",
            calls,
        )


def measure_passes(runs: int, slots: int, folder: Path, sections: Collection[str]) -> Iterator[Row]:
    """Create a store of one size and make every kind of pass over it."""
    began = time.perf_counter()
    stages = make_store(folder, runs, slots)
    Layout(folder, NAME).index.unlink(missing_ok=True)
    progress(f"{runs} runs: {stages} stages written in {time.perf_counter() - began:.0f} s")
    if "pass" in sections:
        first, warm = ask(folder, 2)
        yield Row("first", first)
        yield Row("cold, nothing changed", ask(folder, 1)[0], system_calls(folder))
        yield Row("warm, nothing changed", warm)
    if "retries" in sections:
        ask(folder, 1)
        without, _, warm_without = ask(folder, 3)
        retry_runs(open_experiment(folder))
        first, _, warm = ask(folder, 3)
        yield Row("cold, without retries", without)
        yield Row("warm, without retries", warm_without)
        yield Row("first after retries", first)
        yield Row("cold, after retries", ask(folder, 1)[0])
        yield Row("warm, after retries", warm)
    change_runs(open_experiment(folder), 3)
    if "pass" in sections:
        cold, warm = ask(folder, 2, change=10)
        yield Row("cold, changed", cold)
        yield Row("warm, changed", warm)
    if "slurm" in sections:
        first, second = ask(folder, 2, slurm=True)
        yield Row("arrays, first pass", first)
        yield Row("arrays, second pass", second)


def progress(text: str) -> None:
    """Report progress on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--slots", type=int, default=SLOTS, help="seeds of a cell")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made, on the file system to be measured; default: a temporary one"
    )
    parser.add_argument("--sections", nargs="+", choices=["pass", "retries", "slurm", "submission"], default=["pass", "slurm"])
    parser.add_argument("--passes", type=int, help=argparse.SUPPRESS)  # of a process that this one starts
    parser.add_argument("--change", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.passes:
        make_passes(options.folder, options.passes, began=options.began, slurm=options.stand_in, change=options.change)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        if {"pass", "retries", "slurm"} & set(options.sections):
            rows = [
                row for runs in options.runs for row in measure_passes(runs, options.slots, Path(temporary) / f"{runs}", options.sections)
            ]
            smallest = {row.what: row for row in reversed(rows)}
            head = ("runs", "pass", "to submit", "s", "s of a processor", "opening, s", "growth", "MB", "system calls", "calls of Slurm")
            print_table(head, [row.cells(smallest[row.what]) for row in rows])
        if "submission" in options.sections:
            found = list(measure_submission(min(options.runs), min(options.slots, 20), Path(temporary) / "submission"))
            shown = [
                (name, f"{seconds:.2f}", f"{found[-1][1] / seconds:.1f}", f"{calls}", f"{held}") for name, seconds, calls, held in found
            ]
            print_table(("submission", "s until accepted", "times as fast as the loop", "sbatch calls", "elements"), shown)


if __name__ == "__main__":
    main()
