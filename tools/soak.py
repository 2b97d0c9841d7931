"""Kill ranks at random moments, restart, and compare the end with an undisturbed run, bit for bit.

    python tools/soak.py --kills 50          # what `make soak` runs
    python tools/soak.py --kills 4 --seed 7  # a short one

A small network is trained by two real ranks under Paddle's launcher. One undisturbed run is the reference. Then the run
is started again and again with ``checkpoint.resume=auto`` (the plain shell loop of docs/restarting.md); each start ends
by SIGKILL of a random rank, or of all of them, at a random moment; every third kill waits for a checkpoint being
written. Whenever the run reaches its end, its last checkpoint must hold the reference's bytes, and no start may fall
back behind the newest checkpoint that was complete at the kill. If kills are left the run is begun anew.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors  # noqa: E402
from utils.launch import launch_command, rank_environment  # noqa: E402
from utils.run.checkpoint import list_checkpoints  # noqa: E402

CONFIG = """
run: {{output: {output}, device: cpu, seed: 5, batch_size: 4, accumulation: 1, max_steps: {steps}, hang_timeout: 120}}
data: {{kind: synthetic, num_classes: 37, num_images: 256, num_threads: 1}}
model: {{network: iresnet18, width: 8, input_size: 32, embedding_size: 32, dropout: 0.2}}
head: {{sample_rate: 0.4}}
optim: {{lr: 0.05}}
schedule: {{warmup_steps: 5}}
verify: {{every_steps: 0}}
checkpoint: {{every_steps: 3, keep: 2}}
log: {{every_steps: 5, tensorboard: false}}
"""
START_LIMIT = 120.0  # seconds until a start must have done something


class Training:
    """One start of the run under the launcher, in a session of its own."""

    def __init__(self, folder: Path, output: Path, steps: int, num_ranks: int, number: int):
        config = folder / f"{output.name}.yaml"
        config.write_text(CONFIG.format(output=output, steps=steps))
        self.output, self.log_dir = output, folder / f"log_{output.name}_{number}"
        words = [config, "checkpoint.resume=auto"]
        shutil.rmtree(output / "heartbeat", ignore_errors=True)
        self.process = subprocess.Popen(
            launch_command(num_ranks, ROOT / "train.py", words, self.log_dir),
            cwd=ROOT,
            env=rank_environment("cpu", threads=1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pids: list[int] = []

    def running(self) -> bool:
        """The launcher lives."""
        return self.process.poll() is None

    def find_ranks(self, num_ranks: int) -> bool:
        """Wait until every rank beats (its pid is in its heartbeat); False if the run ended before."""
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline and self.running():
            try:
                beats = [
                    json.loads((self.output / "heartbeat" / f"rank_{rank:04d}.json").read_text())
                    for rank in range(num_ranks)
                ]
                self.pids = [beat["pid"] for beat in beats]
                return True
            except (OSError, ValueError):
                time.sleep(0.02)
        return False

    def wait(self, timeout: float) -> int:
        """Exit status of the launcher."""
        return self.process.wait(timeout)

    def tail(self) -> str:
        """The ends of the ranks' logs."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.log_dir.glob("workerlog.*"))
        )


def kill_once(training: Training, chance: random.Random, number: int, num_ranks: int) -> bool:
    """Kill at a random moment; False if the run was over before."""
    if not training.find_ranks(num_ranks):
        return False
    if number % 3 == 2:  # in the middle of a save
        while training.running() and not list((training.output / "checkpoints").glob("*.partial")):
            time.sleep(0.001)
    else:
        time.sleep(chance.uniform(0.0, 3.0))
    if not training.running():
        return False
    victims = training.pids if chance.random() < 0.3 else [chance.choice(training.pids)]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return True


def content(path: Path) -> dict[str, bytes]:
    """Name -> bytes of a checkpoint's arrays."""
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def newest_step(output: Path) -> int:
    """Update of the newest complete checkpoint, 0 if there is none."""
    found = list_checkpoints(output)
    return int(found[0].name.removeprefix("step_")) if found else 0


def soak(folder: Path, kills: int, seed: int, steps: int = 60, num_ranks: int = 2, tell=print) -> dict:
    """Run it; figures of what happened.

    Raises:
        UserError: bits differ, work was lost, or a start did not end.
    """
    chance, began = random.Random(seed), time.monotonic()
    reference = Training(folder, folder / "reference", steps, num_ranks, 0)
    if reference.wait(600) != 0:
        raise UserError(f"the undisturbed run failed:\n{reference.tail()}")
    expected = content(list_checkpoints(folder / "reference")[0])
    done, starts, finished, in_save, slowest = 0, 0, 0, 0, 0.0
    output = folder / "run_0"
    while done < kills or not finished:
        training, saved = Training(folder, output, steps, num_ranks, starts), newest_step(output)
        starts += 1
        killed = done < kills and kill_once(training, chance, done, num_ranks)
        if killed:
            in_save += bool(list((output / "checkpoints").glob("*.partial")))
            done += 1
        since = time.monotonic()
        try:
            status = training.wait(300)
        except subprocess.TimeoutExpired:
            raise UserError(f"start {starts}: the other ranks did not end in 300 s\n{training.tail()}") from None
        slowest = max(slowest, time.monotonic() - since) if killed else slowest
        if newest_step(output) < saved:
            raise UserError(f"start {starts}: update {saved} was saved, now the newest is {newest_step(output)}")
        if killed:
            spent = time.monotonic() - began
            tell(f"kill {done}/{kills}: newest checkpoint {newest_step(output)} of {steps}, {spent:.0f} s")
        elif status != 0:
            raise UserError(f"start {starts} failed without a kill (status {status})\n{training.tail()}")
        if newest_step(output) == steps and not killed:
            if content(list_checkpoints(output)[0]) != expected:
                raise UserError(f"{output}: the last checkpoint differs from the undisturbed run's")
            finished += 1
            output = folder / f"run_{finished}"
    times = {"slowest_end_s": round(slowest, 1), "seconds": round(time.monotonic() - began)}
    return {"kills": done, "kills_in_save": in_save, "starts": starts, "finished_runs": finished, **times}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = CommandLine(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args(argv)
    check_ranges(arguments, kills=COUNT, seed=COUNT, steps=POSITIVE, ranks=POSITIVE)
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        figures = soak(Path(folder), arguments.kills, arguments.seed, arguments.steps, arguments.ranks)
    print(f"every run that ended holds the bits of the undisturbed one: {json.dumps(figures)}")


if __name__ == "__main__":
    main()
