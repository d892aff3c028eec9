"""A newcomer's first hour, from a CSV file without folds to a removed experiment, as docs/first-hour.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.accounts import Account
from tests.end_to_end.first_hour import HOUR, neutral_names, new_folder, play
from tests.end_to_end.transcript import document
from tests.slurm_cluster.cluster import Cluster


@pytest.mark.slow
@pytest.mark.slurm
def test_the_first_hour_in_a_terminal(slurm_cluster: Cluster, demo_data: Path, account: Account) -> None:
    """Every command ends with its exit code and shows what the document promises; nothing of this machine is in the document."""
    with new_folder() as folder:
        played = play(slurm_cluster, demo_data, folder, account)
        names = neutral_names(folder / "you", account)
        page = document(played, names)
        assert len(played) == len(HOUR)
        assert str(folder) not in page
        assert not (folder / "you" / "ser-grid" / "results" / "mine" / "experiment.json").exists()
