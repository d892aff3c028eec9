"""`python -m tests.simulation.explore`: the state machine of the controller with fresh examples, on all cores, for a given time.

Examples are drawn in rounds, each with a seed of its own. A failure is printed with the command that replays its round.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

from hypothesis import seed as with_seed

from tests.hypothesis_settings import load_settings
from tests.simulation.crashes import TALLY
from tests.simulation.test_state_machine import Laboratory, run_laboratory

ROUND = 200  # examples, about a minute


@dataclass(frozen=True)
class Round:
    """The result of one round."""

    seed: int
    examples: int
    failure: str = ""  # traceback and shortened example


def run_round(seed: int, examples: int, machine: type[Laboratory] = Laboratory) -> Round:
    """Examples with one seed, until one fails."""
    load_settings()
    TALLY.clear()
    seeded = with_seed(seed)(type(machine.__name__, (machine,), {}))
    try:
        run_laboratory(seeded, examples)
    except Exception:
        return Round(seed, TALLY["examples"], traceback.format_exc())
    return Round(seed, TALLY["examples"])


def replay_command(seed: int, examples: int) -> str:
    """The shell command that runs a round again."""
    test = "tests/simulation/test_state_machine.py"
    return f"SER_GRID_EXAMPLES={examples} {sys.executable} -m pytest {test} --hypothesis-seed={seed}"


def explore(seeds: Iterator[int], *, seconds: float, processes: int, examples: int = ROUND) -> list[Round]:
    """Run rounds until the time is up, at least one per process, or until one fails; running rounds are finished."""
    deadline = time.monotonic() + seconds
    done: list[Round] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _quiet) as pool:
        running: set[Future[Round]] = {pool.submit(run_round, next(seeds), examples) for _ in range(processes)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            done.extend(future.result() for future in ended)
            if time.monotonic() < deadline and not any(each.failure for each in done):
                running |= {pool.submit(run_round, next(seeds), examples) for _ in ended}
    return done


def _quiet() -> None:
    """Silence warnings: the examples consist of the faults that they report."""
    logging.disable(logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if an example failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.explore", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, help="from which the seeds of the rounds follow (default: a fresh one)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--round", type=int, default=ROUND, help="examples of one round")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().getrandbits(32)
    sys.stdout.write(f"explore: seed {seed}, {chosen.minutes:g} minutes on {chosen.processes} processes\n")
    sys.stdout.flush()
    draw = random.Random(seed)
    seeds = iter(lambda: draw.getrandbits(32), None)
    began = time.monotonic()
    done = explore(seeds, seconds=60 * chosen.minutes, processes=chosen.processes, examples=chosen.round)
    failed = [each for each in done if each.failure]
    for each in failed:
        sys.stdout.write(f"\n{each.failure}\nreplay: {replay_command(each.seed, chosen.round)}\n")
    examples, minutes = sum(each.examples for each in done), (time.monotonic() - began) / 60
    sys.stdout.write(f"explore: seed {seed}, {examples} examples in {len(done)} rounds, {minutes:.1f} minutes, {len(failed)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
