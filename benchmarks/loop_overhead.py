"""What the training loop costs beside a bare loop of the same step: logging, angles, checkpoints, control.

    python benchmarks/loop_overhead.py [--json FILE] [--rounds 5]

Two child processes of one thread build the same run (iresnet18 at 64x64, 2,000 classes, synthetic data decoded ahead).
One is ``train.train`` as it is, logging every 10 updates and saving every 200 (asynchronously, the writing inside its
turns); the other does nothing but fetch, forward, backward and step. They take turns of 25 updates, so that a slow
second of the machine hits both; a round is 200 updates of each, one checkpoint included. ``ratio`` is the median over
the rounds of ours over the bare loop's images a second. Verification is off the clock: there is none. The bar is 0.97.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import build_parser, case, run, started
from utils.errors import POSITIVE, check_ranges

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
                told = {} if self._began is None else {"seconds": time.perf_counter() - self._began}
                print(json.dumps(told), file=self._reply, flush=True)
                if not sys.stdin.readline():
                    os._exit(0)
                self._left, self._began = TURN, time.perf_counter()
            self._left -= 1
            yield batch


def child(kind: str, folder: str, width: str) -> None:
    """Serve turns: a line in is a turn, its seconds come out; end of input ends it."""
    import train
    from config import load_config
    from utils import distributed
    from utils.model.optimizer import clip_coefficient, gradient_norm
    from utils.system import keep_freed_memory

    distributed.init("cpu")
    keep_freed_memory()
    path = Path(folder, f"{kind}.yaml")
    path.write_text(CONFIG.format(batch=BATCH, output=Path(folder, kind), width=width))
    parts = train.build(load_config(path))
    reply, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 (the loop's own lines)
    parts.loader = Turns(parts.loader, reply)
    if kind == "ours":
        train.train(parts)
    for image, label in parts.loader:
        parts.head(parts.replica(image), label).backward()
        norm = gradient_norm(list(parts.optimizer.parameters.values()))
        parts.optimizer.step(0.01, clip_coefficient(norm, 5.0))
        parts.head.step(0.01)
        parts.optimizer.clear_grad()


def measure(args) -> list[dict]:
    """Both sides, turn by turn."""
    check_ranges(args, rounds=POSITIVE)
    rates = {"ours": [], "bare": []}  # images a second, round by round
    with tempfile.TemporaryDirectory(prefix="overhead_") as folder:
        commands = {kind: [__file__, "--child", kind, folder, args.width] for kind in rates}
        with started(commands, threads=1) as children:
            for number in range(args.rounds):
                seconds = dict.fromkeys(rates, 0.0)
                for turn in range(ROUND // TURN):
                    for kind in sorted(children, reverse=turn % 2 == 0):
                        seconds[kind] += children[kind].turn()["seconds"]
                for kind, found in rates.items():
                    found.append(ROUND * BATCH / seconds[kind])
                print(f"round {number + 1}: {seconds}, ratio {seconds['bare'] / seconds['ours']:.3f}", flush=True)
    # Over all rounds it is the harmonic mean: the images by the seconds of all of them.
    options = {"paired": True, "middle": statistics.harmonic_mean}
    found = case("loop/overhead", "images_s", rates["ours"], rates["bare"], "bare loop", **options)
    print(f"  ratio {found['ratio']:.3f} (bar {BAR})")
    return [found]


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of 200 updates each")
    parser.add_argument("--width", type=int, default=8, help="stem width of the network")
    run(parser, argv, measure, "one thread a side", ("paddlepaddle", "numpy"), child)


if __name__ == "__main__":
    main()
