"""A PyTorch training loop as arcface_torch has it, on one or more gloo ranks: the peer of ``benchmarks/parity.py``.

Written for this comparison. Per update: DistributedDataParallel backbone (running statistics not broadcast), features
and labels of all ranks gathered, class rows sharded over ranks, normalised product, clamp, margin on the targets
without gradient, softmax over the classes of all ranks (all-reduced maximum and sum), the gathered features' gradient
summed over ranks and multiplied by their number, global-norm clip of the backbone, one SGD with momentum and decay.

    python benchmarks/peer_train.py FOLDER        (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peer_backbones import IResNet
from torch.nn.functional import linear, normalize


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward sums what all ranks say about mine, times their number."""

    @staticmethod
    def forward(ctx, x):
        ctx.batch = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(upstream)
        start = dist.get_rank() * ctx.batch
        return upstream[start : start + ctx.batch] * dist.get_world_size()


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over logits whose classes lie on all ranks; label -1 where the class is elsewhere."""

    @staticmethod
    def forward(ctx, logits, label):
        top = logits.max(dim=1, keepdim=True).values
        dist.all_reduce(top, dist.ReduceOp.MAX)
        prob = (logits - top).exp()
        total = prob.sum(dim=1, keepdim=True)
        dist.all_reduce(total)
        prob /= total
        mine = torch.nonzero(label >= 0).squeeze(1)
        own = torch.zeros(len(label))
        own[mine] = prob[mine, label[mine]]
        dist.all_reduce(own)
        ctx.save_for_backward(prob, label, mine)
        return -own.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, upstream):
        prob, label, mine = ctx.saved_tensors
        gradient = prob.clone()
        gradient[mine, label[mine]] -= 1
        return gradient / len(label) * upstream, None


def head_loss(embedding, label, weight, start: int, rate: float = 1.0, s: float = 64.0, m: float = 0.5):
    """Loss of the global batch from this rank's class rows [N, D]; below rate 1 from a draw of them.

    The draw is that of Partial FC v2: random scores, positives on top, top-k, sort.
    """
    features = _Gather.apply(embedding)
    labels = [torch.empty_like(label) for _ in range(dist.get_world_size())]
    dist.all_gather(labels, label)
    label = torch.cat(labels) - start
    elsewhere = (label < 0) | (label >= len(weight))
    if rate < 1:
        with torch.no_grad():
            positive = torch.unique(label[~elsewhere], sorted=True)
            score = torch.rand(len(weight))
            score[positive] = 2.0
            index = score.topk(int(rate * len(weight))).indices.sort().values
            label = torch.searchsorted(index, label)
        weight = weight[index]
    label[elsewhere] = -1
    logits = linear(normalize(features), normalize(weight)).clamp(-1, 1)
    with torch.no_grad():
        rows = torch.nonzero(label >= 0).squeeze(1)
        cos = logits[rows, label[rows]]
        logits[rows, label[rows]] = cos * math.cos(m) - torch.sqrt(1 - cos * cos) * math.sin(m)
    return _SoftmaxLoss.apply(logits * s, label)


def class_rows(num_classes: int) -> slice:
    """This rank's classes, contiguous in rank order."""
    base, more = divmod(num_classes, dist.get_world_size())
    start = base * dist.get_rank() + min(dist.get_rank(), more)
    return slice(start, start + base + (dist.get_rank() < more))


def main() -> None:
    """Train and write ``peer_<ranks>.json``."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = json.loads((folder / "plan.json").read_text())
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    state = {name: torch.tensor(value) for name, value in np.load(folder / f"init_{world_size}.npz").items()}
    whole = state.pop("head.weight")
    backbone = IResNet((2, 2, 2, 2), plan["width"], plan["embedding_size"])
    backbone.fc = torch.nn.Linear(plan["width"] * 8 * (plan["input_size"] // 16) ** 2, plan["embedding_size"])
    backbone.load_state_dict(state)
    backbone.features.weight.requires_grad = False
    backbone.train()
    mine = class_rows(len(whole))
    weight = torch.nn.Parameter(whole[mine].clone())
    model = torch.nn.parallel.DistributedDataParallel(backbone, broadcast_buffers=False)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    groups = [{"params": trained}, {"params": [weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=plan["weight_decay"])
    images, labels = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    size = plan["global_batch"] // world_size
    losses = []
    for step, lr in enumerate(plan["lr"]):
        first = step * plan["global_batch"] + rank * size
        # Contiguous: torch 2.13's convolutions crash in backward on the channels-last strides that a transpose leaves.
        image = np.ascontiguousarray(images[first : first + size].transpose(0, 3, 1, 2), np.float32) / 127.5 - 1.0
        image = torch.tensor(image)
        label = torch.tensor(labels[first : first + size])
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = head_loss(model(image), label, weight, mine.start, s=plan["s"], m=plan["m"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, plan["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    if rank == 0:
        (folder / f"peer_{world_size}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
