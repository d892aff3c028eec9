"""submitit's Slurm executor with our own script: submitit checks the parameters, calls sbatch and parses the job id.

Nothing is pickled: the script starts our worker, which reads a description file. Imported only for a submission.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from jobs.errors import SubmissionFailedError, UsageError
from jobs.store.disk_space import naming
from jobs.text import one_line


class TemplateExecutor(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """Submits one rendered script.

    `folder`: where scripts are kept (`JOB_submission.sh`); `command`: sbatch behind the commands that limit its time and environment.
    """

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        try:
            super().__init__(folder=folder)
        except RuntimeError as error:
            raise UsageError(f"{error} (srun is not in PATH; --cluster local needs no Slurm)") from error
        self._command = tuple(command)
        self._text = ""
        self._uid = ""

    def submit_script(self, text: str, parameters: Mapping[str, Any]) -> str:
        """Job id of the new job. UsageError if submitit rejects a parameter, SubmissionFailedError if sbatch returns no job id."""
        try:
            self.update_parameters(**parameters)
        except (ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"submitit refuses the request: {one_line(error)}") from error
        self._text = text
        self._first_folder().mkdir(parents=True, exist_ok=True)
        printed = io.StringIO()
        try:
            with naming(self._first_folder()), contextlib.redirect_stderr(printed):  # submitit prints the message that it then raises
                return str(self._submit_command("").job_id)
        except (utils.FailedJobError, utils.FailedSubmissionError) as error:
            cause = error.__cause__
            killed = isinstance(cause, subprocess.CalledProcessError) and cause.returncode in (124, 137)
            self._temporary().unlink(missing_ok=True)
            raise SubmissionFailedError("sbatch timed out" if killed else str(error) or printed.getvalue()) from error

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        self._uid = uid
        self._temporary().chmod(0o600)  # created empty by submitit; the text may hold secrets of the site's environment
        return self._text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*self._command, str(submission_file_path)]

    def _write_job_id(self, job_id: str, uid: str) -> None:
        self._temporary().unlink(missing_ok=True)  # submitit has linked it to JOB_submission.sh

    def _first_folder(self) -> Path:
        return Path(utils.JobPaths.get_first_id_independent_folder(self.folder))

    def _temporary(self) -> Path:
        return self._first_folder() / f".submission_file_{self._uid}.sh"
