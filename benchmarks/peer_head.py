"""The PyTorch head that ours is measured against: what arcface_torch's Partial FC v2 does in a step.

Written for this comparison: sample (random scores, positives on top, top-k, sort), gather the sampled rows, normalise,
linear, clamp, ArcFace margin on the targets without gradient, the max / exp / sum softmax with a hand-written backward,
dense SGD with momentum and weight decay. Over ranks (``torch.distributed`` is initialised) features and labels are
gathered, class rows sharded, maximum and sum of the softmax reduced. Without ranks its collectives are left out, which
only helps it; so does the margin, applied to the targets alone.

    python benchmarks/peer_head.py CLASSES RATE BATCH DIM THREADS       # one process; serves steps
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.nn.functional import linear, normalize

from benchmarks.common import serve
from utils.system import peak_bytes, reset_peak


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward sums what all ranks say about mine, times their number."""

    @staticmethod
    def forward(ctx, x):
        ctx.batch = len(x)
        return _gathered(x)

    @staticmethod
    def backward(ctx, upstream):
        upstream = _reduced(upstream.clone(memory_format=torch.contiguous_format))
        start = dist.get_rank() * ctx.batch
        return upstream[start : start + ctx.batch] * dist.get_world_size()


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over logits whose classes lie on all ranks, in place; label -1: the class is elsewhere."""

    @staticmethod
    def forward(ctx, logits, label):
        logits.sub_(_reduced(logits.max(dim=1, keepdim=True).values, dist.ReduceOp.MAX)).exp_()
        logits.div_(_reduced(logits.sum(dim=1, keepdim=True)))
        mine = torch.nonzero(label >= 0).squeeze(1)
        own = torch.zeros(len(label))
        own[mine] = logits[mine, label[mine]]
        ctx.save_for_backward(logits, label, mine)
        return -_reduced(own).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, upstream):
        prob, label, mine = ctx.saved_tensors
        prob[mine, label[mine]] -= 1
        return prob.div_(len(label)).mul_(upstream), None


def _reduced(tensor, operation=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def _gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def head_loss(embedding, label, weight, start: int = 0, rate: float = 1.0, s: float = 64.0, m: float = 0.5):
    """Loss of the global batch from this rank's class rows [N, D], ``start`` the first; below rate 1 from a draw."""
    if dist.is_initialized():
        embedding, label = _Gather.apply(embedding), _gathered(label)
    label = label - start
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
    logits = linear(normalize(embedding), normalize(weight)).clamp(-1, 1)
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
    """Serve steps."""
    num_classes, rate, batch, dim, threads = (
        kind(value) for kind, value in zip((int, float, int, int, int), sys.argv[1:6], strict=True)
    )
    torch.set_num_threads(threads)
    base = reset_peak()
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (num_classes, dim)))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(_: str) -> float:
        embedding = torch.randn(batch, dim, requires_grad=True)
        loss = head_loss(embedding, torch.randint(num_classes, (batch,)), weight, rate=rate)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    serve(step, lambda loss: {"loss": loss, "peak": peak_bytes() - base})


if __name__ == "__main__":
    main()
