"""Being asked to stop: what a signal, or another process of the team, asks of a worker."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
WARNING_SIGNAL = signal.SIGUSR1  # what Slurm is told to send before the time limit (slurm_templates/stage.sh.j2)


class StopRequest:
    """Turns true when this process is asked to write a checkpoint and leave."""

    def __init__(self) -> None:
        self.signal: int = 0

    def __call__(self) -> bool:
        return self.signal != 0

    def listen(self) -> None:
        """From now on the stop signals only set this flag."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: self.ask(number))

    def ask(self, number: int) -> None:
        """Ask by the number of a signal. The first says why: at its time limit a job is warned, then terminated."""
        self.signal = self.signal or number
