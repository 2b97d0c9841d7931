"""Our training loop beside a PyTorch loop as arcface_torch has it: the same loss curve, on one rank and on two.

    python benchmarks/parity.py [--json FILE] [--steps 200] [--ranks 1 2]

iresnet18 with a narrow stem at 64x64, 500 classes, ``sample_rate`` 1, dense update, ``gradient="straight_through"``,
float32: same initial weights, same batches, same learning rates. Ours goes through ``train.build`` and
``train.update``, the peer is ``benchmarks/peer_train.py``. The two differ in rounding only; the largest relative
difference of the loss over all updates must stay below 1e-3. The learning rate is small because training is chaotic:
at 0.02 the first five updates agree to 1e-6 as well, but rounding has grown to 3e-2 of the loss by the twentieth.
"""

import json
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import ROOT, build_parser, case, run, told_by

BOUND = 1e-3
CONFIG = """
run: {{output: {output}, device: cpu, seed: 1, batch_size: {batch}, max_steps: {steps}, hang_timeout: 0}}
data: {{kind: synthetic, num_classes: {num_classes}, num_images: 4096, flip: false, num_threads: 1}}
model: {{network: iresnet18, width: {width}, input_size: {input_size}, embedding_size: {embedding_size}}}
head: {{margin: {{name: arcface, s: {s}, m: {m}, gradient: straight_through}}, sample_rate: 1.0, update: dense}}
optim: {{lr: {lr}, weight_decay: {weight_decay}, clip_norm: {clip_norm}}}
schedule: {{name: poly, warmup_steps: 20}}
log: {{tensorboard: false}}
"""
PLAN = {"width": 8, "input_size": 64, "embedding_size": 128, "num_classes": 500, "global_batch": 16}
PLAN |= {"s": 64.0, "m": 0.5, "weight_decay": 5e-4, "clip_norm": 5.0}


def prepare(folder: Path, steps: int, lr: float) -> None:
    """Batches and learning rates, for both sides."""
    from dataset import SyntheticDataset
    from utils.model.schedule import LrSchedule

    source = SyntheticDataset(PLAN["num_classes"], 4096, PLAN["input_size"])
    chosen = np.random.default_rng(0).integers(0, len(source), steps * PLAN["global_batch"])
    samples = [source[int(index)] for index in chosen]
    np.save(folder / "images.npy", np.stack([image for image, _ in samples]))
    np.save(folder / "labels.npy", np.array([label for _, label in samples], np.int64))
    schedule = LrSchedule("poly", lr, steps, steps, warmup_steps=20)
    plan = PLAN | {"lr": [schedule(step) for step in range(steps)], "base_lr": lr}
    (folder / "plan.json").write_text(json.dumps(plan))


def run_ours(name: str) -> None:
    """A rank of ours: writes ``init_<ranks>.npz`` to the folder and tells the losses."""
    import paddle

    import train
    from config import load_config
    from utils import distributed
    from utils.weights.states import torch_spelling

    folder = Path(name)
    distributed.init("cpu")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    plan = json.loads((folder / "plan.json").read_text())
    path = folder / f"config_{world_size}_{rank}.yaml"
    size = plan["global_batch"] // world_size
    values = {"lr": plan["base_lr"], "steps": len(plan["lr"]), "batch": size, "output": folder / f"run_{world_size}"}
    path.write_text(CONFIG.format(**plan | values))
    parts = train.build(load_config(path))
    weight = np.concatenate(distributed.all_gather_object(parts.head.export_weight()))
    if rank == 0:
        state = torch_spelling(parts.replica.backbone) | {"head.weight": weight}
        np.savez(folder / f"init_{world_size}.npz", **state)
    images, labels = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    losses = []
    for step, lr in enumerate(plan["lr"]):
        first = step * plan["global_batch"] + rank * size
        image = images[first : first + size].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        batch = paddle.to_tensor(image), paddle.to_tensor(labels[first : first + size])
        losses.append(train.update(parts, [batch], lr).loss)
        parts.progress.step += 1
    parts.log.close()
    print(json.dumps({"losses": losses}), flush=True)


def compare(folder: Path, num_ranks: int) -> dict:
    """Both sides on so many ranks; the case for the report."""
    scripts = {"ours": [__file__, "--child", folder], "peer": [ROOT / "benchmarks" / "peer_train.py", folder]}
    told = [told_by(side, words, threads=1, num_ranks=num_ranks) for side, words in scripts.items()]
    ours, peer = (np.array(side["losses"]) for side in told)
    relative = np.abs(ours - peer) / np.abs(peer)
    more = {
        "steps": len(relative),
        "first_loss": float(ours[0]),
        "max_relative_difference": float(relative.max()),
        "at_step": int(relative.argmax()) + 1,
    }
    options = {"smaller": True, "middle": lambda losses: losses[-1]}
    found = case(f"parity/loss/{num_ranks}", "final_loss", ours.tolist(), peer.tolist(), "pytorch", **options, **more)
    print(
        f"  largest relative difference {relative.max():.2e} at step {found['at_step']} of {len(relative)} "
        f"({'within' if relative.max() <= BOUND else 'ABOVE'} {BOUND:g})",
        flush=True,
    )
    return found | {"runs": 1}


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])

    def measure(args) -> list[dict]:
        with tempfile.TemporaryDirectory(prefix="parity_") as name:
            prepare(Path(name), args.steps, args.lr)
            return [compare(Path(name), num_ranks) for num_ranks in args.ranks]

    cases = run(parser, argv, measure, "one thread a rank", child=run_ours)
    if any(found["max_relative_difference"] > BOUND for found in cases):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
