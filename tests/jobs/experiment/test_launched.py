from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.experiment.launched import Corpus, launch
from jobs.store.layout import Layout
from tests.jobs.fake_registry import REGISTRY


def test_an_experiment_without_methods_is_refused(tmp_path: Path) -> None:
    """It would have no run, and so be complete at once."""
    experiment = Experiment(name="exp", corpus="fake")
    with pytest.raises(UsageError, match="methods: name at least one of"):
        launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, Layout(tmp_path, "exp"))
