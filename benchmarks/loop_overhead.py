"""What the training loop costs beside a bare loop of the same step: logging, angles, checkpoints, control.

    python benchmarks/loop_overhead.py [--json FILE] [--rounds 5]

Two child processes of one thread build the same run (iresnet18 at 64x64, 2,000 classes, synthetic data decoded ahead).
One is ``train.train`` as it is, logging every 10 updates and saving every 200 (asynchronously, the writing inside its
turns); the other does nothing but fetch, forward, backward and step. They take turns of 25 updates, so that a slow
second of the machine hits both; a round is 200 updates of each, one checkpoint included. ``ratio`` is the median over
the rounds of ours over the bare loop's images a second. Verification is off the clock: there is none. The bar is 0.97.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.97
BATCH, TURN, ROUND = 16, 25, 200  # images an update, updates a turn and a round
OFFSET = 10  # updates before the first turn, so that no checkpoint falls on the end of one
CONFIG = """
run: {{output: {output}, device: cpu, seed: 1, batch_size: {batch}, max_steps: 1000000, epochs: 1}}
data: {{kind: synthetic, num_classes: 2000, num_images: 100000, num_threads: 1}}
model: {{network: iresnet18, width: {width}, input_size: 64, embedding_size: 256}}
head: {{margin: {{name: arcface}}, sample_rate: 0.5}}
optim: {{lr: 0.01}}
checkpoint: {{every_steps: 200}}
log: {{every_steps: 10}}
"""


class Turns:
    """A loader that waits for its turn: at the end of each it prints the seconds it took and reads a line to go on."""

    def __init__(self, loader: object, reply: object) -> None:
        self._loader, self._reply, self._left, self._began = loader, reply, OFFSET, None

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator:
        for batch in self._loader:
            if self._left == 0:
                if self._began is not None:
                    print(time.perf_counter() - self._began, file=self._reply, flush=True)
                else:
                    print("ready", file=self._reply, flush=True)
                if not sys.stdin.readline():
                    os._exit(0)
                self._left, self._began = TURN, time.perf_counter()
            self._left -= 1
            yield batch


def child(kind: str, folder: Path, width: int) -> None:
    """Serve turns: a line in is a turn, its seconds come out; end of input ends it."""
    sys.path.insert(0, str(ROOT))
    import train
    from config import load_config
    from utils import distributed
    from utils.model.optimizer import clip_coefficient, gradient_norm
    from utils.system import keep_freed_memory

    distributed.init("cpu")
    keep_freed_memory()
    path = folder / f"{kind}.yaml"
    path.write_text(CONFIG.format(batch=BATCH, output=folder / kind, width=width))
    run = train.build(load_config(path))
    reply, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 (the loop's own lines)
    run.loader = Turns(run.loader, reply)
    if kind == "ours":
        train.train(run)
    for image, label in run.loader:
        run.head(run.replica(image), label).backward()
        norm = gradient_norm(list(run.optimizer.parameters.values()))
        run.optimizer.step(0.01, clip_coefficient(norm, 5.0))
        run.head.step(0.01)
        run.optimizer.clear_grad()


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=5, help="of 200 updates each")
    parser.add_argument("--width", type=int, default=8, help="stem width of the network")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child[0], Path(args.child[1]), args.width)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ratios, totals = [], {"ours": 0.0, "bare": 0.0}
    with tempfile.TemporaryDirectory(prefix="overhead_") as folder:
        children = {
            kind: subprocess.Popen(
                [sys.executable, __file__, "--child", kind, folder, "--width", str(args.width)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            )
            for kind in totals
        }  # fmt: skip
        try:
            for kind, process in children.items():
                _line(kind, process, "ready")
            for _ in range(args.rounds):
                seconds = {"ours": 0.0, "bare": 0.0}
                for turn in range(ROUND // TURN):
                    for kind in sorted(children, reverse=turn % 2 == 0):
                        process = children[kind]
                        process.stdin.write("go\n")
                        process.stdin.flush()
                        seconds[kind] += float(_line(kind, process))
                ratios.append(seconds["bare"] / seconds["ours"])
                print(f"round {len(ratios)}: {seconds}, ratio {ratios[-1]:.3f}", flush=True)
                totals = {kind: total + seconds[kind] for kind, total in totals.items()}
        finally:
            for process in children.values():
                process.stdin.close()
                process.wait()
    rate = {kind: args.rounds * ROUND * BATCH / total for kind, total in totals.items()}
    case = {
        "name": "loop/overhead",
        "metric": "images_s",
        "ours": rate["ours"],
        "peer": rate["bare"],
        "peer_name": "bare loop",
        "ratio": statistics.median(ratios),
        "runs": args.rounds,
        "spread": [min(ratios), max(ratios)],
    }
    both = f"{case['ours']:.1f} images/s, bare loop {case['peer']:.1f}"
    print(f"loop/overhead: {both}, ratio {case['ratio']:.3f} (bar {BAR})")
    if args.json:
        versions = {name: version(name) for name in ("paddlepaddle", "numpy")}
        report = {"machine": f"{os.cpu_count()} cores, one thread a side", "versions": versions, "cases": [case]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def _line(kind: str, process: subprocess.Popen, expected: str | None = None) -> str:
    """The next line of figures; Paddle's own lines are passed over."""
    while True:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the {kind} child ended with status {process.wait()}")
        text = line.strip()
        if text == expected:
            return text
        if expected is None and text.replace(".", "", 1).isdigit():
            return text


if __name__ == "__main__":
    main()
