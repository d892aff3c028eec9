"""Options of `slurm.extra` that sbatch does not know are refused before anything is submitted. sbatch is real; no slurmctld answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import SlurmSite
from tests.jobs.slurm_cases import arrays_of, experiment_of

pytestmark = pytest.mark.slurm

# sbatch reads a configuration before it reads options; it contacts the controller after them.
CONFIGURATION = """
ClusterName=none
SlurmctldHost=localhost
SlurmctldPort=1
MessageTimeout=2
AuthType=auth/none
CredType=cred/none
NodeName=n1 CPUs=1
PartitionName=p Nodes=n1 Default=YES
"""


@pytest.fixture(autouse=True)
def no_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm.conf").write_text(CONFIGURATION)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"comment": "ours", "reservatoin": "speech"}, "slurm.extra.reservatoin .*unrecognized option"),
        ({"gpu-bind": "quux"}, "slurm.extra.gpu-bind .*Invalid --gpu-bind argument"),
        ({"hint": "quux"}, "slurm.extra.hint .*unrecognized --hint argument"),
        ({"time": "1"}, "slurm.extra.time: set by the program"),
    ],
)
def test_an_option_that_sbatch_does_not_know_is_refused(extra: dict[str, str], expected: str, tmp_path: Path) -> None:
    """One line with the key, the site profile and sbatch's own message; nothing is written."""
    with pytest.raises(UsageError, match=expected) as caught:
        arrays_of(tmp_path, experiment_of(SlurmSite(extra=extra))).check_options()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results" / "trial").exists()


def test_options_that_sbatch_knows_are_left_to_the_submission(tmp_path: Path) -> None:
    """Also where slurmctld does not answer: what it would say of a request is not known."""
    arrays_of(tmp_path, experiment_of(SlurmSite(extra={"comment": "ours", "exclusive": ""}))).check_options()
