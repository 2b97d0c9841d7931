"""Embedding speed: our automatic engine beside Paddle's dynamic graph and PyTorch eager, on CPU.

    python benchmarks/embed.py [--json FILE] [--networks iresnet18 iresnet50] [--batch 16] [--runs 9] [--threads 2]

From uint8 112x112 images to embeddings on the host, the same weights on every side, the same number of threads. Each
side is a process of its own; they take turns, one batch each, so that a slow minute of the machine hits all of them.
The embeddings are compared: a side that computes something else is an error. Bar: ``dynamic`` 2.5, ``pytorch`` 1.0.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
NETWORKS = ("iresnet18", "iresnet50")
SIDES = ("ours", "dynamic", "pytorch")
PEERS = SIDES[1:]


def make_weights(network: str, folder: Path) -> None:
    """``weights.pt`` of a PyTorch network and 64 random images."""
    import torch

    from benchmarks.peer_backbones import IResNet, randomise

    torch.save(randomise(IResNet(DEPTHS[network])).state_dict(), folder / "weights.pt")
    images = np.random.default_rng(0).integers(0, 256, (64, 112, 112, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)


def serve(side: str, network: str, folder: Path, threads: int) -> None:
    """Child process: for each line on stdin, embed so many images and print the seconds."""
    images = np.load(folder / "images.npy")
    embed, name = _pytorch(network, folder, threads) if side == "pytorch" else _paddle(side, network, folder, threads)
    print(json.dumps({"engine": name}), flush=True)
    for line in sys.stdin:
        batch = images[: int(line)]
        start = time.perf_counter()
        embedding_BD = embed(batch)
        seconds = time.perf_counter() - start
        np.save(folder / f"{side}.npy", embedding_BD)
        print(json.dumps({"seconds": seconds}), flush=True)


def _paddle(side: str, network: str, folder: Path, threads: int):
    from eval.embed import load_embedder

    engine = "auto" if side == "ours" else "dynamic"
    embedder = load_embedder(folder / "weights.pt", network, engine, num_threads=threads)
    return embedder, embedder.engine


def _pytorch(network: str, folder: Path, threads: int):
    import torch

    from benchmarks.peer_backbones import IResNet

    torch.set_num_threads(threads)
    net = IResNet(DEPTHS[network])
    net.load_state_dict(torch.load(folder / "weights.pt", weights_only=True), strict=True)
    net.eval()

    def embed(images_NHWC: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)).numpy()

    return embed, "eager"


def measure(network: str, batch: int, runs: int, threads: int) -> list[dict]:
    """One network: all sides in turn; prints and returns its cases."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(network, folder)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONWARNINGS": "ignore",
        }
        children = {}
        try:
            for side in SIDES:
                command = [sys.executable, __file__, "--child", side, network, name, "--threads", str(threads)]
                children[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                  stderr=subprocess.DEVNULL, text=True, env=environment)  # fmt: skip
            engines = {side: _answer(child, side)["engine"] for side, child in children.items()}
            rates = {side: [] for side in SIDES}
            for _ in range(runs + 1):
                for side, child in children.items():
                    child.stdin.write(f"{batch}\n")
                    child.stdin.flush()
                    rates[side].append(batch / _answer(child, side)["seconds"])
        finally:
            for child in children.values():
                child.kill()
                child.wait()
        found = {side: np.load(folder / f"{side}.npy") for side in SIDES}
    difference = max(float(np.abs(found["ours"] - found[peer]).max()) for peer in PEERS)
    if not difference < 1e-4 * max(1.0, float(np.abs(found["pytorch"]).max())):
        raise SystemExit(f"error: {network}: the sides' embeddings differ by {difference:.3g}")
    return [_case(network, peer, rates, engines, difference) for peer in PEERS]


def _case(network: str, peer: str, rates: dict, engines: dict, difference: float) -> dict:
    ours, theirs = rates["ours"][1:], rates[peer][1:]  # the first turn of each side is warm-up
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    case = {
        "name": f"embed/{network}/{peer}",
        "metric": "images_s",
        "ours": statistics.median(ours),
        "peer": statistics.median(theirs),
        "peer_name": {"dynamic": "Paddle dynamic graph", "pytorch": "PyTorch eager"}[peer],
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "runs": len(ours),
        "spread": [min(ratios), max(ratios)],
        "engine": engines["ours"],
        "largest_difference": difference,
    }
    print("{name}: {ours:.1f} images/s ({engine}) against {peer:.1f} ({peer_name}), ratio {ratio:.2f}".format(**case))
    return case


def _answer(child: subprocess.Popen, side: str) -> dict:
    while line := child.stdout.readline():
        if line.startswith("{"):  # engines may print lines of their own
            return json.loads(line)
    raise SystemExit(f"error: the {side} side ended with status {child.wait()}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=tuple(DEPTHS))
    parser.add_argument("--batch", type=int, default=16, help="images a turn, at most 64 (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=9, help="measured turns, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "NETWORK", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        serve(args.child[0], args.child[1], Path(args.child[2]), args.threads)
        return
    cases = [case for network in args.networks for case in measure(network, args.batch, args.runs, args.threads)]
    packages = ("paddlepaddle", "onnxruntime", "torch", "numpy")
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads a side, {platform.system()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "cases": cases,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
