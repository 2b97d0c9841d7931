"""Images a second of a whole training step on CPU, ours beside PyTorch: two ranks of one thread each.

    python benchmarks/train_step.py [--json FILE] [--networks iresnet18 iresnet50] [--steps 3] [--ranks 2]

A step: forward at 112x112, Partial FC at 85,742 classes with rate 0.1 (ArcFace, class rows over the ranks), backward,
gradients averaged over the ranks, clip, SGD with momentum and decay for backbone and head. Ours goes through
``utils/model/replica.py`` and ``partial_fc.py`` as ``train.py`` does, with ``run.compile=true``; the peer is
``benchmarks/peer_train.py``, whose head takes the arithmetic of Partial FC v2. The sides take turns, round by round, so
that both see the same machine; the medians of the rounds count.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import ROOT, build_parser, case, measured, run, serve

NUM_CLASSES, RATE, EMBEDDING_SIZE, INPUT_SIZE = 85742, 0.1, 512, 112


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=["iresnet18", "iresnet50"])
    parser.add_argument("--batch", type=int, default=8, help="images a rank")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side, after two that are not")
    parser.add_argument("--ranks", type=int, default=2)

    def measure_all(args) -> list[dict]:
        return [measure(network, args.batch, args.steps, args.ranks) for network in args.networks]

    run(parser, argv, measure_all, "{ranks} ranks of 1 thread", child=run_child)


def measure(network: str, batch: int, num_steps: int, num_ranks: int) -> dict:
    """Both sides of one network, step by step in turn; the slowest rank counts."""
    commands = {
        "ours": [__file__, "--child", network, batch],
        "peer": [ROOT / "benchmarks" / "peer_train.py", network, batch, NUM_CLASSES, RATE],
    }
    turns = measured(commands, num_steps, 2, threads=1, num_ranks=num_ranks)
    rates = ([batch * num_ranks / turn["seconds"] for turn in turns[side]] for side in commands)
    return case(f"train/{network}", "images_s", *rates, "pytorch")


def run_child(network: str, batch: str) -> None:
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
        image = rng.standard_normal([int(batch), 3, INPUT_SIZE, INPUT_SIZE], dtype=np.float32)
        label = paddle.to_tensor(rng.integers(0, NUM_CLASSES, int(batch)))
        head(replica(paddle.to_tensor(image)), label).backward()
        replica.finish_backward()
        norm = gradient_norm(list(optimizer.parameters.values()))
        optimizer.step(0.01, clip_coefficient(norm, 5.0))
        head.step(0.01)
        optimizer.clear_grad()
        replica.sum_figures([0.0])
        replica.finish_update(skipped=False)

    backbone.train()
    serve(step)


if __name__ == "__main__":
    main()
