"""Which branches tell the CPU from an accelerator, and which of their sides the device part of the suite enters.

    python tests/device/branches.py                      # the list
    python tests/device/branches.py --run                # runs tests/device with tracing; names the sides not entered

A branch is an ``if`` (or a conditional expression) in our code whose test asks where memory or the process is: one of
``ASKS`` occurs in it, directly or through a name of the same function or class that was assigned from such a question.
"""

import argparse
import ast
import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASKS = (
    "is_cpu_place", "get_device()", "is_compiled_with_cuda", "on_cpu", "device == ", "device != ", "== \"cpu\"",
    "device.startswith", "has_merged_momentum", "flip_on_host",
)  # fmt: skip
ROOMS = ("train.py", "partial_fc.py", "dataset.py", "losses.py", "backbones", "utils", "eval")


@dataclass(frozen=True)
class Branch:
    """One question; ``then`` and ``other`` are the lines of its two sides (0: there is no such side to see)."""

    path: str
    line: int
    question: str
    then: int
    other: int


def find() -> list[Branch]:
    """All branches of the rooms that a run or an evaluation passes through."""
    found = []
    for room in ROOMS:
        paths = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
        for path in paths:
            text = path.read_text()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.If) and any(ask in ast.unparse(node.test).replace("'", '"') for ask in ASKS):
                    other = node.orelse[0].lineno if node.orelse else _following(text, node)
                    question = ast.unparse(node.test)
                    found.append(Branch(str(path.relative_to(ROOT)), node.lineno, question, node.body[0].lineno, other))
    return sorted(found, key=lambda branch: (branch.path, branch.line))


def _following(text: str, node: ast.If) -> int:
    """The first line of the statement after an ``if`` without ``else`` in the same block, 0 if there is none."""
    for parent in ast.walk(ast.parse(text)):
        for block in (getattr(parent, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                for here, after in itertools.pairwise(block):
                    if isinstance(here, ast.If) and here.lineno == node.lineno:
                        return after.lineno
    return 0


TRACE = """
import atexit, os, sys
files, seen = {files!r}, set()
def tracer(frame, event, argument):
    name = frame.f_code.co_filename
    if name not in files:
        return None
    def lines(frame, event, argument):
        if event == "line":
            seen.add((name, frame.f_lineno))
        return lines
    return lines
def report():
    with open(os.path.join({folder!r}, str(os.getpid())), "a") as file:
        file.writelines(f"{{name}}:{{line}}\\n" for name, line in seen)
import threading
threading.settrace(tracer)
sys.settrace(tracer)
atexit.register(report)
"""


def entered(branches: list[Branch], words: list[str]) -> set[tuple[str, int]]:
    """(path, line) that the device part of the suite ran, in all of its processes."""
    from tests.device.build import environment

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {str(ROOT / branch.path) for branch in branches}
        (folder / "sitecustomize.py").write_text(TRACE.format(files=files, folder=str(folder)))
        told = environment() | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "device and not slow", "tests/device", *words]
        subprocess.run(command, cwd=ROOT, env=told, check=False)
        lines = [line for path in folder.iterdir() if path.suffix != ".py" and path.is_file()
                 for line in path.read_text().splitlines()]  # fmt: skip
    return {
        (str(Path(name).relative_to(ROOT)), int(number)) for name, number in (line.rsplit(":", 1) for line in lines)
    }


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the tests and say which sides were not entered")
    args, words = parser.parse_known_args(argv)
    branches = find()
    seen = entered(branches, words) if args.run else set()
    for branch in branches:
        print(f"{branch.path}:{branch.line}: {branch.question}")
        if args.run:
            for side, line in (("true", branch.then), ("false", branch.other)):
                if line and (branch.path, line) not in seen:
                    print(f"    never {side} (line {line})")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
