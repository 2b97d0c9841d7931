"""Step time and peak memory of the head beside a PyTorch Partial FC v2 head, on CPU.

    python benchmarks/head.py [--json FILE] [--cases 85742/1.0/128 ...] [--steps 7] [--threads 2]

Each case runs our head (``update="dense"``, ArcFace, float32) and the peer (``benchmarks/peer_head.py``) in two child
processes that take turns, one step each; a step is draw, forward, backward to the embedding and update. Peak memory is
the child's peak RSS above what it held after its imports, so weights and momentum count. Cases named in ``OURS_ONLY``
run without the peer, which would need more memory than this is meant for.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = ("85742/1.0/128", "85742/0.1/128", "1000000/0.1/128", "2000000/0.05/256")
OURS_ONLY = ("2000000/0.05/256",)
DIM = 512


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CLASSES/RATE/BATCH")
    parser.add_argument("--steps", type=int, default=7, help="measured steps, after two that are not")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        run_child(args.child, args.threads)
        return
    cases = [case for name in args.cases for case in measure(name, args.steps, args.threads)]
    report = {"machine": machine(args.threads), "versions": versions(), "cases": cases}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(name: str, num_steps: int, threads: int) -> list[dict]:
    """Both sides of one case, step by step in turn; prints and returns its ``step_ms`` and ``peak_mb``."""
    classes, rate, batch = name.split("/")
    commands = {"ours": [sys.executable, __file__, "--child", name, "--threads", str(threads)]}
    if name not in OURS_ONLY:
        peer = [sys.executable, str(ROOT / "benchmarks" / "peer_head.py"), classes, rate, batch, str(DIM), str(threads)]
        commands["peer"] = peer
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    children = {side: _start(command, environment) for side, command in commands.items()}
    try:
        turns = {side: [] for side in children}
        for _ in range(num_steps + 2):
            for side, child in children.items():
                child.stdin.write("step\n")
                child.stdin.flush()
                turns[side].append(_read(child, side))
    finally:
        for child in children.values():
            child.stdin.close()
            child.wait()
    cases = []
    for metric, scale in (("step_ms", 1e3), ("peak_mb", 1e-6)):
        key = "seconds" if metric == "step_ms" else "peak"
        values = {side: [turn[key] * scale for turn in done[2:]] for side, done in turns.items()}
        middle = {side: (statistics.median if metric == "step_ms" else max)(each) for side, each in values.items()}
        case = {"name": f"head/{name}", "metric": metric, "ours": middle["ours"], "peer": middle.get("peer")}
        case |= {"peer_name": "pytorch", "ratio": None, "runs": num_steps}
        if "peer" in middle:
            case["ratio"] = middle["peer"] / middle["ours"]
        case["spread"] = [min(values["ours"]), max(values["ours"])]
        cases.append(case)
        against = f"pytorch {middle['peer']:9.1f}   ratio {case['ratio']:.2f}" if "peer" in middle else ""
        print(f"{case['name']:<24} {metric:<8} ours {middle['ours']:9.1f}   {against}", flush=True)
    return cases


def run_child(name: str, threads: int) -> None:
    """Our side: one head, a step for each line of input."""
    import numpy as np
    import paddle
    from head_child import serve

    from losses import build_margin
    from partial_fc import PartialFC
    from utils.system import reset_peak

    paddle.set_device("cpu")
    base = reset_peak()
    num_classes, rate, batch = (float(value) for value in name.split("/"))
    num_classes, batch = int(num_classes), int(batch)

    def build():
        rng = np.random.default_rng(0)
        head = PartialFC(num_classes, DIM, build_margin("arcface"), sample_rate=rate, num_threads=threads)

        def step() -> float:
            embedding = paddle.to_tensor(rng.standard_normal([batch, DIM], dtype=np.float32), stop_gradient=False)
            label = paddle.to_tensor(rng.integers(0, num_classes, batch))
            head.prepare([label])
            loss = head(embedding, label)
            loss.backward()
            head.step(0.1)
            return loss.item()

        return step

    serve(build, base)


def machine(threads: int) -> str:
    """One line on what this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {threads} threads a side"


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    return {name: version(name) for name in ("paddlepaddle", "numpy", "torch")} | {"python": platform.python_version()}


def _start(command: list[str], environment: dict) -> subprocess.Popen:
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    _read(child, command[1])
    return child


def _read(child: subprocess.Popen, side: str) -> dict:
    for line in child.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"benchmark child {side} ended with status {child.wait()}")


if __name__ == "__main__":
    main()
