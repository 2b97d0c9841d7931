"""Images a second of a whole training step on CPU, ours beside PyTorch: two ranks of one thread each.

    python benchmarks/train_step.py [--json FILE] [--networks iresnet18 iresnet50] [--steps 3] [--ranks 2]

A step: forward at 112x112, Partial FC at 85,742 classes with rate 0.1 (ArcFace, class rows over the ranks), backward,
gradients averaged over the ranks, clip, SGD with momentum and decay for backbone and head. Ours goes through
``utils/model/replica.py`` and ``partial_fc.py`` as ``train.py`` does, with ``run.compile=true``; the peer is
``benchmarks/peer_train_step.py``, whose head takes the arithmetic of Partial FC v2. The sides take turns, round by
round, so that both see the same machine; the medians of the rounds count.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NUM_CLASSES, RATE, EMBEDDING_SIZE, INPUT_SIZE = 85742, 0.1, 512, 112


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--networks", nargs="+", default=["iresnet18", "iresnet50"])
    parser.add_argument("--batch", type=int, default=8, help="images a rank")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side, after two that are not")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        run_child(args.child[0], int(args.child[1]))
        return
    cases = [measure(network, args.batch, args.steps, args.ranks) for network in args.networks]
    report = {"machine": machine(args.ranks), "versions": versions(), "cases": cases}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(network: str, batch: int, num_steps: int, num_ranks: int) -> dict:
    """Both sides of one network, step by step in turn; prints and returns the case."""
    commands = {
        "ours": [sys.executable, __file__, "--child", network, str(batch)],
        "peer": [sys.executable, str(ROOT / "benchmarks" / "peer_train_step.py"), network, str(batch)],
    }
    sides = {side: _start(command, num_ranks) for side, command in commands.items()}
    seconds = {side: [] for side in sides}
    try:
        for turn in range(num_steps + 2):
            for side, children in sides.items():
                taken = _step(children, side)
                if turn >= 2:
                    seconds[side].append(taken)
    finally:
        for child in (child for children in sides.values() for child in children):
            child.stdin.close()
            child.wait()
    rates = {side: [batch * num_ranks / each for each in taken] for side, taken in seconds.items()}
    ours, peer = statistics.median(rates["ours"]), statistics.median(rates["peer"])
    print(
        f"train/{network:<12} images/s   ours {ours:7.2f}   pytorch {peer:7.2f}   ratio {ours / peer:.2f}", flush=True
    )
    return {
        "name": f"train/{network}",
        "metric": "images_s",
        "ours": ours,
        "peer": peer,
        "peer_name": "pytorch",
        "ratio": ours / peer,
        "runs": num_steps,
        "spread": [min(rates["ours"]), max(rates["ours"])],
    }


def run_child(network: str, batch: int) -> None:
    """One rank of ours: a step for each line of input, answered by its seconds."""
    sys.path.insert(0, str(ROOT))
    from utils.system import keep_freed_memory

    keep_freed_memory()
    import paddle

    from backbones import build_backbone
    from losses import build_margin
    from partial_fc import PartialFC
    from utils import distributed
    from utils.model.optimizer import BackboneOptimizer, clip_coefficient, gradient_norm, trainable
    from utils.model.replica import Replica

    distributed.init("cpu")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    paddle.seed(0)
    backbone = build_backbone(network, embedding_size=EMBEDDING_SIZE, input_size=INPUT_SIZE)
    replica = Replica(backbone, compile=True)
    head = PartialFC(NUM_CLASSES, EMBEDDING_SIZE, build_margin("arcface"), RATE, rank, world_size, num_threads=1)
    optimizer = BackboneOptimizer(trainable(backbone), "sgd", momentum=0.9, weight_decay=5e-4)
    rng = np.random.default_rng(rank)

    def step() -> None:
        image = paddle.to_tensor(rng.standard_normal([batch, 3, INPUT_SIZE, INPUT_SIZE], dtype=np.float32))
        label = paddle.to_tensor(rng.integers(0, NUM_CLASSES, batch))
        head(replica(image), label).backward()
        replica.finish_backward()
        norm = gradient_norm(list(optimizer.parameters.values()))
        optimizer.step(0.01, clip_coefficient(norm, 5.0))
        head.step(0.01)
        optimizer.clear_grad()
        replica.sum_figures([0.0])
        replica.finish_update(skipped=False)

    backbone.train()
    serve(step)


def serve(step) -> None:
    """Answer "ready", then run ``step`` for every line of input and answer the seconds it took."""
    print("READY", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(f"SECONDS {time.perf_counter() - start}", flush=True)


def machine(num_ranks: int) -> str:
    """One line on what this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {num_ranks} ranks of 1 thread"


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    return {name: version(name) for name in ("paddlepaddle", "numpy", "torch")} | {"python": platform.python_version()}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(command: list[str], num_ranks: int) -> list[subprocess.Popen]:
    """The ranks of one side, in the environment that both frameworks' launchers make."""
    ports = _free_ports(num_ranks + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports[:num_ranks]]
    children = []
    for rank in range(num_ranks):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "PADDLE_TRAINERS_NUM": str(num_ranks),
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_MASTER": f"127.0.0.1:{ports[-1]}",
            "WORLD_SIZE": str(num_ranks),
            "RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(ports[-1]),
        }
        children.append(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
        )
    for child in children:
        _read(child, "READY", command[1])
    return children


def _step(children: list[subprocess.Popen], side: str) -> float:
    """One step on all ranks: the seconds of the slowest."""
    for child in children:
        child.stdin.write("step\n")
        child.stdin.flush()
    return max(float(_read(child, "SECONDS", side).split()[1]) for child in children)


def _read(child: subprocess.Popen, word: str, side: str) -> str:
    for line in child.stdout:
        if line.startswith(word):
            return line
    raise SystemExit(f"benchmark child {side} ended with status {child.wait()}")


if __name__ == "__main__":
    main()
