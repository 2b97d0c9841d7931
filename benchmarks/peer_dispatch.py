r"""The PyTorch side of ``benchmarks/dispatch.py``'s ``host_ms``: whole updates of a narrow iresnet and Partial FC.

Written for this comparison, with the head of ``benchmarks/peer_train.py``: DistributedDataParallel where there are
several ranks, clipping of the backbone by its global norm, one SGD with momentum and decay for backbone and class rows,
the loss read after each update as arcface_torch does for its log.

    torchrun --standalone --nproc_per_node 1 benchmarks/peer_dispatch.py OUT NETWORK CLASSES RATE BATCH WIDTH SIZE DIM \
        UPDATES
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peer_backbones import IResNet
from peer_train import class_rows, head_loss

DEPTHS = {"iresnet18": (2, 2, 2, 2), "iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}


def main() -> None:
    out, network, *numbers = sys.argv[1:]
    num_classes, rate, batch, width, size, dim, updates = (float(number) for number in numbers)
    num_classes, batch, width, size, dim, updates = map(int, (num_classes, batch, width, size, dim, updates))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    backbone = IResNet(DEPTHS[network], width, dim)
    backbone.fc = torch.nn.Linear(width * 8 * (size // 16) ** 2, dim)
    backbone.features.weight.requires_grad = False
    mine = class_rows(num_classes)
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (mine.stop - mine.start, dim)))
    model = backbone
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(backbone, broadcast_buffers=False)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained}, {"params": [weight]}], lr=0.01, momentum=0.9, weight_decay=5e-4)
    rng = np.random.default_rng(rank)
    images = rng.integers(0, 256, (8, batch, 3, size, size), dtype=np.uint8)
    milliseconds, before = [], None
    for step in range(updates):
        now = time.perf_counter()
        if before is not None:
            milliseconds.append(1e3 * (now - before))
        before = now
        image = torch.from_numpy(images[step % 8]).float().mul_(2 / 255).sub_(1)
        label = torch.from_numpy(rng.integers(0, num_classes, batch))
        loss = head_loss(model(image), label, weight, mine.start, rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    everyone = [None] * world_size
    dist.all_gather_object(everyone, milliseconds[3:])
    if rank == 0:
        Path(out).write_text(json.dumps({"ms": [max(each) for each in zip(*everyone, strict=True)]}))
    dist.barrier()  # a rank that leaves early breaks the connections of one that does not
    os._exit(0)  # gloo's threads abort the process now and then when it is taken down


if __name__ == "__main__":
    main()
