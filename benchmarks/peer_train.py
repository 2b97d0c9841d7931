"""A PyTorch training loop as arcface_torch has it, on one or more gloo ranks: the peer of our training.

Written for this comparison. Per update: DistributedDataParallel backbone (running statistics not broadcast), the head
of ``benchmarks/peer_head.py``, global-norm clip of the backbone, one SGD with momentum and decay for backbone and class
rows.

    python benchmarks/peer_train.py FOLDER        the loss curve of ``benchmarks/parity.py``
    python benchmarks/peer_train.py NETWORK BATCH CLASSES RATE [WIDTH SIZE DIM]        an update a line of input

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set.
"""

import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.common import serve
from benchmarks.peer_backbones import NETWORKS
from benchmarks.peer_head import class_rows, head_loss

SHAPE = ("width", "input_size", "embedding_size")


class Training:
    """Backbone, this rank's class rows [N, D] and their optimiser; ``margin``: further arguments of the head."""

    def __init__(self, backbone, weight, start: int, *, weight_decay: float = 5e-4, clip_norm: float = 5.0, **margin):
        self.weight, self.start, self.clip_norm, self.margin = torch.nn.Parameter(weight), start, clip_norm, margin
        self.model = backbone.train()
        if dist.get_world_size() > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(backbone, broadcast_buffers=False)
        self.trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        groups = [{"params": self.trained}, {"params": [self.weight]}]
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=weight_decay)

    def update(self, image, label, lr: float = 0.01) -> float:
        """One update; the loss is read, as arcface_torch does for its log."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = head_loss(self.model(image), label, self.weight, self.start, **self.margin)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def loss_curve(folder: Path) -> None:
    """Train as ``plan.json`` says, from ``init_<ranks>.npz``; tells the losses."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = json.loads((folder / "plan.json").read_text())
    torch.set_flush_denormal(True)
    state = {name: torch.tensor(value) for name, value in np.load(folder / f"init_{world_size}.npz").items()}
    whole = state.pop("head.weight")
    backbone = NETWORKS["iresnet18"](**{key: plan[key] for key in SHAPE})
    backbone.load_state_dict(state)
    mine = class_rows(len(whole))
    options = {key: plan[key] for key in ("weight_decay", "clip_norm", "s", "m")}
    training = Training(backbone, whole[mine].clone(), mine.start, **options)
    images, labels = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    size = plan["global_batch"] // world_size
    losses = []
    for step, lr in enumerate(plan["lr"]):
        first = step * plan["global_batch"] + rank * size
        # Contiguous: torch 2.13's convolutions crash in backward on the channels-last strides that a transpose leaves.
        image = np.ascontiguousarray(images[first : first + size].transpose(0, 3, 1, 2), np.float32) / 127.5 - 1.0
        losses.append(training.update(torch.tensor(image), torch.tensor(labels[first : first + size]), lr))
    print(json.dumps({"losses": losses}), flush=True)
    dist.barrier()  # a rank that leaves early breaks the connections of one that does not


def serve_updates(network: str, batch: str, num_classes: str, rate: str, *shape: str) -> None:
    """An update of random images for each line of input."""
    batch, num_classes, given = int(batch), int(num_classes), dict(zip(SHAPE, map(int, shape), strict=False))
    torch.manual_seed(0)
    mine = class_rows(num_classes)
    weight = torch.normal(0, 0.01, (mine.stop - mine.start, given.get("embedding_size", 512)))
    training = Training(NETWORKS[network](**given), weight, mine.start, rate=float(rate))
    rng = np.random.default_rng(dist.get_rank())
    image = rng.integers(0, 256, (batch, 3, *[given.get("input_size", 112)] * 2), dtype=np.uint8)

    def step(_: str) -> None:
        label = torch.from_numpy(rng.integers(0, num_classes, batch))
        training.update(torch.from_numpy(image).float().mul_(2 / 255).sub_(1), label)

    serve(step)


def main(words: list[str]) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if len(words) == 1:
        loss_curve(Path(words[0]))
    else:
        serve_updates(*words)


if __name__ == "__main__":
    main(sys.argv[1:])
