"""One rank of the PyTorch side of ``benchmarks/train_step.py``: DDP backbone, Partial FC v2 arithmetic, SGD.

Written for this comparison. Collectives of ``benchmarks/peer_train.py`` (gather with gradient, softmax over the classes
of all ranks), the sampling of Partial FC v2 (random scores, positives on top, top-k, sort), one optimiser for backbone
and class rows, its momentum dense.

    python benchmarks/peer_train_step.py NETWORK BATCH        (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)
"""

import math
import sys

import torch
import torch.distributed as dist
from peer_backbones import IResNet, MobileFaceNet
from peer_train import _Gather, _SoftmaxLoss
from torch.nn.functional import linear, normalize
from train_step import EMBEDDING_SIZE, INPUT_SIZE, NUM_CLASSES, RATE, serve

NETWORKS = {
    "iresnet18": lambda: IResNet((2, 2, 2, 2)),
    "iresnet50": lambda: IResNet((3, 4, 14, 3)),
    "mobilefacenet": MobileFaceNet,
}


def head_loss(embedding, label, weight, start: int, s: float = 64.0, m: float = 0.5):
    """Loss of the global batch from this rank's class rows [N, D], a tenth of which are drawn."""
    features = _Gather.apply(embedding)
    labels = [torch.empty_like(label) for _ in range(dist.get_world_size())]
    dist.all_gather(labels, label)
    label = torch.cat(labels) - start
    elsewhere = (label < 0) | (label >= len(weight))
    with torch.no_grad():
        positive = torch.unique(label[~elsewhere], sorted=True)
        score = torch.rand(len(weight))
        score[positive] = 2.0
        index = score.topk(int(RATE * len(weight))).indices.sort().values
        label = torch.searchsorted(index, label)
        label[elsewhere] = -1
    logits = linear(normalize(features), normalize(weight[index])).clamp(-1, 1)
    with torch.no_grad():
        rows = torch.nonzero(label >= 0).squeeze(1)
        cos = logits[rows, label[rows]]
        logits[rows, label[rows]] = cos * math.cos(m) - torch.sqrt(1 - cos * cos) * math.sin(m)
    return _SoftmaxLoss.apply(logits * s, label)


def main() -> None:
    network, batch = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    backbone = NETWORKS[network]()
    base, more = divmod(NUM_CLASSES, world_size)
    start = base * rank + min(rank, more)
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (base + (rank < more), EMBEDDING_SIZE)))
    model = torch.nn.parallel.DistributedDataParallel(backbone, broadcast_buffers=False)
    groups = [{"params": list(backbone.parameters())}, {"params": [weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        image = torch.randn(batch, 3, INPUT_SIZE, INPUT_SIZE, generator=generator)
        label = torch.randint(NUM_CLASSES, (batch,), generator=generator)
        head_loss(model(image), label, weight, start).backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    backbone.train()
    serve(step)


if __name__ == "__main__":
    main()
