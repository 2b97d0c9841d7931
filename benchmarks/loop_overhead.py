"""What the training loop costs beside a bare loop of the same step: logging, angles, checkpoints, control.

    python benchmarks/loop_overhead.py [--json FILE] [--updates 200] [--rounds 3]

Two child processes of one thread build the same run (iresnet18 at 64x64, 2,000 classes, synthetic data decoded ahead).
One is ``train.train`` as it is, logging every 10 updates and saving once every 200 (asynchronously; the save at the end
of a round is waited for), the other does nothing but fetch, forward, backward and step. They take turns, a round each;
``ratio`` is the median of ours over the bare loop's images a second. Verification is off the clock: there is none.
The bar is 0.97.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.97
CONFIG = """
run: {{output: {output}, device: cpu, seed: 1, batch_size: 16, max_steps: 1000000, epochs: 1}}
data: {{kind: synthetic, num_classes: 2000, num_images: 100000, num_threads: 1}}
model: {{network: iresnet18, width: {width}, input_size: 64, embedding_size: 256}}
head: {{margin: {{name: arcface}}, sample_rate: 0.5}}
optim: {{lr: 0.01}}
checkpoint: {{every_steps: 200}}
log: {{every_steps: 10}}
"""


def child(kind: str, folder: Path, width: int, updates: int) -> None:
    """Serve rounds: a line in is a round of ``updates`` updates, its images a second come out."""
    sys.path.insert(0, str(ROOT))
    import dataclasses

    import train
    from config import load_config
    from utils import distributed
    from utils.optim import clip_coefficient, gradient_norm

    distributed.init("cpu")
    path = folder / f"{kind}.yaml"
    path.write_text(CONFIG.format(output=folder / kind, width=width))
    run = train.build(load_config(path))
    images = run.images_per_update
    reply, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 (the loop's own lines)
    iterator = iter(run.loader)

    def bare(count: int) -> None:
        for _ in range(count):
            image, label = next(iterator)
            run.head(run.replica(image), label).backward()
            norm = gradient_norm(list(run.optimizer.parameters.values()))
            run.optimizer.step(0.01, clip_coefficient(norm, 5.0))
            run.head.step(0.01)
            run.optimizer.clear_grad()

    def whole(count: int) -> None:
        run.loader.load_state_dict(run.loader.state_dict())  # the next iteration goes on where the last one stood
        before = run.progress.step
        run.schedule = dataclasses.replace(run.schedule, total_steps=run.progress.step + count)
        train.train(run)
        run.watchdog = type(run.watchdog)(run.config.run.output, 0, 1)
        assert run.progress.step == before + count

    work = {"ours": whole, "bare": bare}[kind]
    work(5)
    print("ready", file=reply, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work(updates)
        print(updates * images / (time.perf_counter() - began), file=reply, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--updates", type=int, default=200, help="updates of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=8, help="stem width of the network")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child[0], Path(args.child[1]), args.width, args.updates)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory(prefix="overhead_") as folder:
        options = ["--updates", str(args.updates), "--width", str(args.width)]
        children = {
            kind: subprocess.Popen(
                [sys.executable, __file__, "--child", kind, folder, *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            )
            for kind in rates
        }  # fmt: skip
        try:
            for kind, process in children.items():
                _line(kind, process, "ready")
            for _ in range(args.rounds):
                for kind, process in children.items():
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    rates[kind].append(float(_line(kind, process)))
        finally:
            for process in children.values():
                process.stdin.close()
                process.wait()
    middle = {kind: statistics.median(values) for kind, values in rates.items()}
    ratios = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
    case = {
        "name": "loop/overhead",
        "metric": "images_s",
        "ours": middle["ours"],
        "peer": middle["bare"],
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
