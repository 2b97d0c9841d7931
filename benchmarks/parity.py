"""Our training loop beside a PyTorch loop as arcface_torch has it: the same loss curve, on one rank and on two.

    python benchmarks/parity.py [--json FILE] [--steps 200] [--ranks 1 2]

iresnet18 with a narrow stem at 64x64, 500 classes, ``sample_rate`` 1, dense update, ``gradient="straight_through"``,
float32: same initial weights, same batches, same learning rates. Ours goes through ``train.build`` and
``train.update``, the peer is ``benchmarks/peer_train.py``. The two differ in rounding only; the largest relative
difference of the loss over all updates must stay below 1e-3. The learning rate is small because training is chaotic:
at 0.02 the first five updates agree to 1e-6 as well, but rounding has grown to 3e-2 of the loss by the twentieth.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import ROOT, build_parser, case, child_environment, rank_environments, read_options, write_report
from utils.errors import one_line_errors
from utils.launch import launch_command

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
PLAN = {
    "width": 8,
    "input_size": 64,
    "embedding_size": 128,
    "num_classes": 500,
    "global_batch": 16,
    "s": 64.0,
    "m": 0.5,
    "weight_decay": 5e-4,
    "clip_norm": 5.0,
}


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
    (folder / "plan.json").write_text(
        json.dumps({**PLAN, "lr": [schedule(step) for step in range(steps)], "base_lr": lr})
    )


def run_ours(folder: Path) -> None:
    """A rank of ours (under the launcher or alone): writes ``init_<ranks>.npz`` and ``ours_<ranks>.json``."""
    import paddle

    import train
    from config import load_config
    from utils import distributed
    from utils.weights.states import torch_spelling

    distributed.init("cpu")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    plan = json.loads((folder / "plan.json").read_text())
    path = folder / f"config_{world_size}_{rank}.yaml"
    size = plan["global_batch"] // world_size
    values = {"lr": plan["base_lr"], "steps": len(plan["lr"]), "batch": size, "output": folder / f"run_{world_size}"}
    path.write_text(CONFIG.format(**plan | values))
    run = train.build(load_config(path))
    weight = np.concatenate(distributed.all_gather_object(run.head.export_weight()))
    if rank == 0:
        np.savez(folder / f"init_{world_size}.npz", **torch_spelling(run.replica.backbone), **{"head.weight": weight})
    images, labels = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    losses = []
    for step, lr in enumerate(plan["lr"]):
        first = step * plan["global_batch"] + rank * size
        image = images[first : first + size].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        batch = paddle.to_tensor(image), paddle.to_tensor(labels[first : first + size])
        losses.append(train.update(run, [batch], lr).loss)
        run.progress.step += 1
    run.log.close()
    if rank == 0:
        (folder / f"ours_{world_size}.json").write_text(json.dumps(losses))


def compare(folder: Path, num_ranks: int) -> dict:
    """Both sides on so many ranks; the case for the report."""
    ours = [sys.executable, __file__, "--child", str(folder)]
    if num_ranks > 1:
        ours = launch_command(num_ranks, __file__, ["--child", folder], folder / "log")
    _run(ours, [child_environment(threads=1)])
    _run([sys.executable, str(ROOT / "benchmarks" / "peer_train.py"), str(folder)], rank_environments(num_ranks))
    ours, peer = (np.array(json.loads((folder / f"{side}_{num_ranks}.json").read_text())) for side in ("ours", "peer"))
    relative = np.abs(ours - peer) / np.abs(peer)
    found = case(
        f"parity/loss/{num_ranks}",
        "final_loss",
        ours.tolist(),
        peer.tolist(),
        "pytorch",
        smaller=True,
        middle=lambda losses: losses[-1],
        steps=len(relative),
        first_loss=float(ours[0]),
        max_relative_difference=float(relative.max()),
        at_step=int(relative.argmax()) + 1,
    )
    print(
        f"  largest relative difference {found['max_relative_difference']:.2e} at step {found['at_step']} of "
        f"{found['steps']} ({'within' if found['max_relative_difference'] <= BOUND else 'ABOVE'} {BOUND:g})",
        flush=True,
    )
    return found | {"runs": 1}


def _run(command: list[str], environments: list[dict[str, str]]) -> None:
    """Start a process for each environment, wait for all; their output only if one fails."""
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for environment in environments
    ]
    outputs = [child.communicate()[0] for child in started]
    if any(child.returncode for child in started):
        raise SystemExit("\n".join(output[-3000:] for output in outputs))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = read_options(parser, argv)
    if args.child:
        run_ours(args.child)
        return
    with tempfile.TemporaryDirectory(prefix="parity_") as name:
        prepare(Path(name), args.steps, args.lr)
        cases = [compare(Path(name), num_ranks) for num_ranks in args.ranks]
    write_report(args.json, cases, "one thread a rank")
    if any(found["max_relative_difference"] > BOUND for found in cases):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
