"""Batch scripts: their text, and that no value of a configuration can get out of its quotes."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from jobs.control.facts import Request
from jobs.errors import UsageError
from jobs.experiment.config import Resources, SlurmSite
from jobs.slurm.script import ArrayJob, array_expression, excluded_nodes, memory_mb, render_script, signal_seconds

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = ROOT / "slurm_templates"
GOLDEN = Path(__file__).parents[1] / "golden"

JOB = ArrayJob(
    name="iemocap.finetune.tapt.0123456789ab.1",
    size=25,
    resources=Resources(cpus=8, gpus=1, memory_gb=23.5, minutes=90, throttle=10),
    stages_per_element=2,
    command=("/opt/venv/bin/python", "launch.py", "worker", "/project/results/iemocap/submissions/tasks/one.json"),
    description="/project/results/iemocap/submissions/tasks/one.json",
    folder="/project/results/iemocap/snapshots/0123456789abcdef",
    output="/project/results/iemocap/logs",
    binds=("/project/results", "/project/data/iemocap"),
    dependency="afterok:12_0:12_1,singleton",
)
UNIVERSITY = SlurmSite(
    partition="gpu",
    account="speech-lab",
    qos="normal",
    constraint="a100|h100",
    gpu_type="a100",
    exclude="node[07,13]",
    modules=["gcc/13.2", "cuda/12.4"],
    environment={"HF_HUB_OFFLINE": "1", "NOTE": "it's fine"},
    prologue=["source /etc/profile.d/proxy.sh", "ulimit -n 4096"],
    extra={"reservation": "speech", "exclusive": ""},
    signal_seconds=300,
)
CONTAINER = SlurmSite(container="/images/ser grid.sif", container_arguments=["--bind", "/scratch"], memory_requests=False, signal_seconds=0)
SMALL = replace(JOB, resources=Resources(cpus=2, gpus=0, memory_gb=4, minutes=10), size=1, stages_per_element=1, dependency="")
CASES = {
    "plain": (SMALL, SlurmSite()),
    "university": (JOB, UNIVERSITY),
    "retry": (replace(JOB, request=Request(1, 1.5, ("node03", "node21")), avoided=("node21", "node30")), UNIVERSITY),
    "predicted": (replace(JOB, request=Request(minutes=13, memory_gb=2.25)), UNIVERSITY),
    "container": (replace(JOB, resources=replace(JOB.resources, nodes=2, gpus=4)), CONTAINER),
}


@pytest.mark.parametrize("name", CASES)
def test_script_equals_the_golden_file(name: str) -> None:
    """A change of a template shows in the golden files. SER_GRID_WRITE_GOLDEN=1 writes them again."""
    text = render_script(*CASES[name], TEMPLATES)
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("SER_GRID_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_bash_parses_the_script(name: str) -> None:
    """And `exec srun` is its last command."""
    text = render_script(*CASES[name], TEMPLATES)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert text.rstrip().replace("\\\n", "").splitlines()[-1].startswith("exec srun ")


COMMANDS = [
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    "& touch pwned",
    "> pwned",
    "${IFS}",
    '"',
    "#x",
    "-o",
    "a b",
    "%j",
    "é",
    "",
]
PRINTABLE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\\"), max_size=20)
SOUND = st.one_of(PRINTABLE, st.sampled_from(COMMANDS), st.lists(st.sampled_from(COMMANDS), max_size=3).map("'".join))
HOSTILE = st.integers(0, 99).flatmap(lambda draw: SOUND if draw else st.sampled_from(["a\nb", "\\", "\x00", "\x1b[2J", "\u2028"]))
SITES = st.builds(
    SlurmSite,
    partition=st.none() | HOSTILE,
    account=st.none() | HOSTILE,
    gpu_type=st.none() | HOSTILE,
    modules=st.lists(HOSTILE, max_size=2),
    container=st.none() | HOSTILE,
    container_arguments=st.lists(HOSTILE, max_size=2),
    environment=st.dictionaries(st.sampled_from(["A", "B_2"]), HOSTILE, max_size=2),
    extra=st.dictionaries(st.sampled_from(["comment", "reservation"]), HOSTILE, max_size=2),
)
RECORDER = '#!/bin/bash\n{ printf "%s\\0" "${0##*/}" "$@" "A=$A" "B_2=$B_2"; } >>"$RECORD"\n'


@pytest.mark.slow
@given(site=SITES, path=HOSTILE)
@example(site=SlurmSite(partition="' --wrap=x", environment={"A": "'$(touch pwned)'"}), path="$(touch pwned) 'x' \"y\"")
@example(site=SlurmSite(modules=["x; touch pwned"], container="$(touch pwned)", container_arguments=["a b", ""]), path="x")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_value_is_quoted(site: SlurmSite, path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Either the value is refused with a message, or sbatch, module and srun receive it unchanged and nothing else is executed."""
    folder = tmp_path_factory.mktemp("run")
    code = folder / "code"
    code.mkdir()
    command = ("python", "launch.py", path)
    job = replace(JOB, command=command, folder=str(code), description=str(code), binds=(path,))
    try:
        text = render_script(job, site, TEMPLATES)
    except UsageError:
        event("refused")
        return
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    options = dict(shlex.split(line.removeprefix("#SBATCH "))[0].partition("=")[::2] for line in header)
    assert all(len(shlex.split(line.removeprefix("#SBATCH "))) == 1 for line in header)
    for key in ("partition", "account"):
        assert options.get(f"--{key}", "") == (getattr(site, key) or "")
    assert options["--gpus-per-node"] == (f"{site.gpu_type}:1" if site.gpu_type else "1")
    assert {key: options[f"--{key}"] for key in site.extra} == site.extra
    for name in ("module", "srun"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    record = folder / "record"
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record)}
    subprocess.run(["bash", "--noprofile"], input=text, text=True, env=environment, cwd=folder, check=True)
    assert sorted(file.name for file in folder.iterdir()) == ["code", "module", "record", "srun"]
    assert not list(code.iterdir())
    calls = record.read_bytes().decode().split("\0")
    variables = [f"A={site.environment.get('A', '')}", f"B_2={site.environment.get('B_2', '')}"]
    expected = [*command, *variables]
    if site.container:
        bound = ["--bind", path, "--pwd", str(code)]
        expected = ["apptainer", "exec", "--nv", *bound, *site.container_arguments, site.container, *expected]
    assert calls[-1 - len(expected) : -1] == expected
    loaded = [calls[place + 2] for place, word in enumerate(calls) if word == "module" and calls[place + 1] == "load"]
    assert loaded == site.modules


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (SlurmSite(partition="a\nb"), "slurm.partition"),
        (SlurmSite(account="a\\b"), "backslash"),
        (SlurmSite(environment={"A B": "x"}), "name of a variable"),
        (SlurmSite(environment={"A": "x\ny"}), "slurm.environment.A"),
        (SlurmSite(extra={"time": "1"}), "slurm.extra.time"),
        (SlurmSite(extra={"wrap x": "1"}), "long name"),
        (SlurmSite(prologue=["true\nfalse"]), "slurm.prologue"),
        (SlurmSite(template="../x"), "slurm.template"),
        (SlurmSite(template="none.j2"), "no template"),
    ],
)
def test_values_that_cannot_be_quoted_are_refused(site: SlurmSite, words: str) -> None:
    """One line that names the key."""
    with pytest.raises(UsageError, match=words) as caught:
        render_script(JOB, site, TEMPLATES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#SBATCH --account={{ site.account }}\n", "printed without"),
        ("{{ command | join(' ') }}\n", "join"),
        ("{{ nothing | shell }}\n", "nothing"),
        ("\n\n{% if %}\n", "line 3"),
        ("{{ site.no_such_key | shell }}\n", "no_such_key"),
    ],
)
def test_a_template_with_unquoted_or_undefined_values_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """This holds for a template of the site too."""
    (tmp_path / "stage.sh.j2").write_text(text)
    with pytest.raises(UsageError, match=words):
        render_script(JOB, UNIVERSITY, tmp_path)


def test_numbers() -> None:
    """Throttle, time of several stages in one element, a warning that leaves time to work."""
    assert array_expression(25, 5) == "0-24%5"
    assert array_expression(3, 5) == "0-2"
    assert array_expression(1, 0) == "0-0"
    assert JOB.minutes == 180
    packed = {(5, 2): 270, (5, 5): 90, (5, 9): 90, (4, 2): 180, (5, 0): 450}  # (stages, at once; 0: perhaps one) -> minutes
    assert {
        (stages, at_once): replace(JOB, stages_per_element=stages, resources=replace(JOB.resources, at_once=at_once)).minutes
        for stages, at_once in packed
    } == packed
    assert signal_seconds(180, UNIVERSITY) == 300
    assert signal_seconds(4, UNIVERSITY) == 60
    text = render_script(JOB, UNIVERSITY, TEMPLATES)
    assert "--mem=24064M" in text
    assert "--time=180" in text


def test_requests_adapted_after_a_failure() -> None:
    """More memory, rounded up to whole MiB, and further excluded nodes beside those of the site."""
    job = replace(JOB, request=Request(memory_factor=1.1, exclude=("n1", "n3")), avoided=("n3", "n4"))
    assert memory_mb(job) == 26471
    assert memory_mb(replace(job, resources=replace(job.resources, memory_gb=10))) == 11264
    assert excluded_nodes(job, UNIVERSITY) == "node[07,13],n1,n3,n4"
    assert excluded_nodes(job, SlurmSite()) == "n1,n3,n4"
    assert excluded_nodes(JOB, SlurmSite()) == ""
    assert "--mem" not in render_script(job, replace(UNIVERSITY, memory_requests=False), TEMPLATES)


def test_a_percent_sign_in_the_path_of_logs_is_no_pattern() -> None:
    """sbatch would replace `%j` in the name of a log."""
    assert "--output=/a%%j/%x_%A_%a.out" in render_script(replace(JOB, output="/a%j"), SlurmSite(), TEMPLATES)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "site").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_site_profile_renders(file: Path) -> None:
    """The profiles that come with the project are valid."""
    merged = OmegaConf.merge(OmegaConf.structured(SlurmSite), OmegaConf.load(file))
    site = OmegaConf.to_object(merged)
    assert isinstance(site, SlurmSite)
    render_script(JOB, site, TEMPLATES)


def test_the_default_profile_explains_every_key_with_its_default() -> None:
    """Uncommented, `configs/site/default.yaml` is the schema."""
    lines = (ROOT / "configs" / "site" / "default.yaml").read_text().splitlines()
    keys = [line.removeprefix("# ") for line in lines[lines.index("{}") + 1 :] if ": " in line]
    explained = OmegaConf.create("\n".join(keys))
    assert OmegaConf.to_container(explained) == OmegaConf.to_container(OmegaConf.structured(SlurmSite))
