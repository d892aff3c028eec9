"""Builds the package: `ser_grid` with the whole program in it, laid out as in a checkout, so that nothing else is at the top level."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROGRAM = ("launch.py", "jobs", "ser_core", "configs", "slurm_templates", "examples")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


class BuildProgram(build_py):
    """Copies the program into the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the program is found beside the package
            return
        target = Path(self.build_lib) / "ser_grid"
        for name in PROGRAM:
            if Path(name).is_dir():
                shutil.rmtree(target / name, ignore_errors=True)
                shutil.copytree(name, target / name, ignore=LEFT_OUT)
            else:
                shutil.copy(name, target / name)


setup(cmdclass={"build_py": BuildProgram})
