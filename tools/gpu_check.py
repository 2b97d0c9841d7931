"""What a person with GPUs runs once (`make gpu-check`): are the GPU paths right, and how fast; one JSON to send back.

    python tools/gpu_check.py --output gpu_check.json

Checks, each in a child process: a step on the GPU against the CPU (float32); bf16 and fp16 steps against float32; an
fp16 overflow is seen; with two GPUs or more, two ranks under NCCL against two under gloo on CPU, and those against one.
Then images a second and peak memory of whole updates, beside `tools/plan.py`'s estimate. Nothing is changed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import paddle  # noqa: E402

from backbones import build_backbone  # noqa: E402
from losses import build_margin  # noqa: E402
from partial_fc import PartialFC  # noqa: E402
from utils import distributed  # noqa: E402
from utils.errors import UserError, one_line_errors  # noqa: E402
from utils.model.optimizer import BackboneOptimizer, clip_coefficient, gradient_norm, trainable  # noqa: E402
from utils.model.precision import autocast  # noqa: E402
from utils.model.replica import Replica  # noqa: E402
from utils.system import peak_memory_mb  # noqa: E402

CLASSES, DIM, BATCH, SIZE = 1000, 128, 16, 64
# name: (device, ranks, precision, loss scale), reference, largest relative difference of loss and of gradient
CASES = {
    "gpu_fp32": (("gpu", 1, "fp32", 1.0), "cpu_fp32", 1e-3, 2e-2),
    "gpu_bf16": (("gpu", 1, "bf16", 1.0), "gpu_fp32", 0.05, 0.4),
    "gpu_fp16": (("gpu", 1, "fp16", 1024.0), "gpu_fp32", 0.02, 0.1),
    "gloo_2": (("cpu", 2, "fp32", 1.0), "cpu_fp32", 1e-3, 2e-2),
    "nccl_2": (("gpu", 2, "fp32", 1.0), "gloo_2", 1e-3, 2e-2),
}


def run_step(out: Path, precision: str, scale: float) -> None:
    """A rank's step from fixed weights on its share of a fixed batch; rank 0 writes loss, gradient and finiteness."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    rng, share = np.random.default_rng(0), BATCH // world_size
    images = rng.normal(size=(BATCH, 3, SIZE, SIZE)).astype(np.float32)[rank * share : (rank + 1) * share]
    labels = rng.integers(0, CLASSES, BATCH)[rank * share : (rank + 1) * share]
    backbone = build_backbone("iresnet18", width=16, input_size=SIZE, embedding_size=DIM)
    weights = np.random.default_rng(1)  # not Paddle's generator: its numbers differ between devices
    for _, tensor in sorted(backbone.state_dict().items()):
        if tensor.ndim > 1:
            fan_in = np.prod(tensor.shape[1:])
            tensor.set_value((weights.normal(size=tensor.shape) / np.sqrt(fan_in)).astype(np.float32))
    backbone.eval()  # running statistics: a batch's gradient is then the mean of its parts'
    replica = Replica(backbone)
    head = PartialFC(CLASSES, DIM, build_margin("arcface"), 1.0, rank, world_size, seed=7)
    parameters = trainable(backbone)
    with replica.micro_batch(last=True):
        with autocast(precision):
            embedding = replica(paddle.to_tensor(images))
        loss = head(embedding, paddle.to_tensor(labels))
        (loss * scale).backward()
    norm = gradient_norm(list(parameters.values()), scale)
    (broken,) = distributed.agree(not np.isfinite(norm) or head.found_nonfinite())
    gradients = [parameters[name].grad for name in sorted(parameters)]
    flat = np.concatenate([g.astype("float32").numpy().ravel() / scale for g in gradients if g is not None])
    if rank == 0:
        np.savez(out, loss=float(loss), gradient=flat, finite=not broken)


def run_speed(out: Path, network: str, batch: int, precision: str, sample_rate: float, updates: int = 20) -> None:
    """Images a second and peak memory of whole updates on all ranks."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    backbone = build_backbone(network)
    replica = Replica(backbone)
    head = PartialFC(85742, 512, build_margin("arcface"), sample_rate, rank, world_size, seed=7)
    optimizer = BackboneOptimizer(trainable(backbone))
    image = paddle.randn([batch, 3, 112, 112])
    labels = np.random.default_rng(rank).integers(0, 85742, (updates + 3, batch))
    for step in range(updates + 3):
        if step == 3:
            paddle.device.synchronize()
            began = time.perf_counter()
        with autocast(precision):
            embedding = replica(image)
        head(embedding, paddle.to_tensor(labels[step])).backward()
        norm = gradient_norm(list(optimizer.parameters.values()))
        optimizer.step(0.01, clip_coefficient(norm, 5.0))
        head.step(0.01)
        optimizer.clear_grad()
    paddle.device.synchronize()
    figures = {"images_s": updates * batch * world_size / (time.perf_counter() - began), "peak_mb": peak_memory_mb()}
    if rank == 0:
        out.write_text(json.dumps(figures))


def launch(folder: Path, device: str, num_ranks: int, out: Path, *words) -> str | None:
    """A child on so many ranks; the end of its output if it failed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    if device == "cpu":
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
    start = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(num_ranks), "--log_dir", str(folder / "log")]
    words = ["--child", device, str(out), *map(str, words)]
    command = [sys.executable, *(start if num_ranks > 1 else []), __file__, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]


def run_checks(folder: Path, names: list[str]) -> dict:
    """Differences of each case from its reference."""
    found, report = {}, {}

    def step(name: str, case: tuple) -> str | None:
        device, num_ranks, precision, scale = case
        out = folder / f"{name}.npz"
        problem = launch(folder, device, num_ranks, out, "step", precision, scale)
        if problem is None:
            found[name] = dict(np.load(out))
        return problem

    problem = step("cpu_fp32", ("cpu", 1, "fp32", 1.0))
    if problem:
        raise UserError(f"the reference step on CPU failed: {problem}")
    for name in names:
        case, reference, loss_bound, gradient_bound = CASES[name]
        problem = step(name, case)
        if problem or reference not in found:
            report[name] = {"passed": False, "problem": problem or f"no {reference}"}
            continue
        ours, theirs = found[name], found[reference]
        loss = float(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]))
        scale = np.linalg.norm(theirs["gradient"])
        gradient = float(np.linalg.norm(ours["gradient"] - theirs["gradient"]) / scale)
        good = bool(ours["finite"]) and loss <= loss_bound and gradient <= gradient_bound
        report[name] = {"reference": reference, "loss": loss, "gradient": gradient, "passed": good}
    if any(name.startswith("gpu") for name in names):
        problem = step("overflow", ("gpu", 1, "fp16", 1e30))
        seen = problem is None and not bool(found["overflow"]["finite"])
        report["fp16_overflow_is_seen"] = {"passed": seen, "problem": problem}
    return report


def run_speeds(folder: Path, network: str, batch: int, num_gpus: int) -> list[dict]:
    """Throughput and memory, one GPU and all, beside the planner."""
    cases = []
    for num_ranks in sorted({1, num_gpus}):
        for precision, rate in (("fp32", 1.0), ("bf16", 1.0), ("bf16", 0.1)):
            out = folder / "speed.json"
            case = {"network": network, "batch": batch, "gpus": num_ranks, "precision": precision, "sample_rate": rate}
            problem = launch(folder, "gpu", num_ranks, out, "speed", network, batch, precision, rate)
            case |= {"problem": problem} if problem else json.loads(out.read_text())
            plan = [sys.executable, str(ROOT / "tools" / "plan.py"), "--classes", "85742", "--gpus", str(num_ranks)]
            plan += ["--batch", str(batch), "--sample-rate", str(rate), "--backbone", network]
            done = subprocess.run(
                [*plan, "--json", str(folder / "plan.json")], cwd=ROOT, capture_output=True, check=False
            )
            case["plan"] = json.loads((folder / "plan.json").read_text()) if done.returncode == 0 else None
            cases.append(case)
            print(case, flush=True)
    return cases


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--network", default="iresnet50", help="of the throughput runs")
    parser.add_argument("--batch", type=int, default=128, help="of the throughput runs, a GPU")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        device, out, kind, *words = args.child
        distributed.init(device)
        if kind == "step":
            run_step(Path(out), words[0], float(words[1]))
        else:
            run_speed(Path(out), words[0], int(words[1]), words[2], float(words[3]))
        return
    cuda = paddle.device.is_compiled_with_cuda()
    num_gpus = paddle.device.cuda.device_count() if cuda else 0
    if num_gpus == 0:
        built = f"paddle {paddle.__version__}, built with CUDA: {cuda}"
        raise UserError(f"no usable GPU ({built}); install paddlepaddle-gpu on a machine with one")
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        names = [case for case in CASES if num_gpus > 1 or CASES[case][0][1] == 1]
        report = {
            "paddle": paddle.__version__, "python": platform.python_version(), "gpus": num_gpus,
            "gpu": paddle.device.cuda.get_device_name(), "cuda": paddle.version.cuda(), "cudnn": paddle.version.cudnn(),
            "checks": run_checks(Path(name), names),
            "throughput": run_speeds(Path(name), args.network, args.batch, num_gpus),
        }  # fmt: skip
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name, found in report["checks"].items():
        print(f"{'ok  ' if found['passed'] else 'FAIL'} {name} {found}")
    print(f"written to {args.output}; please send it back")
    if not all(found["passed"] for found in report["checks"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
