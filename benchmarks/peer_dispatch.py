r"""The PyTorch side of ``benchmarks/dispatch.py``'s ``host_ms``: whole updates of a narrow iresnet and Partial FC.

Written for this comparison, of the parts of ``benchmarks/peer_train.py`` (gather with gradient, softmax over the
classes of all ranks) and ``benchmarks/peer_train_step.py`` (the draw of Partial FC v2): DistributedDataParallel where
there are several ranks, clipping of the backbone by its global norm, one SGD with momentum and decay for backbone and
class rows, the loss read after each update as arcface_torch does for its log.

    torchrun --standalone --nproc_per_node 1 benchmarks/peer_dispatch.py OUT NETWORK CLASSES RATE BATCH WIDTH SIZE DIM \
        UPDATES
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peer_backbones import IResNet
from peer_train import _Gather, _SoftmaxLoss
from torch.nn.functional import linear, normalize

DEPTHS = {"iresnet18": (2, 2, 2, 2), "iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}


def head_loss(embedding, label, weight, start: int, rate: float, s: float = 64.0, m: float = 0.5):
    """Loss of the global batch from this rank's class rows [N, D]; below rate 1 from a draw of them."""
    features = _Gather.apply(embedding)
    labels = [torch.empty_like(label) for _ in range(dist.get_world_size())]
    dist.all_gather(labels, label)
    label = torch.cat(labels) - start
    elsewhere = (label < 0) | (label >= len(weight))
    label[elsewhere] = -1
    if rate < 1:
        with torch.no_grad():
            positive = torch.unique(label[~elsewhere], sorted=True)
            score = torch.rand(len(weight))
            score[positive] = 2.0
            index = score.topk(int(rate * len(weight))).indices.sort().values
            label = torch.searchsorted(index, label)
            label[elsewhere] = -1
        weight = weight[index]
    logits = linear(normalize(features), normalize(weight)).clamp(-1, 1)
    with torch.no_grad():
        rows = torch.nonzero(label >= 0).squeeze(1)
        cos = logits[rows, label[rows]]
        logits[rows, label[rows]] = cos * math.cos(m) - torch.sqrt(1 - cos * cos) * math.sin(m)
    return _SoftmaxLoss.apply(logits * s, label)


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
    base, more = divmod(num_classes, world_size)
    start = base * rank + min(rank, more)
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (base + (rank < more), dim)))
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
        loss = head_loss(model(image), label, weight, start, rate)
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
