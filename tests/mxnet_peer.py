"""Ask the real mxnet 1.9.1, which lives in an environment of its own (``.venv-mxnet``, built by ``make test``)."""

import atexit
import functools
import os
import pickle
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-mxnet" / "bin" / "python"
REASON = f"REAL MXNET NOT COMPARED: {PYTHON} is missing; run 'make .venv-mxnet' (needs Python 3.11 and a network)"

if not PYTHON.exists():
    warnings.warn(REASON, stacklevel=1)
needs_mxnet = pytest.mark.skipif(not PYTHON.exists(), reason=REASON)


class Oracle:
    """A running oracle process; one request at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._process = subprocess.Popen(
            [str(PYTHON), str(ROOT / "tests" / "mxnet_oracle.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def start(self, task: str, *arguments: object) -> Path:
        """Send a request; ``finish`` waits for its answer."""
        self._count += 1
        request = Path(self._folder.name) / f"{self._count}.request"
        request.write_bytes(pickle.dumps((task, arguments), protocol=4))
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return request

    def finish(self, request: Path) -> object:
        for line in self._process.stdout:  # mxnet prints lines of its own
            if line.startswith(f"answered {request}"):
                done, answer = pickle.loads(request.with_suffix(".answer").read_bytes())
                assert done, answer
                return answer
        raise AssertionError(f"the mxnet process ended with status {self._process.wait()}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


@functools.cache
def shared_oracle() -> Oracle:
    """One process for all small questions of a test run: importing mxnet takes seconds."""
    return Oracle()


def ask_mxnet(task: str, *arguments: object) -> object:
    """Run a task of ``tests/mxnet_oracle.py`` and return its answer."""
    oracle = shared_oracle()
    return oracle.finish(oracle.start(task, *arguments))
