"""`doctor` on this machine, on a Slurm with and without accounting, and its judgement of facts that cannot be produced here."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.doctor import (
    collect_folder,
    collect_python,
    collect_slurm,
    collect_torch,
    examine,
    file_system,
    probe,
    read_minutes,
    read_partitions,
)
from jobs.commands.doctor_checks import (
    Check,
    FolderFacts,
    Partition,
    ProbeFacts,
    PythonFacts,
    SlurmFacts,
    TorchFacts,
    Verdict,
    check_lines,
    checks_to_json,
    exit_code,
    judge_folder,
    judge_probe,
    judge_python,
    judge_slurm,
    judge_torch,
)
from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement
from tests.slurm_cluster import Cluster as SlurmCluster
from tests.slurm_cluster.configuration import ClusterSettings

ROOT = Path(__file__).resolve().parents[3]


def by_name(checks: tuple[Check, ...] | list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def experiment_of(site: SlurmSite | None = None) -> Experiment:
    return Experiment(name="trial", corpus="test", cluster=Cluster.slurm, slurm=site or SlurmSite())


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    """All local checks pass where the tests run, and no file remains."""
    checks = examine(tmp_path / "results", source=ROOT)
    found = by_name(checks)
    assert {"python", "packages", "torch", "gpus", "communication", "results", "records", "clock", "file system"} <= set(found)
    assert exit_code(checks) == 0
    assert found["python"].text == sys.version.split()[0]
    assert list((tmp_path / "results").iterdir()) == []
    value = json.loads(json.dumps(checks_to_json(checks)))
    assert (value["schema"], value["problems"], len(value["checks"])) == (1, 0, len(checks))


@pytest.mark.slurm
def test_a_slurm_with_accounting(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Limits, accounting, partitions and preemption as configured; the probe shows that compute nodes may submit."""
    said: list[str] = []
    checks = examine(tmp_path / "results", source=ROOT, experiment=experiment_of(), tell=said.append)
    found = by_name(checks)
    settings = slurm_cluster.settings
    assert f"MaxArraySize {settings.max_array_size}, MaxJobCount {settings.max_job_count}" in found["limits"].text
    assert found["accounting"] == Check("accounting", Verdict.ok, "sacct answers (accounting_storage/slurmdbd)")
    assert found["partition"].text == "main (default): time limit none, gpu:fake:2"
    assert "preemption REQUEUE" in found["interruptions"].text
    assert (found["interruptions"].verdict, found["request"].verdict) == (Verdict.note, Verdict.ok)
    assert (found["shared folder"].verdict, found["controller"].verdict) == (Verdict.ok, Verdict.ok)
    assert "the controller runs inside Slurm" in found["controller"].text
    assert exit_code(checks) == 0
    assert "a probe job" in said[0]
    assert list((tmp_path / "results").iterdir()) == []
    assert not slurm_cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING")


@pytest.mark.slurm
def test_problems_on_a_compute_node(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """Nodes that cannot submit: a crontab line; nodes that cannot start Python: the end of the output; an unknown partition."""
    client = SlurmClient()
    facts = probe(client, SlurmSite(environment={"PATH": "/nowhere"}), tmp_path)
    assert (facts.submits, facts.sees_files, bool(facts.host)) == (False, True, True)
    check = by_name(judge_probe(facts, "*/10 * * * * x"))["controller"]
    assert (check.verdict, "*/10 * * * * x" in check.advice, "`grid --wait`" in check.advice) == (Verdict.note, True, True)
    facts = probe(client, SlurmSite(python="/nowhere/python"), tmp_path, lag_seconds=1)
    assert (facts.ended, facts.host, "/nowhere/python" in facts.log) == (True, "", True)
    assert by_name(judge_probe(facts, ""))["shared folder"].verdict is Verdict.problem
    checks = judge_slurm(collect_slurm(client, SlurmSite(partition="nowhere")), SlurmSite(partition="nowhere"), Policy())
    assert by_name(checks)["partition"].advice == "slurm.partition: one of hidden, high, main"
    assert "invalid partition" in by_name(checks)["request"].text
    assert "invalid partition" in probe(client, SlurmSite(partition="nowhere"), tmp_path).submitted
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_cluster(slurm_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A separate Slurm without accounting, whose only node has too little memory for any request."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir=slurm_session.folder.parent))
    cluster = SlurmCluster(folder, ClusterSettings(nodes=1, memory_mb=1000, accounting=False))
    try:
        cluster.up()
        monkeypatch.setenv("SLURM_CONF", str(cluster.slurm_conf))
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slurm
def test_a_slurm_without_accounting_that_rejects_memory_requests(small_cluster: SlurmCluster, tmp_path: Path) -> None:
    """The advice names the key to set; a probe that does not start gives no result, and is cancelled."""
    client, site = SlurmClient(), SlurmSite()
    found = by_name(judge_slurm(collect_slurm(client, site), site, Policy()))
    assert (found["accounting"].verdict, found["accounting"].text) == (Verdict.note, "none (accounting_storage/none)")
    assert (found["request"].verdict, found["request"].advice) == (Verdict.problem, "slurm.memory_requests=false")
    small_cluster.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    facts = probe(client, replace(site, memory_requests=False), tmp_path, seconds=1)
    assert (facts.submitted, facts.started, facts.host) == ("", False, "")
    assert all("not known yet" in check.text for check in judge_probe(facts, ""))
    assert not small_cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING")
    small_cluster.stop_controller()
    checks = judge_slurm(collect_slurm(SlurmClient(look_seconds=2, looks=1), site), site, Policy())
    assert [(check.name, check.verdict) for check in checks] == [("slurm", Verdict.problem)]
    assert exit_code(checks) == 2


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the missing commands; nothing is submitted."""
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = judge_slurm(collect_slurm(SlurmClient(), SlurmSite()), SlurmSite(), Policy())
    assert [(check.verdict, "sbatch" in check.text) for check in checks] == [(Verdict.problem, True)]


def test_packages(tmp_path: Path) -> None:
    """Missing packages are a problem, other versions a note."""
    (tmp_path / "constraints.txt").write_text("# pinned\nnumpy==0.1\nnot-there-at-all==1.0\npytest-xyz==3\n")
    (tmp_path / "requirements.txt").write_text("numpy\nnot-there-at-all[extra]  # why\n")
    facts = collect_python(tmp_path / "constraints.txt", tmp_path / "requirements.txt")
    checks = judge_python(facts)
    assert [check.verdict for check in checks] == [Verdict.ok, Verdict.problem, Verdict.note]
    assert checks[1].text == "missing: not-there-at-all"
    assert "(pinned 0.1)" in checks[2].text
    old = judge_python(PythonFacts((3, 9, 1), {}, frozenset(), {}))
    assert old[0].verdict is Verdict.problem


def test_torch() -> None:
    """No GPU on a login node is fine; a CUDA build without NCCL is a problem."""
    cuda = TorchFacts("2.13.0", "13.0", ("H200", "H200"), True, True)
    assert by_name(judge_torch(cuda, slurm=False))["gpus"].text == "2: H200"
    assert by_name(judge_torch(replace(cuda, gpus=()), slurm=True))["gpus"].verdict is Verdict.ok
    assert by_name(judge_torch(replace(cuda, gpus=()), slurm=False))["gpus"].verdict is Verdict.note
    assert by_name(judge_torch(replace(cuda, nccl=False), slurm=True))["communication"].verdict is Verdict.problem
    assert exit_code(judge_torch(TorchFacts(error="No module named 'torch'"), slurm=False)) == 2


def test_torch_that_is_not_imported_in_time_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, or from a slow file system: a note, and no advice to install it again."""
    monkeypatch.setattr("jobs.commands.doctor.TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr("jobs.commands.doctor.TORCH_SECONDS", 0.2)
    (check,) = judge_torch(collect_torch(), slurm=True)
    assert (check.verdict, "make setup" in check.advice) == (Verdict.note, False)
    assert "unknown: importing it takes more than" in check.text


def test_the_results_folder(tmp_path: Path) -> None:
    """Space, clocks, disks of one machine, and a folder that cannot be written."""
    fine = FolderFacts("/r", "nfs4", 1e12, "", 0.01, 0.2)
    assert {check.verdict for check in judge_folder(fine, slurm=True)} == {Verdict.ok}
    assert by_name(judge_folder(replace(fine, kind="ext4"), slurm=True))["file system"].verdict is Verdict.note
    assert by_name(judge_folder(replace(fine, kind="ext4"), slurm=False))["file system"].verdict is Verdict.ok
    assert by_name(judge_folder(replace(fine, free=5e9), slurm=False))["results"].verdict is Verdict.note
    assert by_name(judge_folder(replace(fine, free=5e8), slurm=False))["results"].verdict is Verdict.problem
    assert by_name(judge_folder(replace(fine, skew=-4), slurm=False))["clock"].text.endswith("4.0 s behind")
    assert by_name(judge_folder(replace(fine, skew=90), slurm=False))["clock"].verdict is Verdict.problem
    assert by_name(judge_folder(replace(fine, seconds=2), slurm=False))["records"].verdict is Verdict.note
    (tmp_path / "file").write_text("")
    checks = judge_folder(collect_folder(tmp_path / "file" / "results"), slurm=False)
    assert [(check.verdict, "Not a directory" in check.text) for check in checks] == [(Verdict.problem, True)]


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    """The longest mount point above the path, the later of equal ones, spaces as escaped in /proc/mounts."""
    points = (("/", "ext4"), ("/home", "nfs4"), ("/home/my\\040data", "lustre"), ("/homework", "tmpfs"), ("/home", "beegfs"))
    mounts = "".join(f"device {point} {kind} rw 0 0\n" for point, kind in points)
    assert file_system(Path("/home/my data/results"), mounts) == "lustre"
    assert file_system(Path("/home/me"), mounts) == "beegfs"
    assert file_system(Path("/homework"), mounts) == "tmpfs"
    assert file_system(Path("/usr"), mounts) == "ext4"
    assert file_system(Path("/usr"), "") == ""


def test_partitions_and_their_limits() -> None:
    """Parsed from Slurm's output; the controller job must fit into its partition."""
    shown = (
        "PartitionName=gpu AllowGroups=ALL Default=NO DefaultTime=01:00:00 MaxTime=2-00:30:00 State=UP TRES=cpu=4\n"
        "PartitionName=short Default=YES DefaultTime=NONE MaxTime=00:10:00 State=DOWN\n"
    )
    gpu, short = read_partitions(shown, "gpu|gpu:a100:4(S:0-1)\ngpu|gpu:h100:8,nvme:1\nshort|(null)\n")
    assert gpu == Partition("gpu", False, True, 2910, 60, "gpu:a100:4, gpu:h100:8")
    assert short == Partition("short", True, False, 10, 0, "")
    assert [read_minutes(text) for text in ("UNLIMITED", "NONE", "7-00:00:00", "")] == [0, 0, 10080, 0]
    facts = SlurmFacts(version="slurm 24", partitions=(gpu, replace(short, up=True)), accounting=True)
    checks = by_name(judge_slurm(facts, SlurmSite(partition="gpu", controller_partition="short"), Policy()))
    assert checks["partition"].text == "gpu: time limit 2 d 0.5 h, gpu:a100:4, gpu:h100:8"
    assert checks["controller partition"].advice.startswith("policy.controller_minutes=10")
    without = by_name(judge_slurm(facts, SlurmSite(partition="gpu", controller_partition="short"), Policy(controller=False)))
    assert "controller partition" not in without
    down = by_name(judge_slurm(replace(facts, partitions=(gpu, short)), SlurmSite(), Policy(controller=False)))
    assert (down["partition"].verdict, "not up" in down["partition"].text) == (Verdict.problem, True)


def test_a_folder_that_nodes_do_not_see() -> None:
    """The probe answers, but could not read the question."""
    facts = ProbeFacts("", True, True, 3.0, "n2", False, True, "")
    assert by_name(judge_probe(facts, ""))["shared folder"].verdict is Verdict.problem


def test_a_queue_that_does_not_list_ones_own_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is looked up by its name: a squeue that hides it, while slurmctld has it, is a problem of its own."""
    monkeypatch.setattr(SlurmClient, "submit", lambda *arguments: "7")
    monkeypatch.setattr(SlurmClient, "queue", lambda *arguments, **options: ())
    monkeypatch.setattr(
        SlurmClient, "jobs_known", lambda client, jobs: tuple(QueuedElement(job, "PENDING", "Priority", "x") for job in jobs)
    )
    monkeypatch.setattr(SlurmClient, "cancel_named", lambda *arguments: None)
    facts = probe(SlurmClient(), SlurmSite(), tmp_path)
    (check,) = judge_probe(facts, "")
    assert (check.name, check.verdict) == ("queue", Verdict.problem)
    assert "does not list your own job" in check.text


def test_lines() -> None:
    """One line per check, its advice below it."""
    lines = check_lines([Check("a", Verdict.ok, "fine"), Check("longer", Verdict.problem, "bad", "mend it")])
    assert lines == ["ok      a       fine", "problem longer  bad", "                -> mend it", "1 problem"]


def test_transformers_that_cannot_be_imported() -> None:
    """A note where only torchaudio is the reason, which stages do without; a problem otherwise."""
    fine = TorchFacts("2.13.0", "", (), False, True)
    assert "transformers" not in by_name(judge_torch(fine, slurm=False))
    audio = by_name(judge_torch(replace(fine, models="OSError: could not load _torchaudio.abi3.so"), slurm=False))["transformers"]
    assert (audio.verdict, "pip uninstall torchaudio" in audio.advice) == (Verdict.note, True)
    assert by_name(judge_torch(replace(fine, models="ImportError: no"), slurm=False))["transformers"].verdict is Verdict.problem
