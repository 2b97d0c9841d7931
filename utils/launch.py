"""Commands that start ranks on this machine, and what their environment holds. The standard library alone."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path


def launch_command(
    num_ranks: int, script: str | Path, words: Iterable, log_dir: str | Path, options: Iterable[str] = ()
) -> list[str]:
    """This interpreter on ``script`` and its ``words``, as so many ranks of Paddle's launcher.

    Rank r prints to ``workerlog.r`` in ``log_dir``. ``options``: further ones of the launcher.
    """
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(num_ranks), "--log_dir", str(log_dir)]
    return [sys.executable, *launch, *options, str(script), *map(str, words)]


def rank_environment(device: str, threads: int | None = None) -> dict[str, str]:
    """A copy of this process's environment for ranks of their own: without what a launcher left in it.

    Args:
        device: ``cpu`` has the ranks talk over gloo; any other leaves Paddle the choice.
        threads: ``OMP_NUM_THREADS``; None leaves it as it is.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    if device == "cpu":
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
