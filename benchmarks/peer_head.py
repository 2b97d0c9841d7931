"""The PyTorch head that ours is measured against: what arcface_torch's Partial FC v2 does in a step, on one rank.

Written for this comparison: sample (random scores, positives on top, top-k, sort), gather the sampled rows, normalise,
linear, clamp, ArcFace margin on the targets without gradient, the max / exp / sum softmax with a hand-written backward,
dense SGD with momentum and weight decay. With one rank its collectives are left out, which only helps it; so does the
margin, applied to the targets alone.

    python benchmarks/peer_head.py CLASSES RATE BATCH DIM THREADS
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.functional import linear, normalize

from benchmarks.common import serve
from utils.system import peak_bytes, reset_peak


class _SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over logits, in place where possible."""

    @staticmethod
    def forward(ctx, logits, label):
        logits.sub_(logits.max(dim=1, keepdim=True).values).exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        index = torch.arange(len(label))
        ctx.save_for_backward(logits, label)
        return -logits[index, label].clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, upstream):
        prob, label = ctx.saved_tensors
        prob[torch.arange(len(label)), label] -= 1
        return prob.div_(len(label)).mul_(upstream), None


class PeerHead(torch.nn.Module):
    """Weights [C, D]; ``forward(embedding, label)`` returns the loss."""

    def __init__(self, num_classes: int, dim: int, rate: float, s: float = 64.0, m: float = 0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.normal(0, 0.01, (num_classes, dim)))
        self.rate, self.s, self.m = rate, s, m

    def forward(self, embedding, label):
        weight = self.weight
        if self.rate < 1:
            with torch.no_grad():
                positive = torch.unique(label, sorted=True)
                score = torch.rand(len(weight))
                score[positive] = 2.0
                index = score.topk(int(self.rate * len(weight))).indices.sort().values
                label = torch.searchsorted(index, label)
            weight = weight[index]
        logits = linear(normalize(embedding), normalize(weight)).clamp(-1, 1)
        with torch.no_grad():
            rows = torch.arange(len(label))
            cos = logits[rows, label]
            sine = torch.sqrt(1 - cos * cos)
            logits[rows, label] = cos * math.cos(self.m) - sine * math.sin(self.m)
        return _SoftmaxLoss.apply(logits * self.s, label)


def main() -> None:
    """Serve steps."""
    num_classes, rate, batch, dim, threads = (
        kind(value) for kind, value in zip((int, float, int, int, int), sys.argv[1:6], strict=True)
    )
    torch.set_num_threads(threads)
    base = reset_peak()
    torch.manual_seed(0)
    head = PeerHead(num_classes, dim, rate)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(_: str) -> float:
        embedding = torch.randn(batch, dim, requires_grad=True)
        label = torch.randint(num_classes, (batch,))
        loss = head(embedding, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    serve(step, lambda loss: {"loss": loss, "peak": peak_bytes() - base})


if __name__ == "__main__":
    main()
