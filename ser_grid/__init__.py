"""The console script `ser-grid`: launch.py of the installed package, with configurations, data and results where the user stands.

In the wheel the program lies in this package (setup.py); in a checkout it lies in the folder above.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the command line; returns the exit code.

    The program's folder is the first of `sys.path`, as for `python launch.py`. Registries of the user are found where they stand too.
    """
    root = HERE if (HERE / "launch.py").is_file() else HERE.parent
    sys.path.insert(0, str(root))
    sys.path.append(str(Path.cwd()))
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (known, str(Path.cwd()))))  # of the processes that compute stages
    import launch

    return launch.main()
