"""Step time and peak memory of the head beside a PyTorch Partial FC v2 head, on CPU.

    python benchmarks/head.py [--json FILE] [--cases 85742/1.0/128 ...] [--steps 7] [--threads 2]

Each case runs our head (``update="dense"``, ArcFace, float32) and the peer (``benchmarks/peer_head.py``) in two child
processes that take turns, one step each; a step is draw, forward, backward to the embedding and update. Peak memory is
the child's peak RSS above what it held after its imports, so weights and momentum count. Cases named in ``OURS_ONLY``
run without the peer, which would need more memory than this is meant for.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, build_parser, case, measured, run, serve
from utils.system import peak_bytes, reset_peak

CASES = ("85742/1.0/128", "85742/0.1/128", "1000000/0.1/128", "2000000/0.05/256")
OURS_ONLY = ("2000000/0.05/256",)
DIM = 512


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CLASSES/RATE/BATCH")
    parser.add_argument("--steps", type=int, default=7, help="measured steps, after two that are not")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")

    def measure_all(args) -> list[dict]:
        return [found for name in args.cases for found in measure(name, args.steps, args.threads)]

    run(parser, argv, measure_all, "{threads} threads a side", child=run_child)


def measure(name: str, num_steps: int, threads: int) -> list[dict]:
    """Both sides of one case, step by step in turn; its ``step_ms`` and ``peak_mb``."""
    commands = {"ours": [__file__, "--child", name, threads]}
    if name not in OURS_ONLY:
        commands["peer"] = [ROOT / "benchmarks" / "peer_head.py", *name.split("/"), DIM, threads]
    turns = measured(commands, num_steps, 2, threads=threads)

    def values(key: str, scale: float) -> list:
        return [[turn[key] * scale for turn in turns[side]] if side in turns else None for side in ("ours", "peer")]

    return [
        case(f"head/{name}", "step_ms", *values("seconds", 1e3), "pytorch", smaller=True),
        case(f"head/{name}", "peak_mb", *values("peak", 1e-6), "pytorch", smaller=True, middle=max),
    ]


def run_child(name: str, threads: str) -> None:
    """Our side: one head, a step for each line of input."""
    import numpy as np
    import paddle

    from losses import build_margin
    from partial_fc import PartialFC

    paddle.set_device("cpu")
    base = reset_peak()
    num_classes, rate, batch = (kind(value) for kind, value in zip((int, float, int), name.split("/"), strict=True))
    rng = np.random.default_rng(0)
    head = PartialFC(num_classes, DIM, build_margin("arcface"), sample_rate=rate, num_threads=int(threads))

    def step(_: str) -> float:
        embedding = paddle.to_tensor(rng.standard_normal([batch, DIM], dtype=np.float32), stop_gradient=False)
        label = paddle.to_tensor(rng.integers(0, num_classes, batch))
        head.prepare([label])
        loss = head(embedding, label)
        loss.backward()
        head.step(0.1)
        return loss.item()

    serve(step, lambda loss: {"loss": loss, "peak": peak_bytes() - base})


if __name__ == "__main__":
    main()
