"""What the benchmarks share: the life of a script, child processes that take turns, cases, the result file."""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from utils.errors import COUNT, POSITIVE, CommandLine, check_ranges, one_line_errors
from utils.files import write_json
from utils.launch import rank_environment
from utils.system import processor

ROOT = Path(__file__).resolve().parent.parent
# Of every option that is a number, whichever benchmark has it.
RANGES = {
    **dict.fromkeys(("batch", "batch_size", "classes", "each", "every", "identities", "images", "ranks"), POSITIVE),
    **dict.fromkeys(("runs", "sets", "size", "steps", "threads", "width"), POSITIVE),
    **dict.fromkeys(("rounds", "index_lines", "lr"), COUNT),
    "rates": (0, 1),
}
PACKAGES = ("paddlepaddle", "numpy", "torch")


def build_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that has ``--json``; ``text``: the script's docstring."""
    parser = CommandLine(text)
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


def read_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, every number of them in its range (``RANGES``)."""
    options = parser.parse_args(argv)
    check_ranges(options, **RANGES)
    return options


@one_line_errors
def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], list[dict]],
    note: str,
    packages: Sequence[str] = PACKAGES,
    child: Callable[..., None] | None = None,
) -> list[dict]:
    """The life of a script: it measures, or is a child of itself. The cases are returned and written to ``--json``.

    Args:
        note: threads or ranks of each side; options in braces are filled in.
        packages: whose versions the figures depend on.
        child: called with the words behind ``--child``.
    """
    if child is not None:
        parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = read_options(parser, argv)
    if child is not None and args.child:
        child(*args.child)
        return []
    cases = measure(args)
    write_report(args.json, cases, note.format_map(vars(args)), packages)
    return cases


def write_report(path: Path | None, cases: list[dict], note: str, packages: Sequence[str] = PACKAGES) -> None:
    """The result file; nothing where no path is given."""
    if path is not None:
        machine = f"{processor()[0]}, {os.cpu_count()} cores, {platform.system()}, {note}"
        versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
        write_json(path, {"machine": machine, "versions": versions, "cases": cases})


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
    """One side of a comparison: a process, or one a rank. Each answers a line of input with a line of JSON.

    ``told`` is its first answer, which it gives by itself.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[object],
        environments: Sequence[Mapping[str, str] | None] = (None,),
        python: str | Path = sys.executable,
    ):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the processes
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        command = [str(python), *map(str, words)]
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
        status = process.wait()
        self.errors.seek(0)
        raise SystemExit(f"{self.errors.read()[-3000:]}\nerror: the {self.name} side ended with status {status}")

    def end(self) -> None:
        """End of input ends a child."""
        for process in self.processes:
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def started(
    commands: Mapping[str, Sequence[object]], threads: int | None, num_ranks: int | None = None, **more: str
) -> Iterator[dict[str, Side]]:
    """The sides by name, started one after the other, since starting takes all cores; they end with the block.

    Args:
        commands: script and arguments of each.
        threads: of each process; None: it may take all.
        num_ranks: None for sides that are no ranks.
        more: further variables of their environment.
    """
    sides: dict[str, Side] = {}
    environment = child_environment(threads) | more
    try:
        for name, words in commands.items():
            sides[name] = Side(
                name, words, [environment] if num_ranks is None else rank_environments(num_ranks, environment)
            )
        yield sides
    finally:
        for side in sides.values():
            side.end()


def take_turns(sides: Mapping[str, Side], rounds: int, warm_up: int) -> dict[str, list[dict]]:
    """The answers of each side, a turn of each a round, so that a slow minute of the machine hits all of them.

    ``warm_up``: rounds before those that count.
    """
    turns = [{name: side.turn() for name, side in sides.items()} for _ in range(warm_up + rounds)][warm_up:]
    return {name: [turn[name] for turn in turns] for name in sides}


def measured(commands: Mapping[str, Sequence[object]], rounds: int, warm_up: int, **options) -> dict[str, list[dict]]:
    """``take_turns`` of the sides that are ``started`` with these options."""
    with started(commands, **options) as sides:
        return take_turns(sides, rounds, warm_up)


def told_by(name: str, words: Sequence[object], **options) -> dict:
    """What a script tells by itself; ``options``: of ``started``."""
    with started({name: words}, **options) as sides:
        return sides[name].told


def child_environment(threads: int | None) -> dict[str, str]:
    """The environment of a child that is no rank."""
    return rank_environment("cpu", threads) | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def rank_environments(num_ranks: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each rank as the launchers of both frameworks make it."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ranks + 1)]
    *ports, master = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    shared = {
        "PADDLE_TRAINERS_NUM": str(num_ranks),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_MASTER": f"127.0.0.1:{master}",
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master),
    }
    return [
        {
            **environment,
            **shared,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_CURRENT_ENDPOINT": endpoint,
            "RANK": str(rank),
        }
        for rank, endpoint in enumerate(endpoints)
    ]


def timed(function: Callable, *arguments) -> tuple:
    """(what the function returns, its seconds)."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def serve(step: Callable[[str], object], after: Callable[[object], dict | None] = lambda _: {}, **told: object) -> None:
    """A child's life: answer ``told``, then each line of input with the seconds of ``step(line)``.

    ``after``: further fields of the answer, from what the step returned; its time does not count.
    """
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        result, seconds = timed(step, line)
        print(json.dumps({"seconds": seconds, **(after(result) or {})}), flush=True)


def orl_photos() -> list[tuple[int, int, np.ndarray]]:
    """(person, number, picture) of ORL, uint8 RGB, enlarged to the size of photos."""
    import cv2

    from tools.demo.data import original_pictures

    def enlarged(grey: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(cv2.resize(grey, None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC), cv2.COLOR_GRAY2RGB)

    return [(person, number, enlarged(grey)) for person, number, grey in original_pictures(ROOT / "data" / "orl")]
