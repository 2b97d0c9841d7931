"""Launch real ranks (gloo on CPU) from a test and collect what each printed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from utils.launch import launch_command, rank_environment

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(
    script: str | Path,
    num_ranks: int,
    args: tuple = (),
    timeout: float = 120,
    env: dict[str, str] | None = None,
    check: bool = True,
) -> list[str]:
    """Run a script (a path, or source text with a newline in it) under ``paddle.distributed.launch``.

    Args:
        script: path of a script, or Python source.
        num_ranks: ranks to start; 1 runs the plain interpreter without the launcher.
        args: command line arguments of the script.
        timeout: seconds after which the run counts as hung and the test fails.
        env: additional environment variables.
        check: fail the test if the exit status is not 0.

    Returns:
        The output of each rank, in rank order (stdout and stderr together); with ``check=False`` one more
        entry at the end, the exit status as a string.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(script) if "\n" not in str(script) else Path(folder) / "ranks_main.py"
        if path.parent == Path(folder):
            path.write_text(str(script))
        search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**rank_environment("cpu", threads=1), "PYTHONPATH": search, **(env or {})}
        log_dir = Path(folder) / "log"
        command = [sys.executable, str(path), *map(str, args)]
        if num_ranks > 1:
            command = launch_command(num_ranks, path, args, log_dir)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=timeout, text=True, capture_output=True, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{num_ranks} ranks of {path.name} hung for {timeout} s\n{_logs(log_dir)}") from error
        outputs = [done.stdout + done.stderr]
        if num_ranks > 1:
            outputs = [log.read_text() for log in sorted(log_dir.glob("workerlog.*"), key=lambda p: int(p.suffix[1:]))]
        if check and done.returncode != 0:
            raise AssertionError(
                f"exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}{_logs(log_dir)}"
            )
        return outputs if check else [*outputs, str(done.returncode)]


def _logs(log_dir: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(log_dir.glob("workerlog.*")))
