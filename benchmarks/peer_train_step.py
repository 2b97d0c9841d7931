"""One rank of the PyTorch side of ``benchmarks/train_step.py``: DDP backbone, Partial FC v2 arithmetic, SGD.

Written for this comparison: the head of ``benchmarks/peer_train.py``, one optimiser for backbone and class rows, its
momentum dense.

    python benchmarks/peer_train_step.py NETWORK BATCH        (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)
"""

import sys

import torch
import torch.distributed as dist
from peer_backbones import NETWORKS
from peer_train import class_rows, head_loss

from benchmarks.common import serve
from benchmarks.train_step import EMBEDDING_SIZE, INPUT_SIZE, NUM_CLASSES, RATE


def main() -> None:
    network, batch = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    backbone = NETWORKS[network]()
    mine = class_rows(NUM_CLASSES)
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (mine.stop - mine.start, EMBEDDING_SIZE)))
    model = torch.nn.parallel.DistributedDataParallel(backbone, broadcast_buffers=False)
    groups = [{"params": list(backbone.parameters())}, {"params": [weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step(_: str) -> None:
        image = torch.randn(batch, 3, INPUT_SIZE, INPUT_SIZE, generator=generator)
        label = torch.randint(NUM_CLASSES, (batch,), generator=generator)
        head_loss(model(image), label, weight, mine.start, RATE).backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    backbone.train()
    serve(step)


if __name__ == "__main__":
    main()
