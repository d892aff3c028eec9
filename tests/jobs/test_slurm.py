"""Submission to a real Slurm of three nodes: nothing doubled, nothing lost, elements start when their own upstream is there."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.config import SlurmSite
from jobs.errors import UsageError
from jobs.graph import Graph, Node
from jobs.plan import InFlight, Phase
from jobs.slurm import SlurmArrays
from jobs.slurm_client import SlurmClient, SlurmUnavailableError
from jobs.slurm_text import expand_indices
from jobs.submissions import State, SubmissionBook, new_submission
from tests.jobs.slurm_cases import arrays_of, batch_of, experiment_of, facts_of, graph_of, layout_of, node
from tests.slurm_cluster import Cluster

pytestmark = pytest.mark.slurm


def until(true: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError("it did not come to pass in time")
        time.sleep(0.1)


def drained(arrays: SlurmArrays) -> Callable[[], bool]:
    return lambda: not arrays.in_flight()


def array_jobs(cluster: Cluster) -> list[str]:
    """Numbers of all arrays that the controller remembers, ended ones too."""
    return sorted(set(cluster.run("squeue", "--noheader", "--states=all", "--format=%F").split()), key=int)


def started(folder: Path, key: str) -> float:
    facts = facts_of(folder, key)
    assert facts is not None, key
    return float(facts["start"])


def ended(folder: Path, key: str) -> float:
    facts = facts_of(folder, key)
    assert facts is not None, key
    return float(facts["end"])


def five_to_fifteen(*, failing: int | None = None) -> tuple[Graph, list[Node], list[Node]]:
    """Three upstream stages of growing length, three fine-tunings of each."""
    upstream = [node(f"up{fold}", "states", fold=str(fold), sleep=1 + 3 * fold, fail=fold == failing) for fold in range(3)]
    runs = [node(f"run{fold}{seed}", "finetune", {"states": f"up{fold}"}, fold=str(fold)) for fold in range(3) for seed in range(3)]
    return graph_of([*upstream, *runs]), upstream, runs


def test_elements_start_when_their_own_upstream_element_has_ended(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Three upstream elements, nine downstream: the first start while the last upstream one still runs; a failure stops only its own."""
    graph, upstream, runs = five_to_fifteen(failing=1)
    arrays = arrays_of(tmp_path)
    held = dict(arrays.submit(batch_of(upstream), graph, {}))
    held |= arrays.submit(batch_of(runs), graph, held)
    assert set(held) == set(graph.nodes)
    assert all(flight.phase is Phase.queued for flight in held.values())
    until(drained(arrays))
    for seed in range(3):
        assert ended(tmp_path, "up0") <= started(tmp_path, f"run0{seed}") < ended(tmp_path, "up2") - 2
        assert started(tmp_path, f"run2{seed}") >= ended(tmp_path, "up2")
        assert facts_of(tmp_path, f"run1{seed}") is None, "the upstream stage failed"
    assert len({held[run.key].job.partition("_")[0] for run in runs}) == 1


def test_equal_shapes_correspond_element_by_element(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Element i waits for element i: one dependency of the whole array says so, and one call repeats it without `singleton`."""
    upstream = [node(f"up{fold}", "states", sleep=0.5 + 3 * fold, fail=fold == 2) for fold in range(3)]
    chain = [node(f"down{fold}", "cluster", {"states": f"up{fold}"}) for fold in range(3)]
    graph = graph_of([*upstream, *chain])
    arrays = arrays_of(tmp_path)
    held = dict(arrays.submit(batch_of(upstream), graph, {}))
    job = held["up0"].job.partition("_")[0]
    preview = arrays.preview(batch_of(chain), graph, held)
    assert f"--dependency=aftercorr:{job},singleton" in preview.script
    assert preview.refinements == (f"scontrol update JobId=JOB_[0-2] Dependency=aftercorr:{job}",)
    arrays.submit(batch_of(chain), graph, held)
    until(drained(arrays))
    assert started(tmp_path, "down0") < ended(tmp_path, "up1")
    assert started(tmp_path, "down1") < ended(tmp_path, "up2")
    assert facts_of(tmp_path, "down2") is None


def test_thirty_elements_under_a_throttle_and_several_stages_in_one(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Sixty stages, two in each of thirty elements, never more than six elements at once; every element leaves its log."""
    nodes = [node(f"key{number:02}", "finetune", sleep=0.1) for number in range(60)]
    graph = graph_of(nodes)
    arrays = arrays_of(tmp_path, experiment_of(throttle=6, cpus=2))
    held = arrays.submit(batch_of(nodes, 2), graph, {})
    assert len(held) == 60
    assert len({flight.job for flight in held.values()}) == 30
    assert held["key00"].job == held["key01"].job
    seen: set[Phase] = set()

    def watched() -> bool:
        found = arrays.in_flight()
        seen.update(flight.phase for flight in found.values())
        return not found

    until(watched)
    assert seen == {Phase.queued, Phase.running}
    events = sorted((when, change) for one in nodes for when, change in ((started(tmp_path, one.key), 1), (ended(tmp_path, one.key), -1)))
    together = at_once = 0
    for _, change in events:
        together += change
        at_once = max(at_once, together)
    assert 2 <= at_once <= 6
    logs = list(layout_of(tmp_path).logs.iterdir())
    assert len(logs) == 30
    hosts = {facts["host"] for one in nodes if (facts := facts_of(tmp_path, one.key))}
    assert len(hosts) > 1 or not slurm_cluster.settings.namespaces


def test_a_second_submit_of_the_same_batch_submits_nothing(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """By the same process and by another one; once it has ended, it is submitted again under the next number."""
    nodes = [node("one", "states", sleep=30), node("two", "states", sleep=30)]
    graph, batch = graph_of(nodes), batch_of(nodes)
    arrays = arrays_of(tmp_path)
    before = array_jobs(slurm_cluster)
    first = arrays.submit(batch, graph, {})
    again = arrays.submit(batch, graph, {})
    other = arrays_of(tmp_path).submit(batch, graph, {})
    assert {key: flight.job for key, flight in first.items()} == {key: flight.job for key, flight in again.items()}
    assert {key: flight.job for key, flight in first.items()} == {key: flight.job for key, flight in other.items()}
    assert len(array_jobs(slurm_cluster)) == len(before) + 1
    cancelled = arrays.cancel(["two"])
    assert cancelled == (first["two"].job.replace("_1", "_[1]"),)
    until(lambda: set(arrays.in_flight()) == {"one"})
    arrays.cancel()
    until(drained(arrays))
    third = arrays.submit(batch, graph, {})
    assert third["one"].job.partition("_")[0] != first["one"].job.partition("_")[0]
    (record,) = SubmissionBook(layout_of(tmp_path)).open()
    assert record.name.endswith(".2")


def test_a_lost_reply_is_found_by_name(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """sbatch made the job, its reply was lost, the launcher died: the next pass finds the job and submits nothing."""
    nodes = [node("one", "states", sleep=20), node("two", "states", sleep=0)]
    graph, batch = graph_of(nodes), batch_of(nodes)
    held = arrays_of(tmp_path).submit(batch, graph, {})
    book = SubmissionBook(layout_of(tmp_path))
    (record,) = book.open()
    book.update(new_submission(record.name, batch, time.time()))  # as it was before sbatch answered
    before = array_jobs(slurm_cluster)
    later = arrays_of(tmp_path)
    looked = later.look_only()
    assert looked["one"].job == held["one"].job
    assert book.open()[0].state is State.intent, "a dry run writes nothing"
    found = later.in_flight()
    assert found["one"].job == held["one"].job
    (record,) = book.open()
    assert (record.state, record.job) == (State.submitted, held["one"].job.partition("_")[0])
    later.submit(batch, graph, {})
    assert array_jobs(slurm_cluster) == before


def test_an_ended_job_with_a_lost_reply_is_found_in_accounting(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The queue does not know the job any more, accounting does: it counts as submitted and ended, not as lost."""
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    arrays = arrays_of(tmp_path)
    arrays.submit(batch, graph, {})
    book = SubmissionBook(layout_of(tmp_path))
    (record,) = book.open()
    until(lambda: "COMPLETED" in slurm_cluster.run("sacct", "-X", "-n", f"--name={record.name}"))
    until(lambda: not slurm_cluster.run("squeue", "-h"))
    book.update(new_submission(record.name, batch, time.time() - 5))
    assert arrays_of(tmp_path).in_flight() == {}
    assert book.open() == ()
    assert book.next_name(batch).endswith(".2")


def test_an_intent_without_a_job_is_submitted_again_after_the_settle_time(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Until then its stages count as queued and nothing downstream is submitted; then the same name is used again."""
    nodes = [node("one", "states"), node("two", "finetune", {"states": "one"})]
    graph, batch = graph_of(nodes), batch_of(nodes[:1])
    now = time.time()
    clock = [now]
    arrays = arrays_of(tmp_path, settle_seconds=60, clock=lambda: clock[0])
    book = SubmissionBook(layout_of(tmp_path))
    name = book.next_name(batch)
    assert book.begin(new_submission(name, batch, now))
    held = arrays.in_flight()
    assert held["one"].phase is Phase.queued
    assert arrays.submit(batch, graph, {}) == held
    assert arrays.submit(batch_of(nodes[1:]), graph, held) == {}
    clock[0] = now + 230  # sbatch might still be waiting for the controller
    assert arrays.in_flight() == held
    clock[0] = now + 301
    assert arrays.in_flight() == {}
    submitted = arrays.submit(batch, graph, {})
    assert submitted["one"].job.endswith("_0")
    (record,) = book.open()
    assert (record.name, record.state) == (name, State.submitted)


def test_sbatch_without_a_reply_leaves_an_intent(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that does not answer: the outcome is unknown, the job turns up later and is the only one."""
    nodes = [node("one", "states", sleep=1)]
    graph, batch = graph_of(nodes), batch_of(nodes)
    arrays = arrays_of(tmp_path)
    real, fake = shutil.which("sbatch"), tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    reply = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    fake.write_text(f'#!/bin/sh\n{real} "$@" >/dev/null\necho "{reply}" >&2\nexit 1\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    held = arrays.submit(batch, graph, {})
    assert set(held) == {"one"}
    assert not held["one"].job[0].isdigit()
    assert not list((layout_of(tmp_path).submissions / "scripts").glob(".*")), "no temporary script stays"
    found = arrays.in_flight()
    assert found["one"].job.endswith("_0")
    assert arrays.submit(batch, graph, {})["one"].job == found["one"].job
    until(lambda: facts_of(tmp_path, "one") is not None)


def test_a_queue_that_cannot_be_seen_is_an_error(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never an empty queue: a controller that is away, or a squeue that prints nonsense, concludes nothing."""
    nodes = [node("one", "states", sleep=30)]
    graph = graph_of(nodes)
    client = SlurmClient(look_seconds=1.0, looks=2, pause=0.1)
    arrays = arrays_of(tmp_path, client=client)
    arrays.submit(batch_of(nodes), graph, {})
    slurm_cluster.pause_controller()
    try:
        with pytest.raises(SlurmUnavailableError, match="squeue failed 2 times"):
            arrays.in_flight()
        second = [node("two", "states")]
        with pytest.raises(SlurmUnavailableError):
            arrays.submit(batch_of(second), graph_of(second), {})
    finally:
        slurm_cluster.resume_controller()
    until(lambda: "UP" in slurm_cluster.run("scontrol", "ping", check=False))
    assert set(arrays.in_flight()) == {"one"}, "no intent stays of what was never asked for"
    fake = tmp_path / "bin" / "squeue"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho something else\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(SlurmUnavailableError, match="something else"):
        arrays.in_flight()


@pytest.mark.parametrize(
    "how", [("--signal=USR1",), ("--batch", "--signal=USR1"), ("--full", "--signal=USR1"), ()], ids=["step", "batch", "full", "cancel"]
)
def test_every_signal_of_slurm_reaches_the_worker(slurm_cluster: Cluster, tmp_path: Path, how: tuple[str, ...]) -> None:
    """A warning sent to the step, to the batch process or to both, and a cancellation."""
    nodes = [node("one", "states", sleep=60)]
    arrays = arrays_of(tmp_path)
    held = arrays.submit(batch_of(nodes), graph_of(nodes), {})
    until(lambda: facts_of(tmp_path, "one", begun=True) is not None)
    slurm_cluster.run("scancel", *how, held["one"].job)
    until(lambda: facts_of(tmp_path, "one") is not None, 10)
    facts = facts_of(tmp_path, "one")
    assert facts is not None
    assert set(facts["signals"]) == {"SIGUSR1" if how else "SIGTERM"}
    until(drained(arrays))


def test_jobs_run_the_snapshot_although_the_code_was_edited(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The upstream stage still runs when the code changes; the downstream job starts later and runs what was launched."""
    nodes = [node("one", "states", sleep=2), node("two", "finetune", {"states": "one"})]
    graph = graph_of(nodes)
    arrays = arrays_of(tmp_path)
    held = dict(arrays.submit(batch_of(nodes[:1]), graph, {}))
    arrays.submit(batch_of(nodes[1:]), graph, held)
    program = tmp_path / "source" / "launch.py"
    program.write_text(program.read_text().replace('"first"', '"second"'))
    until(drained(arrays))
    late = [node("three", "tapt")]
    fresh = arrays_of(tmp_path)
    fresh.submit(batch_of(late), graph_of(late), {})
    until(drained(fresh))
    versions = [facts["version"] for key in ("one", "two", "three") if (facts := facts_of(tmp_path, key))]
    assert versions == ["first", "first", "second"]
    facts = facts_of(tmp_path, "two")
    assert facts is not None
    assert Path(facts["cwd"]).parent == layout_of(tmp_path).snapshots


def test_hostile_names_stay_names(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Blanks, quotes and `$(...)` in paths, variables and options arrive as they are, and run nothing."""
    folder = tmp_path / 'it\'s a "folder" $(touch pwned) %j ; * &'
    folder.mkdir()
    value = "a 'b' \"c\" $(touch pwned) `touch pwned` \\ ; & | > # *"
    site = SlurmSite(environment={"HOSTILE": value}, extra={"comment": "it's $(touch pwned) # no"}, prologue=["export FROM_PROLOGUE=1"])
    nodes = [node("one", "states")]
    arrays = arrays_of(folder, experiment_of(site))
    held = arrays.submit(batch_of(nodes), graph_of(nodes), {})
    comment = slurm_cluster.run("squeue", "-h", "-t", "all", "-j", held["one"].job.partition("_")[0], "-o", "%k")
    assert comment == "it's $(touch pwned) # no"
    until(drained(arrays))
    facts = facts_of(folder, "one")
    assert facts is not None
    assert facts["environment"]["HOSTILE"] == value
    assert facts["environment"]["FROM_PROLOGUE"] == "1"
    assert not list(tmp_path.rglob("pwned"))
    (description,) = (layout_of(folder).submissions / "tasks").iterdir()
    assert [file.name for file in layout_of(folder).logs.iterdir()] == [f"{description.stem}_{held['one'].job}.out"]


def test_only_what_is_named_is_exported(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job does not depend on the shell that launched it, nor on a job that launches from inside another."""
    monkeypatch.setenv("LEAKED", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "99999999")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "7")
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    monkeypatch.setenv("SQUEUE_STATES", "COMPLETED")
    nodes = [node("one", "states", sleep=1)]
    arrays = arrays_of(tmp_path, experiment_of(minutes=5))
    held = arrays.submit(batch_of(nodes), graph_of(nodes), {})
    assert set(arrays.in_flight()) == {"one"}
    monkeypatch.delenv("SQUEUE_STATES")
    limit = slurm_cluster.run("squeue", "-h", "-t", "all", "-j", held["one"].job.partition("_")[0], "-o", "%l")
    assert limit == "5:00"
    until(drained(arrays))
    facts = facts_of(tmp_path, "one")
    assert facts is not None
    assert "LEAKED" not in facts["environment"]
    assert facts["environment"]["HOME"] == os.environ["HOME"]


def test_a_request_that_slurm_declines_is_told_and_leaves_no_intent(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """One line with Slurm's reason; after the profile is mended the same batch goes through."""
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    with pytest.raises(UsageError, match="Invalid partition name"):
        arrays_of(tmp_path, experiment_of(SlurmSite(partition="no such"))).submit(batch, graph, {})
    arrays = arrays_of(tmp_path, experiment_of(SlurmSite(partition="main")))
    assert arrays.in_flight() == {}
    assert arrays.submit(batch, graph, {})["one"].job.endswith("_0")


def test_limits_are_read_from_the_site(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """MaxArraySize and what is left under MaxJobCount or the profile's own limit; a full queue leaves no room."""
    arrays = arrays_of(tmp_path)
    limits = arrays.limits()
    assert limits.array_size == slurm_cluster.settings.max_array_size
    assert limits.queue_room == slurm_cluster.settings.max_job_count
    own = arrays_of(tmp_path, experiment_of(SlurmSite(max_submit=5, max_array_size=3)))
    nodes = [node(f"key{number}", "states", sleep=20) for number in range(3)]
    own.submit(batch_of(nodes), graph_of(nodes), {})
    own.in_flight()
    assert (own.limits().array_size, own.limits().queue_room) == (3, 2)
    more = [node(f"more{number}", "states", sleep=20) for number in range(2)]
    own.submit(batch_of(more), graph_of(more), {})
    assert own.limits().queue_room == -1
    assert len(own.live_jobs() or ()) == 5


def test_calls_do_not_grow_with_the_number_of_runs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """A pass over two arrays costs one squeue and at most one sacct; a submission as many calls as there are folds, and two."""
    client = SlurmClient()
    arrays = arrays_of(tmp_path, client=client)
    upstream = [node(f"up{fold}", "states", fold=str(fold), sleep=30) for fold in range(3)]
    runs = [node(f"run{number}", "finetune", {"states": f"up{number % 3}"}) for number in range(60)]
    graph = graph_of([*upstream, *runs])
    held: dict[str, InFlight] = dict(arrays.submit(batch_of(upstream), graph, {}))
    assert client.calls == 2
    held |= arrays.submit(batch_of(runs), graph, held)
    assert client.calls == 2 + 2 + 3
    arrays.in_flight()
    assert client.calls == 8
    records = slurm_cluster.run("scontrol", "--oneliner", "show", "job", held["run0"].job.partition("_")[0]).splitlines()
    waiting: dict[int, str] = {}
    for record in records:
        facts = dict(item.split("=", 1) for item in record.split() if "=" in item)
        waiting |= dict.fromkeys(expand_indices(facts["ArrayTaskId"]), facts["Dependency"])
    assert waiting == {number: f"afterok:{held[f'up{number % 3}'].job}(unfulfilled)" for number in range(60)}


def test_without_refinement_elements_start_later_and_never_too_early(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scontrol fails: every element waits for the whole upstream array."""
    graph, upstream, runs = five_to_fifteen()
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    arrays = arrays_of(tmp_path)
    held = dict(arrays.submit(batch_of(upstream), graph, {}))
    with monkeypatch.context() as without:
        without.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
        arrays.submit(batch_of(runs), graph, held)
    until(drained(arrays))
    last = max(ended(tmp_path, one.key) for one in upstream)
    assert all(started(tmp_path, run.key) >= last for run in runs)
