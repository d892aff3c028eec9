"""How property tests draw their examples.

The suite draws the same ones in every run: `--hypothesis-seed` is set in `pyproject.toml`, and no database of former failures is read.
No example fails for the time that it takes: on a busy machine any may take longer than Hypothesis' 200 ms.
Fresh ones are drawn by `make explore`, or by another `--hypothesis-seed` on the command line.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine

SHRINK_SECONDS = 60  # after which a failing example is printed as short as it is by then; Hypothesis itself takes up to five minutes


def load_settings() -> None:
    """Make these the defaults of this process; to be called before a test module is imported."""
    slow = [HealthCheck.too_slow]  # as `deadline`: measured in seconds, which say how busy the machine is
    # derandomize: the seed decides, with CI=true as well
    settings.register_profile("suite", database=None, print_blob=True, derandomize=False, deadline=None, suppress_health_check=slow)
    settings.load_profile("suite")
    engine.MAX_SHRINKING_SECONDS = SHRINK_SECONDS  # there is no public setting for it
