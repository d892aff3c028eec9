"""A newcomer's first hour, typed into a terminal on a real Slurm, and the document that is made of what the terminal showed.

`python -m tests.end_to_end.first_hour` plays it and writes docs/first-hour.md and docs/status-watch.svg anew.
"""

from __future__ import annotations

import contextlib
import csv
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ser_core.corpora.manifest import load_manifest
from tests.command_line import ROOT
from tests.end_to_end.accounts import Account, open_account, write_interpreter
from tests.end_to_end.terminal import Terminal
from tests.end_to_end.transcript import document, picture
from tests.slurm_cluster.cluster import Cluster
from tests.waiting import wait_until

PROGRAM = ("launch.py", "jobs", "ser_core", "configs", "slurm_templates", ".gitignore", "constraints.txt", "requirements.txt")
SPEAKERS, TAKES = ("1F", "1M", "2F", "2M"), 4  # of the demo corpus: as many recordings of every class
LAUNCH = "python launch.py grid mine --cluster slurm site=mysite recipe.finetune.epochs=5000"


@dataclass(frozen=True)
class Step:
    """One command, with the paragraph that comes before it in the document and texts that its output must have."""

    prose: str
    command: str
    shows: tuple[str, ...] = ()
    code: int = 0
    answer: tuple[str, str] = ("", "")  # a text of the screen, and what is typed after it
    until: str = ""  # the text of the screen at which Ctrl-C is pressed,
    times: int = 1  # once it is there so many times
    empties_queue: bool = False  # the user's jobs end before the next command


@dataclass(frozen=True)
class Played:
    """A step and what the terminal showed."""

    step: Step
    output: str
    screen: str = ""  # with escape sequences for colours, when Ctrl-C was pressed


HOUR = (
    Step(
        "A CSV file names the recordings of the corpus, their labels and speakers. It has no folds, and\n"
        "`prepare` says what to add: a fold for each speaker, or some folds of disjoint speakers.",
        "python launch.py prepare csv --source ../speech/my_corpus.csv --name mine",
        ("--folds leave-one-speaker-out",),
        code=2,
    ),
    Step(
        "",
        "python launch.py prepare csv --source ../speech/my_corpus.csv --name mine --folds 2",
        ("64 utterances", "4 speakers", "folds 1, 2;", "next: `python launch.py init mine --corpus mine` writes"),
    ),
    Step(
        "`init` writes the file of an experiment. `--like demo` takes the small model of the demo, which needs no\n"
        "GPU; without it the experiment has the settings of `emodb-base`, with wav2vec2-base.",
        "python launch.py init mine --corpus mine --like demo",
        ("configs/experiment/mine.yaml", "launch.py doctor mine` checks", "launch.py grid mine --dry-run` shows"),
    ),
    Step(
        "Every setting is in the file, with an explanation. One method and one seed are enough for a first look.",
        "sed -i 's/^methods: .*/methods: [vft]/; s/^seeds: .*/seeds: 1/' configs/experiment/mine.yaml",
    ),
    Step(
        "A site profile says what `sbatch` needs here: on this cluster the partition. `doctor` checks the site,\n"
        "this machine and what the experiment needs, and runs a probe job on a node.",
        "echo 'partition: main' > configs/site/mysite.yaml",
    ),
    Step("", "python launch.py doctor mine --cluster slurm site=mysite", ("0 problems", "see each other's files", "fits the recipe")),
    Step(
        "The dry run changes nothing. The number of epochs is a mistake.",
        f"{LAUNCH} --dry-run",
        ("mine: 2 runs, 2 stages; reused 0", "in total 2 tasks"),
    ),
    Step(
        "The launch submits a job array, and a controller job that looks after it.",
        LAUNCH,
        ("2 to compute (2 finetune)", "finetune vft: 2 tasks, array ", "controller: job "),
    ),
    Step("Without a name, `status` lists all experiments.", "python launch.py status", ("mine", "0/2", "looked at ")),
    Step(
        "With one it shows what runs, what waits, and when it will end; `--watch` shows it again and again, until\n"
        "nothing is left to do or Ctrl-C is pressed. This is where the mistake is seen.",
        "python launch.py status mine --watch",
        ("mine: not complete", "/5000", "controller: job "),
        until="/5000",  # step and epoch of each run
        times=4,
    ),
    Step("One run is cancelled.", "python launch.py cancel mine vft/1/0", ("1 stage cancelled; 1 withdrawn from Slurm",)),
    Step("All jobs are cancelled by hand, the controller among them.", "scancel -u $USER", empties_queue=True),
    Step(
        "`status` submits nothing. It says that nothing will happen by itself, and what to type.",
        "python launch.py status mine",
        ("no task and no controller of mine is in Slurm's queue", "`python launch.py resume mine`"),
    ),
    Step(
        "`resume` launches again with the settings of the last launch; every run continues from its checkpoint.",
        "python launch.py resume mine",
        ("finetune vft: 2 tasks, array ", "controller: job "),
    ),
    Step(
        "A launch with another number of epochs prints what has changed, and asks what becomes of the runs that\n"
        "are no longer needed. It needs no `--cluster`: the experiment stays on Slurm. The controller looks every\n"
        "20 seconds here, not every 5 minutes, so that this page has an end.",
        "python launch.py grid mine recipe.finetune.epochs=40 policy.poll_minutes=0.3",
        ("recipe.finetune.epochs: 5000 -> 40", "withdrawn: ", "finetune vft: 2 tasks, array "),
        answer=("[Y/n]:", "y"),
    ),
    Step("", "python launch.py status mine --watch", ("2 of 2 runs done", "complete: "), empties_queue=True),
    Step(
        "`explain` has the history of one run and the paths of its files.",
        "python launch.py explain mine vft/1/0",
        ("predictions.csv",),
    ),
    Step(
        "The controller has written the tables before it ended. `collect` prints them, and writes them again.",
        "python launch.py collect mine",
        ("V-FT", "tables.tex"),
    ),
    Step(
        "`clean` frees what stages that were given up have left; with `--whole` the experiment goes too, and every\n"
        "stage that no other experiment needs. `--keep-tables` keeps the tables.",
        "python launch.py clean mine --whole --keep-tables",
        ("would free ", "freed "),
        answer=("[y/N]:", "y"),
    ),
    Step("", "ls results/mine/tables", ("table.md", "tables.tex")),
)


def play(cluster: Cluster, demo_data: Path, folder: Path, account: Account, width: int = 100) -> list[Played]:
    """Play the hour in a new folder, on a cluster whose queue is empty. AssertionError where a command does not show what it must."""
    home, scratch = folder / "you", folder / "scratch"
    scratch.mkdir(parents=True)
    environment = make_home(home, cluster, demo_data, account)
    account.own(scratch)
    played = []
    with Terminal(home / "ser-grid", scratch, environment, width, command=tuple(account.command())) as terminal:
        for step in HOUR:
            screen = ""
            if step.until:
                terminal.type(step.command)
                terminal.wait_for(step.until, times=step.times)
                screen = terminal.screen()
                code, output = terminal.interrupt()
            else:
                code, output = terminal.run(step.command, dict([step.answer]) if step.answer[0] else None)
            assert code == step.code, f"{step.command}: exit code {code}\n{output}"
            for text in step.shows:
                assert text in " ".join(output.split()), f"{step.command}: no {text!r} in\n{output}"
            if step.empties_queue:
                assert wait_until(lambda: not cluster.run("squeue", "--noheader")), cluster.run("squeue")
            played.append(Played(step, output, screen))
    return played


def make_home(home: Path, cluster: Cluster, demo_data: Path, account: Account) -> dict[str, str]:
    """Make a clone of this program, as it is now, beside a corpus of recordings with a CSV file. Returns the environment of `account`."""
    clone, speech = home / "ser-grid", home / "speech"
    clone.mkdir(parents=True)
    speech.mkdir()
    for name in PROGRAM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name)
        else:
            shutil.copy2(ROOT / name, clone / name)
    kept: Counter[tuple[str, str]] = Counter()
    with (speech / "my_corpus.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "speaker"])
        for one in load_manifest(demo_data / "demo").utterances:
            kept[one.speaker, one.label] += 1
            if one.speaker in SPEAKERS and kept[one.speaker, one.label] <= TAKES:
                rows.writerow([f"recordings/{Path(one.audio).name}", one.label, one.speaker])
    own = {name: value for name, value in cluster.environment.items() if not name.startswith("SER_GRID_")}
    path = f"{Path(account.python).parent}:{own['PATH']}"
    environment = {**own, **account.variables, "HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "TERM": "xterm-256color"}
    for name in ("COLUMNS", "PYTHONDONTWRITEBYTECODE"):  # each command would compile every module again
        environment.pop(name, None)
    for command in ("init", "add --all", "-c user.name=you -c user.email=you@example.org commit --quiet --message clone"):
        subprocess.run(["git", "-C", str(clone), *command.split()], env=environment, check=True, capture_output=True)
    account.own(home)
    account.take(demo_data / "demo" / "audio", speech / "recordings")  # last: these files keep their owner
    return environment


def neutral_names(home: Path, account: Account) -> Mapping[str, str]:
    """What is replaced in the document: names of this machine and its user."""
    return {str(home): "/home/you", socket.gethostname(): "login", f"CANCELLED by {account.uid}": "CANCELLED by 1000"}


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A temporary folder with a short name, as tmux has a socket in it, that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="ser-grid-hour-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def main() -> None:
    """Play the hour on a cluster of its own, and write the document and its picture."""
    from ser_core.corpora.demo import prepare_demo
    from tests.slurm_cluster.configuration import ClusterSettings
    from tests.slurm_cluster.fixtures import running_cluster

    with new_folder() as folder, running_cluster(ClusterSettings(enforce=True)) as cluster:
        prepare_demo(folder / "demo", folder / "demo-source")
        (folder / "interpreter").mkdir()
        write_interpreter(folder / "interpreter")
        account = open_account(folder / "home", folder / "interpreter")
        played = play(cluster, folder, folder / "hour", account)
        names = neutral_names(folder / "hour" / "you", account)
        (ROOT / "docs" / "first-hour.md").write_text(document(played, names), encoding="utf-8")
        (ROOT / "docs" / "status-watch.svg").write_text(picture(played, names), encoding="utf-8")


if __name__ == "__main__":
    main()
