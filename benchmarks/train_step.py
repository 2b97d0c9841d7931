"""Images a second of a whole training step on CPU, ours beside PyTorch: two ranks of one thread each.

    python benchmarks/train_step.py [--json FILE] [--networks iresnet18 iresnet50] [--steps 3] [--ranks 2]

A step: forward at 112x112, Partial FC at 85,742 classes with rate 0.1 (ArcFace, class rows over the ranks), backward,
gradients averaged over the ranks, clip, SGD with momentum and decay for backbone and head. Ours goes through
``utils/model/replica.py`` and ``partial_fc.py`` as ``train.py`` does, with ``run.compile=true``; the peer is
``benchmarks/peer_train_step.py``, whose head takes the arithmetic of Partial FC v2. The sides take turns, round by
round, so that both see the same machine; the medians of the rounds count.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import common
from benchmarks.common import ROOT, build_parser, case, read_options, serve, started, versions, write_report
from utils.errors import one_line_errors

__all__ = ["machine", "versions"]  # for benchmarks/dispatch.py
NUM_CLASSES, RATE, EMBEDDING_SIZE, INPUT_SIZE = 85742, 0.1, 512, 112


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=["iresnet18", "iresnet50"])
    parser.add_argument("--batch", type=int, default=8, help="images a rank")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side, after two that are not")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "BATCH"), help=argparse.SUPPRESS)
    args = read_options(parser, argv)
    if args.child:
        run_child(args.child[0], int(args.child[1]))
        return
    cases = [measure(network, args.batch, args.steps, args.ranks) for network in args.networks]
    write_report(args.json, cases, _note(args.ranks))


def measure(network: str, batch: int, num_steps: int, num_ranks: int) -> dict:
    """Both sides of one network, step by step in turn; the slowest rank counts."""
    commands = {
        "ours": [__file__, "--child", network, batch],
        "peer": [ROOT / "benchmarks" / "peer_train_step.py", network, batch],
    }
    rates = {side: [] for side in commands}
    with started(commands, threads=1, num_ranks=num_ranks) as sides:
        for _ in range(num_steps + 2):
            for side, ranks in sides.items():
                rates[side].append(batch * num_ranks / ranks.turn()["seconds"])
    return case(f"train/{network}", "images_s", rates["ours"][2:], rates["peer"][2:], "pytorch")


def run_child(network: str, batch: int) -> None:
    """One rank of ours: a step for each line of input, answered by its seconds."""
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

    def step(_: str) -> None:
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


def _note(num_ranks: int) -> str:
    return f"{num_ranks} ranks of 1 thread"


def machine(num_ranks: int) -> str:
    """One line on what this ran on."""
    return common.machine(_note(num_ranks))


if __name__ == "__main__":
    main()
