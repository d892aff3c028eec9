from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, Policy, SlurmSite
from jobs.experiment.launched import Corpus, launch, store
from jobs.store.layout import Layout
from tests.jobs.fake_registry import REGISTRY


def test_an_experiment_without_methods_is_refused(tmp_path: Path) -> None:
    """It would have no run, and so be complete at once."""
    experiment = Experiment(name="exp", corpus="fake")
    with pytest.raises(UsageError, match="methods: name at least one of"):
        launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, Layout(tmp_path, "exp"))


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, 0o644),
        ({"policy": Policy(webhook="https://example.org/s3cret")}, 0o600),
        ({"slurm": SlurmSite(environment={"TOKEN": "s3cret"})}, 0o600),
    ],
)
def test_settings_that_may_hold_secrets_are_readable_by_their_user_only(changes: dict[str, Any], mode: int, tmp_path: Path) -> None:
    """A launch again with or without them changes the mode."""
    layout = Layout(tmp_path, "exp")
    for before in ({}, {"policy": Policy(webhook="https://example.org/other")}):
        for given in (before, changes):
            experiment = Experiment(name="exp", corpus="fake", methods=["vft"], seeds=1, recipe={}, **given)
            store(launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, layout))
        assert layout.experiment_file.stat().st_mode & 0o777 == mode
