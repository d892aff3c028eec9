"""Submission to a real Slurm of three nodes: nothing doubled, nothing lost, elements start when their own upstream is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jobs.commands.cancel import cancel
from jobs.commands.session import Session
from jobs.control.facts import InFlight, Phase
from jobs.experiment.config import SlurmSite
from jobs.experiment.graph import Graph, Node
from jobs.experiment.launched import without_configuration
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import expand_indices
from jobs.slurm.submissions import SubmissionBook
from jobs.store.cancellations import read_cancellations
from tests.jobs.slurm_cases import (
    array_jobs,
    arrays_of,
    arrays_since,
    batch_of,
    drained,
    ended,
    experiment_of,
    facts_of,
    graph_of,
    layout_of,
    node,
    place_of,
    runs_of,
    started,
)
from tests.slurm_cluster import Cluster
from tests.waiting import until

pytestmark = pytest.mark.slurm


def five_to_fifteen(*, failing: int | None = None) -> tuple[Graph, list[Node], list[Node]]:
    """Three upstream stages of growing length, three fine-tunings of each."""
    upstream = [node(f"up{fold}", "states", fold=str(fold), sleep=1 + 3 * fold, fail=fold == failing) for fold in range(3)]
    runs = [node(f"run{fold}{seed}", "finetune", {"states": f"up{fold}"}, fold=str(fold)) for fold in range(3) for seed in range(3)]
    return graph_of([*upstream, *runs]), upstream, runs


def test_elements_start_when_their_own_upstream_element_has_ended(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Nine downstream elements of three upstream ones: the first start while one upstream element runs; a failure stops only its own."""
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
    """Element i waits for element i: `aftercorr` for the whole array, and one call that repeats it without `singleton`."""
    upstream = [node(f"up{fold}", "states", sleep=0.5 + 6 * fold, fail=fold == 2) for fold in range(3)]
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
    """By the same process and by another one; after it has ended it is submitted again under the next number."""
    nodes = [node("one", "states", sleep=30), node("two", "states", sleep=30)]
    graph, batch = graph_of(nodes), batch_of(nodes)
    arrays = arrays_of(tmp_path)
    before = array_jobs(slurm_cluster)
    first = arrays.submit(batch, graph, {})
    again = arrays.submit(batch, graph, {})
    other = arrays_of(tmp_path).submit(batch, graph, {})
    assert {key: flight.job for key, flight in first.items()} == {key: flight.job for key, flight in again.items()}
    assert {key: flight.job for key, flight in first.items()} == {key: flight.job for key, flight in other.items()}
    assert len(arrays_since(slurm_cluster, before)) == 1
    arrays.in_flight()
    assert set(arrays.cancel_all()) == {"one", "two"}
    until(drained(arrays))
    third = arrays.submit(batch, graph, {})
    assert third["one"].job.partition("_")[0] != first["one"].job.partition("_")[0]
    assert [record.name[-2:] for record in SubmissionBook(layout_of(tmp_path)).open() if not record.all_left] == [".2"]


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
    until(lambda: facts_of(tmp_path, "one") is not None)
    facts = facts_of(tmp_path, "one")
    assert facts is not None
    assert set(facts["signals"]) == {"SIGUSR1" if how else "SIGTERM"}
    until(drained(arrays))


def test_jobs_run_the_snapshot_although_the_code_was_edited(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The upstream stage still runs when the code changes; the downstream job starts later and runs the code of the launch."""
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


def test_special_characters_are_quoted(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Blanks, quotes and `$(...)` in paths, variables and options arrive unchanged, and are not executed."""
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


def test_only_listed_variables_are_exported(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job depends neither on the shell that launched it nor on the job from which it was launched."""
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


def test_limits_are_read_from_the_site(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """MaxArraySize, and what is left under MaxJobCount or the profile's own limit; a full queue leaves no room."""
    arrays = arrays_of(tmp_path)
    limits = arrays.limits()
    assert limits.array_size == slurm_cluster.settings.max_array_size
    assert limits.queue_room == slurm_cluster.settings.max_job_count - 3  # kept for the controller
    own = arrays_of(tmp_path, experiment_of(SlurmSite(max_submit=5, max_array_size=3)))
    nodes = [node(f"key{number}", "states", sleep=20) for number in range(3)]
    own.submit(batch_of(nodes), graph_of(nodes), {})
    own.in_flight()
    assert (own.limits().array_size, own.limits().queue_room) == (3, 2)
    more = [node(f"more{number}", "states", sleep=20) for number in range(2)]
    own.submit(batch_of(more), graph_of(more), {})
    assert own.limits().queue_room == -1
    assert len(own.live_jobs() or ()) == 5


def test_the_number_of_slurm_calls_does_not_grow_with_the_runs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """A pass over two arrays: one squeue, one by number and one sacct while elements leave. A submission: one call per fold, and two."""
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
    assert len(arrays.cancel_all()) == 63
    assert client.calls == 8 + 2
    until(lambda: not slurm_cluster.run("squeue", "-h"))
    assert arrays.in_flight() == {}
    assert client.calls == 10 + 3


def test_final_states_from_accounting(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Done, failed, cancelled by a user, and when they ended; from the records of any process."""
    nodes = [node("fine", "states"), node("fails", "states", fail=True), node("by hand", "states", sleep=60)]
    arrays = arrays_of(tmp_path)
    held = arrays.submit(batch_of(nodes), graph_of(nodes), {})
    until(lambda: facts_of(tmp_path, "by hand", begun=True) is not None)
    before = time.time()
    slurm_cluster.run("scancel", held["by hand"].job)
    until(
        lambda: "CANCELLED" in slurm_cluster.run("sacct", "--allocations", "--noheader", "--format=State", f"--jobs={held['by hand'].job}")
    )
    after = time.time()
    time.sleep(2)  # the pass that misses it comes later than its end
    until(lambda: not arrays.in_flight() and not arrays.settling())
    found = arrays_of(tmp_path).departures([node.key for node in nodes])
    assert {key: [each.state for each in departures] for key, departures in found.items()} == {
        "fine": ["COMPLETED"],
        "fails": ["FAILED"],
        "by hand": [f"CANCELLED by {os.getuid()}"],
    }
    assert {departure.job for departures in found.values() for departure in departures} == {flight.job for flight in held.values()}
    assert not any(departure.withdrawn for departures in found.values() for departure in departures)
    (cancelled,) = found["by hand"]
    assert cancelled.ended is not None
    assert int(before) <= cancelled.ended <= after < cancelled.gone
    assert SubmissionBook(layout_of(tmp_path)).open() == ()


def test_pending_elements_can_be_withdrawn(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Running ones are left; the record marks them as withdrawn also if the launcher was killed before scancel."""
    nodes = [node(f"key{number}", "states", sleep=0 if number else 3) for number in range(10)]
    arrays = arrays_of(tmp_path, experiment_of(throttle=1))
    held = arrays.submit(batch_of(nodes, 2), graph_of(nodes), {})
    until(lambda: arrays.in_flight()["key0"].phase is Phase.running)
    assert set(arrays.cancel(["key0", "key1", "key2", "key4", "key5", "key8", "key9"])) == {"key4", "key5", "key8", "key9"}
    assert set(arrays.in_flight()) == {"key0", "key1", "key2", "key3", "key6", "key7"}
    book = SubmissionBook(layout_of(tmp_path))
    book.change(book.open()[0], cancelled=[3])
    arrays_of(tmp_path).in_flight()
    assert set(arrays.in_flight()) == {"key0", "key1", "key2", "key3"}
    until(drained(arrays))
    assert [len(runs_of(tmp_path, one.key)) for one in nodes] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    found = arrays.departures([one.key for one in nodes])
    assert {key for key, (departure,) in found.items() if departure.withdrawn} == {f"key{number}" for number in range(4, 10)}
    assert held["key8"].job == found["key8"][0].job


def test_one_element_is_requeued_alone(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The last one, whose raw job id is the array's: it runs again under the same name, and no other element does."""
    nodes = [node(f"key{number}", "states", sleep=2 if number == 2 else 0) for number in range(3)]
    client = SlurmClient()
    arrays = arrays_of(tmp_path, client=client)
    held = arrays.submit(batch_of(nodes), graph_of(nodes), {})
    last = held["key2"].job
    until(lambda: facts_of(tmp_path, "key2", begun=True) is not None)
    assert client.requeue(last)
    until(lambda: len(runs_of(tmp_path, "key2")) == 2)  # Slurm lets some seconds go by before it starts a job anew
    until(drained(arrays))
    assert [runs_of(tmp_path, one.key) for one in nodes] == [[held["key0"].job], [held["key1"].job], [last, last]]
    assert not client.requeue("99999_0")
    with pytest.raises(ValueError, match="ARRAY_INDEX"):
        client.requeue(last.partition("_")[0])


def test_a_node_that_cannot_start_jobs_is_excluded(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Slurm holds the element for ever: it is withdrawn, recorded as a failed launch, and runs on another node."""
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    arrays = arrays_of(tmp_path, experiment_of(SlurmSite(exclude="n1,n2")))
    spool = slurm_cluster.folder / "spool" / "n3"
    spool.rename(spool.with_name("away"))
    spool.write_text("no folder")
    try:
        held = arrays.submit(batch, graph, {})
        until(lambda: bool(arrays.stuck()) or not arrays.in_flight())
        until(drained(arrays))
    finally:
        spool.unlink()
        spool.with_name("away").rename(spool)
    until(lambda: not arrays.in_flight() and not arrays.settling())
    (departure,) = arrays.departures(["one"])["one"]
    assert (departure.job, departure.state, departure.withdrawn) == (held["one"].job, "LAUNCH_FAILED", True)
    assert runs_of(tmp_path, "one") == []
    again = arrays_of(tmp_path)
    assert [SlurmClient().node_count(SlurmSite(partition=name)) for name in (None, "main", "main,none", "none")] == [3, 3, 3, 0]
    assert "#SBATCH --exclude=n3\n" in again.preview(batch, graph, {}).script
    again.submit(batch, graph, {})
    until(drained(again))
    assert len(runs_of(tmp_path, "one")) == 1


def test_an_experiment_whose_configuration_cannot_be_read_is_cancelled(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Its arrays leave the queue, running elements too, and no link of the chain stays."""
    nodes = [node(f"up{number}", "states", sleep=120) for number in range(3)]
    graph, arrays, layout = graph_of(nodes), arrays_of(tmp_path), layout_of(tmp_path)
    arrays.submit(batch_of(nodes), graph, {})
    layout.experiment_file.write_text('{"launched": 1, "config": {"later": 1}')
    session = Session(without_configuration(layout), place_of(tmp_path), tmp_path / "source", tmp_path / "published.yaml")
    done = cancel(session, ())
    assert (done.stages, done.withdrawn) == (None, len(graph.nodes))
    until(drained(arrays))
    assert read_cancellations(layout, 1.0).everything


def test_the_cluster_is_asked_for_its_name_once(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the claims of its jobs state it. Inside a job the environment has it."""
    client = SlurmClient()
    arrays = arrays_of(tmp_path, client=client)
    job = slurm_cluster.run("srun", "printenv", "SLURM_CLUSTER_NAME").strip()
    assert (arrays.cluster(), arrays.cluster(), client.calls) == (job, job, 1)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "other")
    assert arrays.cluster() == "other"
