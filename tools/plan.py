"""Memory of each rank and bytes moved per step, before a run is started.

    python tools/plan.py --classes 10000000 --gpus 8 --batch 128 --sample-rate 0.1 --backbone iresnet100

The backbone's share is not guessed: a child process runs its training step on CPU with a few images, and its need is
extended to the batch, so any backbone of the registry works. The head's share follows from what ``partial_fc.py`` keeps
(docs/partial_fc.md lists it). A warning is printed if a rank needs more than ``--memory`` GiB, by default what this
machine has free, shared by its ranks.

``--device cpu`` predicts the peak of the whole process, allocator slack included, and is checked against measured peaks
(tests/test_plan.py). ``--device gpu`` counts allocated tensors; the CUDA context and cuDNN workspaces come on top. It
has not been checked on a GPU. ``--recompute`` is measured like everything else; ``--precision fp16`` or ``bf16`` (GPU
only) counts activations at two bytes and adds the copy of the weights that ``auto_cast`` makes.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paddle
from paddle.base import core

from backbones import build_backbone
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.head.kernel import takes_numba
from utils.system import available_memory, peak_bytes, reset_peak

GIB = 2**30
FLOAT = 4
# Beside what is counted: buffers of BLAS and thread arenas of the head, measured with benchmarks/head.py on CPU.
CPU_OVERHEAD = 24 * 2**20
NUMBA_MEMORY = 125 * 2**20  # itself and what it compiled
PROBES = (2, 6)  # images of the two measured steps
CHUNK_ROWS = {"cpu": 4096, "gpu": 16384}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What decides the memory of a run. ``batch``: samples a rank and micro-batch; ``ranks``: W."""

    classes: int
    ranks: int
    batch: int
    sample_rate: float
    backbone: str
    embedding_size: int = 512
    accumulate: int = 1
    optimizer: str = "sgd"
    device: str = "gpu"
    threads: int = 2
    precision: str = "fp32"
    recompute: bool = False

    def __post_init__(self):
        check_ranges(self, batch=POSITIVE, accumulate=POSITIVE, embedding_size=(1, 65536))
        if self.ranks < 1:
            raise UserError(f"--gpus {self.ranks}: must be at least 1")
        if self.classes < self.ranks:
            raise UserError(f"--classes: {self.classes} cannot be split over {self.ranks} ranks")
        if not 0 <= self.sample_rate <= 1:
            raise UserError(f"--sample-rate: {self.sample_rate} must lie in [0, 1]")
        if self.precision != "fp32" and self.device == "cpu":
            raise UserError(f"--precision: {self.precision} with --device cpu, where Paddle computes in fp32; use fp32")


@dataclasses.dataclass(frozen=True)
class BackboneFacts:
    """Bytes of a backbone: parameters, buffers, and what a step of B images needs, ``fixed + per_image * B``."""

    parameters: int
    buffers: int
    fixed: int
    per_image: int


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--gpus", dest="ranks", type=int, default=1, help="ranks, one per device")
    parser.add_argument("--batch", type=int, default=128, help="samples a rank and micro-batch")
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--backbone", default="iresnet50")
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches an update")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the backbone")
    parser.add_argument("--recompute", action="store_true", help="model.recompute=true: activations computed again")
    parser.add_argument("--memory", type=float, help="GiB a rank may use")
    parser.add_argument("--json", type=Path, help="write the figures here, in bytes")
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--probe"]:
        probe(arguments[1], int(arguments[2]), arguments[3], recompute=arguments[4] == "recompute")
        return
    args = parser.parse_args(arguments)
    check_ranges(args, memory=COUNT)
    run(args)


def run(args: argparse.Namespace) -> None:
    setup = Setup(**{name: value for name, value in vars(args).items() if name not in ("memory", "json")})
    facts = measure_backbone(setup.backbone, setup.embedding_size, setup.device, recompute=setup.recompute)
    memory, moved = predict_memory(setup, facts), predict_traffic(setup, facts)
    available = args.memory * GIB if args.memory else available_memory(setup.device, setup.ranks)
    local, sampled = head_rows(setup)
    print(f"{setup.classes:,} classes on {setup.ranks} ranks: {local:,} rows each, {sampled:,} of them in an update")
    for title, part in (("memory of a rank", memory), ("moved by a rank per update", moved)):
        print(f"\n{title}")
        for name, size in part.items():
            print(f"  {name:<42} {size / GIB:9.3f} GiB")
        print(f"  {'total':<42} {sum(part.values()) / GIB:9.3f} GiB")
    total = sum(memory.values())
    if args.json:
        args.json.write_text(json.dumps({"memory": memory, "moved": moved, "total": total}, indent=1) + "\n")
    if available is not None and total > available:
        print(
            f"\nwarning: a rank needs {total / GIB:.1f} GiB and has {available / GIB:.1f}; lower --batch or "
            "--sample-rate, use more ranks, or turn recomputation on",
            file=sys.stderr,
        )


def head_rows(setup: Setup) -> tuple[int, int]:
    """(rows of the largest shard, rows of one update), the positives of the batch within the quota or beyond it."""
    local = -(-setup.classes // setup.ranks)
    samples = setup.batch * setup.ranks * setup.accumulate
    positives = min(local, -(-samples // setup.ranks))
    return local, max(int(setup.sample_rate * local), positives)


def predict_memory(setup: Setup, facts: BackboneFacts) -> dict[str, int]:
    """Bytes at the peak of a training step on one rank, by what holds them."""
    local, sampled = head_rows(setup)
    dim, samples = setup.embedding_size, setup.batch * setup.ranks
    slots = 2 if setup.optimizer == "adamw" else 1
    half = setup.precision != "fp32"
    # Exponentials are kept until they would cost more than row gradients (``PartialFC._keep``).
    kept = min(setup.accumulate, max(dim // samples, 0))
    folded = setup.accumulate > kept
    logits = sampled * samples * FLOAT * (1 if folded and kept == 0 else min(setup.accumulate, kept + folded))
    # Beside the exponentials: on CPU a chunk's weights and gradient, on GPU every temporary of a pass over it.
    floats_a_row = 2 * dim if setup.device == "cpu" else 4 * dim + 2 * samples
    chunk = min(CHUNK_ROWS[setup.device], sampled) * floats_a_row * FLOAT
    workers = setup.threads if setup.device == "cpu" else 1
    indices = 0 if setup.sample_rate == 1 else 2 * 8 * sampled + 2 * local
    return {
        "backbone weights and buffers": facts.parameters + facts.buffers + (facts.parameters // 2 if half else 0),
        "backbone optimiser": slots * facts.parameters,
        "backbone gradients and activations": facts.fixed + facts.per_image * setup.batch // (2 if half else 1),
        "images": 3 * 112 * 112 * setup.batch * FLOAT * setup.accumulate,
        "class weights": local * dim * FLOAT,
        "class optimiser": slots * local * dim * FLOAT + local * FLOAT,
        "logits": logits,
        "class gradients": sampled * dim * FLOAT if folded else 0,
        "embeddings of all ranks": 6 * samples * dim * FLOAT,
        "chunks in work, ids": workers * chunk + indices,
        # Where not all rows take part a GPU works on copies of those that do (utils/head/paddle_kernel.py).
        "copies of class rows": 0
        if setup.device == "cpu" or setup.sample_rate == 1
        else (1 + slots) * sampled * dim * FLOAT,
        "overhead of the process": CPU_OVERHEAD if setup.device == "cpu" else 0,
        "numba": NUMBA_MEMORY if setup.device == "cpu" and takes_numba(setup.classes) else 0,
    }


def predict_traffic(setup: Setup, facts: BackboneFacts) -> dict[str, int]:
    """Bytes that one rank sends per update, with ring collectives: gather (W-1)/W, all-reduce twice that."""
    share = (setup.ranks - 1) / setup.ranks
    samples, dim = setup.batch * setup.ranks * setup.accumulate, setup.embedding_size
    return {
        "backbone gradients (all-reduce)": int(2 * share * facts.parameters),
        "embeddings (all-gather)": int(share * samples * dim * FLOAT),
        "embedding gradients (reduce-scatter)": int(share * samples * (dim + 1) * FLOAT),
        "softmax maximum, sum, target (all-gather)": int(share * setup.ranks * 3 * samples * FLOAT),
        "labels (all-gather)": int(2 * share * samples * 8),
    }


def measure_backbone(name: str, embedding_size: int, device: str, recompute: bool = False) -> BackboneFacts:
    """Run training steps of few images in a child process and read what they took.

    Args:
        device: ``cpu`` reads the peak of the process, ``gpu`` Paddle's count of allocated bytes (taken on CPU as well).
    """
    options = {"recompute": True} if recompute else {}
    build_backbone(name, embedding_size=embedding_size, **options)  # a wrong name ends here, with its message
    words = [name, str(embedding_size), device, "recompute" if recompute else "keep"]
    command = [sys.executable, "-W", "ignore", __file__, "--probe", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"--backbone {name}: its training step failed: {done.stderr.strip().splitlines()[-1]}")
    return BackboneFacts(**json.loads(done.stdout.splitlines()[-1]))


def probe(name: str, embedding_size: int, device: str, recompute: bool) -> None:
    """The child's part: prints ``BackboneFacts`` as JSON."""
    paddle.set_device("cpu")
    base = reset_peak()
    backbone = build_backbone(name, embedding_size=embedding_size, **({"recompute": True} if recompute else {}))
    backbone.train()
    optimizer = paddle.optimizer.Momentum(0.0, 0.9, backbone.parameters())
    parameters = sum(each.size * FLOAT for each in backbone.parameters())
    buffers = sum(each.size * FLOAT for each in backbone.buffers())
    peaks = {}
    for batch in PROBES:
        for _ in range(2):
            start = core.host_memory_stat_current_value("Allocated", 0)
            core.host_memory_stat_reset_peak_value("Allocated", 0)
            size = getattr(backbone, "input_size", 112)
            backbone(paddle.zeros([batch, 3, size, size])).sum().backward()
            optimizer.step()
            optimizer.clear_grad(set_to_zero=False)
        if device == "cpu":
            peaks[batch] = peak_bytes() - base - 2 * parameters - buffers
        else:
            peaks[batch] = core.host_memory_stat_peak_value("Allocated", 0) - start
    few, many = PROBES
    per_image = (peaks[many] - peaks[few]) // (many - few)
    facts = {"parameters": parameters, "buffers": buffers}
    print(json.dumps({**facts, "fixed": peaks[few] - few * per_image, "per_image": per_image}))


if __name__ == "__main__":
    main()
