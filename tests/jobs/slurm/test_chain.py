"""The controller chain on a real Slurm: links make a pass each and two wait, whatever is killed, until there is nothing left to do."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.experiment.config import SlurmSite
from jobs.slurm.chain import (
    LINKS,
    Chain,
    ChainState,
    ControllerRecord,
    LinkState,
    Phase,
    chain_state,
    link_name,
    log_file,
    read_record,
    record_file,
    write_record,
)
from jobs.slurm.chain_link import MAX_FAILING, STUCK_SECONDS, LinkEnd, run_link
from jobs.slurm.parse import QueuedElement
from jobs.store.layout import Layout
from jobs.store.records import write_json
from tests.jobs.slurm.chain_cases import chain_of, goes_on, in_queue, launch, layout_of, lines, look, order, pending
from tests.simulation.slurm import AWAY
from tests.slurm_cluster import Cluster as SlurmCluster
from tests.waiting import until


@pytest.fixture
def chains(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[SlurmCluster]:
    """A Slurm whose chains end with the test: a link that is cancelled first could submit another."""
    yield slurm_cluster
    for orders in tmp_path.rglob("orders.json"):
        write_json(orders, {"settled": True})
    until(lambda: not slurm_cluster.run("squeue", "--noheader"))


@pytest.mark.slurm
def test_concurrent_starts_make_one_chain_that_ends_by_itself(chains: SlurmCluster, tmp_path: Path) -> None:
    """Four launchers at once, twice: two links wait after the next pass; once settled, tables are made once and the queue is empty."""
    layout = launch(tmp_path)
    assert look(layout).phase is Phase.none
    chain_of(tmp_path)
    for _ in range(2):
        launchers = [threading.Thread(target=chain_of(tmp_path).ensure) for _ in range(4)]
        for launcher in launchers:
            launcher.start()
        for launcher in launchers:
            launcher.join()
    assert goes_on(tmp_path)
    until(lambda: len(pending(chains, layout)) == LINKS)
    state = chain_of(tmp_path).ensure()
    assert (state.phase in (Phase.running, Phase.pending), state.problem) == (True, "")
    until(lambda: look(layout).phase is Phase.pending)
    assert "last pass" in look(layout).sentence
    order(tmp_path, settled=True)
    until(lambda: not in_queue(chains, layout))
    assert lines(tmp_path, "ends") == ["settled"]
    assert look(layout).phase is Phase.ended
    assert "every run has a result" in look(layout).sentence


@pytest.mark.slurm
def test_links_never_overlap(chains: SlurmCluster, tmp_path: Path) -> None:
    """A pass that takes longer than the time between passes: the next one begins after it."""
    layout = launch(tmp_path, sleep=2.5)
    chain_of(tmp_path).ensure()
    for _ in range(20):
        assert sum(state == "RUNNING" for state, _ in in_queue(chains, layout)) <= 1
        time.sleep(0.5)
    begun = [float(line.split()[-1]) for line in lines(tmp_path, "passes")]
    assert len(begun) >= 2
    assert all(later - earlier >= 2.5 for earlier, later in itertools.pairwise(begun))


@pytest.mark.slurm
def test_links_start_before_tasks_that_wait_with_a_nice_value(chains: SlurmCluster, tmp_path: Path) -> None:
    """Tasks of the grid take every core and more wait: with `slurm.extra.nice` no link waits for all of them. Links have no nice value."""
    site = SlurmSite(extra={"nice": "1000", "comment": "ours"})
    layout = launch(tmp_path, site=asdict(site))
    tasks = ["--parsable", "--array=0-199", "--nice=1000", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    array = chains.run("sbatch", *tasks).strip()
    chain_of(tmp_path, site).ensure()
    link = in_queue(chains, layout)[0][1]
    assert "Nice=0" in chains.run("scontrol", "show", "job", link)
    assert goes_on(tmp_path)
    assert chains.run("squeue", "--noheader", f"--jobs={array}", "--states=PENDING")
    chains.run("scancel", array)


@pytest.mark.slurm
def test_the_chain_survives_killed_links_and_a_killed_slurmctld(chains: SlurmCluster, tmp_path: Path) -> None:
    """SIGKILL to slurmctld, then to a link in its pass: the next one makes it, and two wait again."""

    def in_its_pass() -> str:
        """Job of the link that sleeps in its pass; "" if none does yet."""
        job, *_, begun = lines(tmp_path, "passes")[-1].split()
        return job if time.time() - float(begun) > 3 and ("RUNNING", job) in in_queue(chains, layout) else ""

    layout = launch(tmp_path)
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path)
    order(tmp_path, sleep=20)
    until(in_its_pass)
    until(lambda: len(pending(chains, layout)) == LINKS)
    time.sleep(8)  # a killed slurmctld loses what it has not written yet, and gives the numbers of lost jobs to others
    order(tmp_path)
    chains.stop_controller(signal.SIGKILL)
    chains.start_controller()
    assert goes_on(tmp_path)
    order(tmp_path, sleep=30)
    until(in_its_pass)
    order(tmp_path)
    chains.run("scancel", "--signal=KILL", "--batch", in_its_pass())
    assert goes_on(tmp_path)
    until(lambda: len(pending(chains, layout)) == LINKS)


@pytest.mark.slurm
def test_a_hand_over_on_a_bad_node_costs_a_pass(chains: SlurmCluster, tmp_path: Path) -> None:
    """A node on which the program cannot run: links that start there are submitted again elsewhere, and the chain continues.

    Before: such a link ended before it had a successor. With the program broken on every node the chain waits until it runs again.
    """
    layout = launch(tmp_path, bad_nodes=["n1"])
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path)
    until(lambda: "n1" in lines(tmp_path, "bad"))
    assert {line.split()[3] for line in lines(tmp_path, "passes")} <= {"n2", "n3"}
    order(tmp_path, bad_nodes=["n1", "n2", "n3"])
    before = len(lines(tmp_path, "bad"))
    until(lambda: len(lines(tmp_path, "bad")) >= before + 5)
    assert pending(chains, layout), "a link that failed has left another one"
    order(tmp_path)
    assert goes_on(tmp_path)


@pytest.mark.slurm
def test_a_link_whose_code_cannot_be_seen_is_submitted_again(chains: SlurmCluster, tmp_path: Path) -> None:
    """The snapshot is away, as on a node without the shared folder: no Python runs, and yet the chain is there when it is back.

    Before: `cd ... || exit 1` ended the link, and with it the chain.
    """
    layout = launch(tmp_path)
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path, 1)
    current = layout.snapshots / "current"
    current.rename(layout.snapshots / "away")
    script = next((layout.folder / "submissions" / "scripts").glob("*.sh"))
    for job in pending(chains, layout):  # these would look for the folder for a minute
        chains.run("scancel", job)
    until(lambda: not in_queue(chains, layout))
    script.write_text(script.read_text().replace("{1..60}", "{1..2}").replace("now+$((1 ", "now+$((0 + 1 "))
    chains.run("sbatch", "--begin=now", str(script))
    until(lambda: "No such file" in log_file(layout).read_text())
    until(lambda: bool(pending(chains, layout)))
    (layout.snapshots / "away").rename(current)
    assert goes_on(tmp_path)


@pytest.mark.slurm
def test_a_link_requeues_itself_if_the_queue_is_full(chains: SlurmCluster, tmp_path: Path) -> None:
    """The submit limit leaves no place for a successor: the last link is requeued, which needs no further place."""
    layout = launch(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    full = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    (programs / "sbatch").write_text(f'#!/bin/sh\n[ -e {tmp_path}/full ] && {{ {full}; }}\nexec {shutil.which("sbatch")} "$@"\n')
    (programs / "sbatch").chmod(0o755)
    settings: dict[str, Any] = {"environment": {"PATH": f"{programs}:{os.environ['PATH']}"}}
    order(tmp_path, site=settings)
    (tmp_path / "full").touch()  # before the first link begins: it stands before the links' sbatch, not before that of the launcher
    chain_of(tmp_path, SlurmSite(**settings)).ensure()
    until(lambda: any(line.endswith(" alone") for line in lines(tmp_path, "links")))
    last = next(line.split()[0] for line in lines(tmp_path, "links") if line.endswith(" alone"))
    until(lambda: pending(chains, layout) == [last])
    assert len({line.split()[0] for line in lines(tmp_path, "passes")}) == LINKS, "no third link was submitted"
    assert "QOSMaxSubmitJobPerUserLimit" in (read_record(layout) or ControllerRecord()).problem
    (tmp_path / "full").unlink()
    assert goes_on(tmp_path)  # Slurm lets some seconds go by before it starts a job anew


@pytest.mark.slurm
def test_a_link_that_slurm_cannot_start_does_not_hold_up_the_chain(chains: SlurmCluster, tmp_path: Path) -> None:
    """As after a prolog that failed. Before: Slurm held the job ("launch failed requeued held"), and all other links waited for it."""
    layout = launch(tmp_path, sleep=2)
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path, 1)
    until(lambda: len(pending(chains, layout)) == LINKS)
    last = max(pending(chains, layout), key=int)
    for node in chains.settings.node_names:  # a file where slurmd would make the folder of the job
        (chains.folder / "spool" / node / f"job{int(last):05d}").touch()
    until(lambda: last not in pending(chains, layout) or look(layout).problem)
    order(tmp_path)
    assert goes_on(tmp_path, 2)
    assert last not in [line.split()[0] for line in lines(tmp_path, "passes")]
    chains.clear()  # Slurm has drained the node


@pytest.mark.slurm
@pytest.mark.parametrize("sleep", [120, 0], ids=["during a pass", "between two passes"])
def test_scancel_of_all_links_ends_the_chain(chains: SlurmCluster, tmp_path: Path, sleep: int) -> None:
    """No link submits another, and the state of the chain is broken."""
    layout = launch(tmp_path, sleep=sleep)
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path, 1)
    until(lambda: len(pending(chains, layout)) == LINKS)
    chains.run("scancel", f"--name={link_name(layout)}")
    until(lambda: not in_queue(chains, layout))
    assert look(layout).phase is Phase.broken
    assert "left no successor" in look(layout).sentence


@pytest.mark.slurm
def test_after_a_new_launch_links_have_its_code_and_its_settings(chains: SlurmCluster, tmp_path: Path) -> None:
    """The pending links are replaced, and `stop` ends all of them."""
    layout = launch(tmp_path)
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path, 1)
    source = tmp_path / "source" / "launch.py"
    source.write_text(source.read_text().replace('"first"', '"second"'))
    launch(tmp_path)
    former = pending(chains, layout)
    chain_of(tmp_path, SlurmSite(partition="high")).ensure(renew=True)
    assert not set(former) & set(pending(chains, layout))
    squeue = ("squeue", "--noheader", f"--name={link_name(layout)}", "--states=PENDING", "--format=%P")
    until(lambda: set(chains.run(*squeue).split()) == {"high"})  # a link that was just starting may have submitted one more
    until(lambda: " second " in lines(tmp_path, "passes")[-1])
    assert Path(lines(tmp_path, "passes")[-1].split()[2]) == (layout.snapshots / "current").resolve()
    assert chain_of(tmp_path).stop()
    until(lambda: not in_queue(chains, layout))
    assert "stopped by its user" in look(layout).sentence


@pytest.mark.slurm
def test_chains_of_two_results_folders_are_independent(chains: SlurmCluster, tmp_path: Path) -> None:
    """The same experiment in another results folder has another chain; the end of its budget ends only that one."""
    one, other = tmp_path / "one", tmp_path / "other"
    launch(one)
    launch(other, deadline=time.time() + 4)
    chain_of(one).ensure()
    chain_of(other).ensure()
    assert link_name(layout_of(one)) != link_name(layout_of(other))
    until(lambda: lines(other, "ends") and not in_queue(chains, layout_of(other)))
    state = look(layout_of(other))
    assert (state.phase, "controller_days" in state.sentence) == (Phase.ended, True)
    assert "controller_days" in lines(other, "ends")[0]
    assert goes_on(one)


@pytest.mark.slurm
def test_passes_that_never_succeed_end_the_chain(chains: SlurmCluster, tmp_path: Path) -> None:
    """After `MAX_FAILING` links it ends with a message; a shared folder that does not answer is waited out, and counts as no failure."""
    layout = launch(tmp_path, disk=errno.ESTALE)
    chain_of(tmp_path).ensure()
    assert goes_on(tmp_path)
    assert "no answer from the file server" in look(layout).sentence
    assert (read_record(layout) or ControllerRecord()).failing <= 1
    order(tmp_path, fail="no table\nof that name")
    until(lambda: look(layout).phase is Phase.broken and not in_queue(chains, layout))
    assert "RuntimeError: no table of that name" in look(layout).sentence
    assert f"{MAX_FAILING} passes in a row" in lines(tmp_path, "ends")[0]
    assert "Traceback" in log_file(layout).read_text()
    launch(tmp_path, fail="once")
    chain_of(tmp_path).ensure()
    until(lambda: "once" in look(layout).sentence)
    order(tmp_path)
    until(lambda: (record := read_record(layout)) is not None and record.passes > 0 and not record.last_error)
    assert look(layout).phase in (Phase.running, Phase.pending)


@pytest.mark.slurm
def test_a_rejected_link_is_reported_with_slurms_reason(chains: SlurmCluster, tmp_path: Path) -> None:
    """Slurm's reason is returned, and kept in the record for `status`."""
    layout = launch(tmp_path)
    state = chain_of(tmp_path, SlurmSite(controller_partition="nowhere")).ensure()
    assert state.phase is Phase.broken
    assert "invalid partition" in state.problem
    assert state.problem in look(layout).sentence


def test_the_user_is_told_of_jobs_that_never_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `STUCK_SECONDS` in which every pass found some; not if they have started meanwhile. Before: no notice was sent."""
    launch(tmp_path)
    monkeypatch.setattr(Chain, "ensure", lambda chain: ChainState(Phase.pending, "", waiting="8"))
    told: list[float] = []
    now = 1000.0

    def link(stuck: bool) -> None:
        report = SimpleNamespace(settled=False, complete=False, stuck={"key": "no node fits its request"} if stuck else {})
        chain = chain_of(tmp_path)
        assert (
            run_link(lambda: report, chain, deadline=1e9, on_stuck=lambda seen: told.append(now), clock=lambda: now) is LinkEnd.handed_over
        )

    for stuck, later in ((True, STUCK_SECONDS - 1), (False, 10.0), (True, STUCK_SECONDS - 1), (True, 2.0)):
        link(stuck)
        now += later
    assert told == [], "the second time began later"
    link(True)
    assert told == [now]


def test_a_link_that_cannot_read_its_records_makes_its_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESTALE wherever it looks: not known now. It has a successor and makes its pass. Before: the error ended the link without either."""
    launch(tmp_path)
    chain = chain_of(tmp_path)
    monkeypatch.setattr(Chain, "ensure", lambda chain: ChainState(Phase.pending, "", waiting="8"))

    def stale(*arguments: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for name in ("read_record", "write_record", "launched_at"):
        monkeypatch.setattr(f"jobs.slurm.chain_link.{name}", stale)
    made: list[int] = []

    def one_pass() -> SimpleNamespace:
        made.append(1)
        return SimpleNamespace(settled=False, complete=False, stuck={})

    assert run_link(one_pass, chain, deadline=1e12, launched=1.0) is LinkEnd.handed_over
    assert made
    monkeypatch.setattr(Chain, "ensure", stale)
    assert run_link(one_pass, chain, deadline=1e12, launched=1.0) is LinkEnd.alone, "its script submits it again"
    assert len(made) == 2


def test_missing_sbatch_is_reported_as_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside a container without Slurm: no exception but a problem in the state."""
    launch(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    chain = chain_of(tmp_path)
    state = chain.ensure(queue=[])
    assert (state.phase, state.running, state.waiting) == (Phase.broken, "", "")
    assert "sbatch is not in PATH" in state.problem


def test_a_chain_whose_first_link_was_not_submitted_is_not_broken_once_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: where Slurm does not answer, `status` showed the failure of the first call until a link had made its pass."""
    layout = launch(tmp_path)
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    chain = chain_of(tmp_path)
    assert chain.ensure(queue=[]).phase is Phase.broken
    assert chain_state(layout, None).phase is Phase.broken
    program.write_text("#!/bin/sh\necho Submitted batch job 7\n")
    assert chain.ensure(queue=[]).phase is Phase.pending
    assert chain_state(layout, None).phase is Phase.unknown


@pytest.mark.parametrize("name", AWAY)
def test_a_link_ends_alone_while_a_daemon_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """sbatch fails for a reason that has nothing to do with the link: its script submits it again (LinkEnd.alone), and the pass is made."""
    layout = launch(tmp_path)
    for program, said in (("squeue", ""), ("sbatch", f"echo '{AWAY[name]}' >&2; exit 1")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    chain, seen = chain_of(tmp_path), SimpleNamespace(settled=False, complete=False, stuck={})
    chain.own_job = "1"
    assert run_link(lambda: seen, chain, deadline=time.time() + 60) is LinkEnd.alone
    record = read_record(layout) or ControllerRecord()
    assert (record.passes, record.state) == (1, LinkState.handed_over)
    assert AWAY[name].rpartition(": ")[2] in record.problem


def element(layout: Layout, job: str, state: str, reason: str = "None") -> QueuedElement:
    return QueuedElement(job, state, reason, link_name(layout))


def test_chain_state_in_one_sentence(tmp_path: Path) -> None:
    """Every state of a chain; a record of an earlier launch is ignored."""
    layout = launch(tmp_path, launched=100.0)
    other = QueuedElement("3", "RUNNING", "None", "somebody.else")
    assert chain_state(layout, [other]).phase is Phase.none
    assert chain_state(layout, None).phase is Phase.unknown
    assert "Slurm does not answer" in chain_state(layout, None).sentence
    waiting = chain_state(layout, [other, element(layout, "7", "PENDING", "Priority")])
    assert (waiting.phase, waiting.waiting, waiting.sentence) == (
        Phase.pending,
        "7",
        "controller: job 7 is pending (Priority), no pass yet",
    )
    held = chain_state(layout, [element(layout, "7", "PENDING", "PartitionTimeLimit")])
    assert "time limit" in held.problem
    write_record(layout, ControllerRecord(LinkState.running, "6", "n2", 100.0, 150.0, 3, 200.0, problem="Access denied"))
    found = chain_state(layout, [element(layout, "6", "RUNNING")], now=230.0)
    assert found.sentence == "controller: job 6 on n2 makes a pass, no job follows: Access denied, last pass 30 s ago"
    gone = chain_state(layout, [element(layout, "6", "COMPLETING")], now=230.0)
    assert gone.phase is Phase.broken
    assert "Access denied" in gone.sentence
    assert chain_state(layout, None, now=230.0).sentence == "controller: not known, Slurm does not answer now, last pass 30 s ago"
    write_record(layout, ControllerRecord(LinkState.handed_over, "6", "n2", 100.0, 150.0, 3, 200.0, failing=2, last_error="OSError: x"))
    next_one = chain_state(layout, [element(layout, "7", "PENDING", "BeginTime")], now=230.0)
    assert next_one.sentence == "controller: job 7 is pending (BeginTime), last pass 30 s ago; the last 2 passes failed: OSError: x"
    write_record(layout, ControllerRecord(LinkState.broken, "6", launched=100.0, message="3 links in a row"))
    assert chain_state(layout, [other]).sentence.endswith("any more: 3 links in a row")
    launch(tmp_path, launched=300.0)
    assert chain_state(layout, [other]).phase is Phase.none
    record_file(layout).write_text("{torn")
    assert chain_state(layout, [other]).phase is Phase.none
