"""What the benchmarks share: child processes that take turns, cases, the result file."""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from utils.errors import COUNT, POSITIVE, CommandLine, check_ranges
from utils.files import write_json
from utils.launch import rank_environment
from utils.system import processor

ROOT = Path(__file__).resolve().parent.parent
# Of every option that is a number, whichever benchmark has it.
RANGES = {
    **dict.fromkeys(("batch", "batch_size", "classes", "each", "every", "identities", "images", "ranks"), POSITIVE),
    **dict.fromkeys(("runs", "sets", "size", "steps", "threads", "width"), POSITIVE),
    "rounds": COUNT,
    "index_lines": COUNT,
    "rates": (0, 1),
    "lr": COUNT,
}
PACKAGES = ("paddlepaddle", "numpy", "torch")


def build_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that has ``--json``; ``text``: the script's docstring."""
    parser = CommandLine(text)
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


def read_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line, every number of them in its range (``RANGES``)."""
    options = parser.parse_args(argv)
    check_ranges(options, **RANGES)
    return options


def machine(note: str) -> str:
    """One line on what this ran on."""
    return f"{processor()[0]}, {os.cpu_count()} cores, {platform.system()}, {note}"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions that the figures depend on."""
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def write_report(path: Path | None, cases: list[dict], note: str, packages: Sequence[str] = PACKAGES) -> None:
    """The result file; nothing where no path is given. ``note``: threads or ranks of each side."""
    if path is not None:
        write_json(path, {"machine": machine(note), "versions": versions(packages), "cases": cases})


def case(
    name: str,
    metric: str,
    ours: Sequence[float],
    peer: Sequence[float] | None,
    peer_name: str,
    *,
    smaller: bool = False,
    paired: bool = False,
    middle: Callable[[Sequence[float]], float] = statistics.median,
    **more: object,
) -> dict:
    """One case of the result file, printed as well.

    Args:
        name, metric, peer_name: what was measured, beside whom.
        ours, peer: a value a round; ``peer`` None: nobody beside us.
        smaller: smaller values are better; ``ratio`` is above 1 where ours are.
        paired: ``ratio`` and ``spread`` are of the ratios round by round; else the ratio is that of the middles and the
            spread that of our values.
        middle: of the rounds.
        more: further fields.
    """
    sides = [None if side is None else middle(side) for side in (ours, peer)]
    rounds = (ours, peer) if paired else ([sides[0]], [sides[1]])
    ratios = [] if peer is None else [b / a if smaller else a / b for a, b in zip(*rounds, strict=True)]
    spread = ratios if paired else ours
    found = {
        "name": name,
        "metric": metric,
        "ours": sides[0],
        "peer": sides[1],
        "peer_name": peer_name,
        "ratio": statistics.median(ratios) if ratios else None,
        "runs": len(ours),
        "spread": [min(spread), max(spread)] if spread else None,
        **more,
    }
    against = f"   {peer_name} {sides[1]:.4g}   ratio {found['ratio']:.3g}" if ratios else ""
    print(f"{name:<28} {metric:<18} ours {sides[0]:.4g}{against}", flush=True)
    return found


class Side:
    """One side of a comparison: a process, or one a rank. Each answers a line of input with a line of JSON."""

    def __init__(self, name: str, command: Sequence[object], environments: Sequence[Mapping[str, str]]):
        self.name = name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, *map(str, command)]
        self.processes = [subprocess.Popen(command, env=environment, **pipes) for environment in environments]
        self.told = self._answer()

    def turn(self, line: object = "") -> dict:
        """One turn; the answer of the slowest rank."""
        for process in self.processes:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        return max(map(self._read, self.processes), key=lambda answer: answer.get("seconds", 0.0))

    def _read(self, process: subprocess.Popen) -> dict:
        for line in process.stdout:
            if line.startswith("{"):  # frameworks print lines of their own
                return json.loads(line)
        raise SystemExit(f"error: the {self.name} side ended with status {process.wait()}")

    def end(self) -> None:
        """End of input ends a child."""
        for process in self.processes:
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def started(
    commands: Mapping[str, Sequence[object]], threads: int, num_ranks: int | None = None
) -> Iterator[dict[str, Side]]:
    """The sides by name, started one after the other, since starting takes all cores; they end with the block.

    ``num_ranks``: None for sides that are no ranks.
    """
    sides: dict[str, Side] = {}
    try:
        for name, command in commands.items():
            environments = [child_environment(threads)] if num_ranks is None else rank_environments(num_ranks, threads)
            sides[name] = Side(name, command, environments)
        yield sides
    finally:
        for side in sides.values():
            side.end()


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a child that is no rank."""
    return rank_environment("cpu", threads) | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def rank_environments(num_ranks: int, threads: int = 1) -> list[dict[str, str]]:
    """The environment of each rank as the launchers of both frameworks make it."""
    sockets = [socket.socket() for _ in range(num_ranks + 1)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    *ports, master = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    shared = child_environment(threads) | {
        "PADDLE_TRAINERS_NUM": str(num_ranks),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_MASTER": f"127.0.0.1:{master}",
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master),
    }
    return [
        shared | {"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": endpoint, "RANK": str(rank)}
        for rank, endpoint in enumerate(endpoints)
    ]


def serve(step: Callable[[str], object], after: Callable[[object], dict | None] = lambda _: {}, **told: object) -> None:
    """A child's life: answer ``told``, then each line of input with the seconds of ``step(line)``.

    ``after``: further fields of the answer, from what the step returned; its time does not count.
    """
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        result = step(line)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, **(after(result) or {})}), flush=True)
