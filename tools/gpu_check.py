"""What a person with GPUs runs once (`make gpu-check`): are the GPU paths right, and how fast; one JSON to send back.

    python tools/gpu_check.py --output gpu_check.json     # on a machine with GPUs; ends within --minutes (20)
    python tools/gpu_check.py --device cpu                # the same code on the CPU in a small form, in a minute or two

First, is it right: three whole updates of ``train.py`` (synthetic faces, head in several chunks, 0.3 of the classes)
against the CPU, then every product type of the head, fp16, bf16, NHWC, compiled, recomputed, two ranks and
SyncBatchNorm against float32; class rows, their momentum, backbone, its momentum and running statistics are compared,
each relative to what training changed. An fp16 overflow must be skipped, a resume must end in the same bits.

Then, how fast: the head alone, and ``train.py`` with its loader for whole networks, peak memory beside the planner's,
one profile. Every result is written as it comes; what takes too long or breaks is a result too.
"""

import argparse
import contextlib
import json
import math
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import paddle
import yaml
from prettytable import PrettyTable
from safetensors.numpy import load_file

from backbones import build_backbone
from losses import build_margin
from partial_fc import PartialFC
from tools.doctor import failing_operation
from utils import distributed
from utils.errors import CommandLine, UserError, one_line_errors
from utils.files import file_digest, write_json
from utils.launch import launch_command, rank_environment
from utils.run.checkpoint import list_checkpoints, read_meta
from utils.system import BF16_CAPABILITY, device_counts, gpu_capability, peak_memory_mb, pick_device
from utils.weights.states import save_pdparams

ROOT = Path(__file__).resolve().parent.parent
SEED = 7
# arcface_torch, 8 x V100 32 GB, its docs/speed_benchmark: identities -> images/s of all eight with Partial FC 0.1.
PUBLISHED = {125_000: 5004, 1_400_000: 4738, 5_500_000: 3975, 8_000_000: 3565, 29_000_000: 1855}


@dataclass(frozen=True)
class Sizes:
    """How large the networks and heads are: ``FULL`` for GPUs, ``SMALL`` for a look at the same code on the CPU."""

    classes: int
    chunk: int
    width: int
    input_size: int
    batch: int
    head_classes: tuple[int, ...]  # of one rank
    head_samples: int
    speeds: tuple[tuple[str, dict], ...]  # name, settings
    speed_classes: int
    speed_batch: int
    speed_updates: int


FULL = Sizes(
    classes=3000,
    chunk=1000,
    width=16,
    input_size=64,
    batch=16,
    head_classes=(85_742, 1_000_000, 2_000_000, 1_250_000),
    head_samples=1024,
    speeds=(("iresnet50", {}), ("iresnet100", {})),
    speed_classes=85_742,
    speed_batch=128,
    speed_updates=60,
)
SMALL = Sizes(
    classes=90,
    chunk=30,
    width=8,
    input_size=32,
    batch=8,
    head_classes=(1000,),
    head_samples=32,
    speeds=(("iresnet18", {"model.width": 8, "model.input_size": 32}),),
    speed_classes=500,
    speed_batch=8,
    speed_updates=4,
)


@dataclass(frozen=True)
class Case:
    """A training of ``train.py`` and what it is held against: the largest relative differences that pass."""

    settings: dict = field(default_factory=dict)
    ranks: int = 1
    reference: str = "fp32"
    bounds: tuple[float, float] = (1e-3, 0.05)  # of the losses; of everything that training changed


def dotted(section: str, **values: object) -> dict[str, object]:
    """Settings of one section of the configuration, under their dotted names."""
    return {f"{section}.{key}": value for key, value in values.items()}


def cases_of(accelerator: bool, capability: tuple[int, int] | None, num_devices: int) -> dict[str, Case]:
    """By name, in the order of their weight, the references first."""
    # No batch norm in train mode and nothing random: two ranks compute what one does.
    whole = dotted("model", network="vit_t", width=64, input_size=36, mask_ratio=0.0, drop_path=0.0)
    whole |= {"init.freeze": ["feature"], "head.sample_rate": 1.0}
    cases = {"fp32": Case(reference="cpu")}
    if accelerator:
        cases |= {
            "head tf32": Case({"head.matmul_dtype": "tf32"}, bounds=(0.01, 0.2)),
            "head bf16": Case({"head.matmul_dtype": "bf16"}, bounds=(0.05, 0.5)),
            "fp16": Case({"run.precision": "fp16", "run.loss_scale": 1024.0}, bounds=(0.02, 0.3)),
        }
        if capability is None or capability >= BF16_CAPABILITY:
            cases["bf16"] = Case({"run.precision": "bf16"}, bounds=(0.1, 0.8))
    if not (accelerator and paddle.__version__.startswith("2.")):
        cases["compiled"] = Case({"run.compile": True})
    cases |= {
        "recomputed": Case({"model.recompute": True}),
        "NHWC": Case({"model.data_format": "NHWC"}),
        "accumulated": Case({"run.batch_size": 0, "run.accumulation": 2}, reference="accumulated, cpu"),
    }
    if num_devices > 1:
        cases["one rank"] = Case(whole, reference="")
        cases["two ranks"] = Case({**whole, "run.batch_size": 0}, ranks=2, reference="one rank")
        if accelerator:
            # Each rank's half of the batch, statistics over both: what one rank with the whole batch does, but for the
            # norm of the embeddings, which is not synchronised and therefore held still.
            still = {"head.sample_rate": 1.0, "init.freeze": ["features"]}
            cases["sync_bn"] = Case({**still, "run.sync_bn": True, "run.batch_size": 0}, 2, "rate 1")
            cases["rate 1"] = Case(still, reference="")
    return cases


class Checker:
    """Runs the cases one after the other and writes the report after each."""

    def __init__(self, device: str, sizes: Sizes, folder: Path, output: Path, minutes: float):
        self.device, self.sizes, self.folder, self.output = device, sizes, folder, output
        self.stop = time.monotonic() + 60 * minutes
        versions = {"paddle": paddle.__version__, "python": platform.python_version(), "device": device}
        libraries = {"cuda": str(paddle.version.cuda()), "cudnn": str(paddle.version.cudnn())}
        self.report = {**versions, **libraries, "checks": {}, "speeds": {}}
        self.runs: dict[str, Path] = {}
        self.rows_CD = self.backbone = None

    def note(self, part: str, name: str, work: Callable[[], dict]) -> dict:
        """Do one piece of work; its figures, or what went wrong, go into the report at once."""
        began = time.monotonic()
        if began >= self.stop:
            found = {"passed": None, "problem": "not run: out of time (--minutes)"}
        else:
            try:
                found = work()
            except subprocess.TimeoutExpired as error:
                found = {"passed": False, "problem": f"no end after {error.timeout:.0f} s"}
            except (UserError, OSError) as error:
                found = {"passed": False, "problem": " ".join(str(error).split())[-400:]}
        found["seconds"] = round(time.monotonic() - began, 1)
        self.report[part][name] = found
        write_json(self.output, self.report)
        status = {True: "ok  ", False: "FAIL", None: "    "}[found.get("passed")]
        figures = [(key, value) for key, value in found.items() if key != "passed"]
        told = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures]
        print(f"{status} {name}: {', '.join(told)}", flush=True)
        return found

    # ------------------------------------------------------------------ is it right

    def prepare(self) -> None:
        """Weights that every run starts from: not Paddle's generator, whose numbers differ between devices."""
        size = self.sizes
        layers = {
            "iresnet18": {"width": size.width, "input_size": size.input_size, "embedding_size": 128},
            "vit_t": {"width": 64, "input_size": 36, "embedding_size": 128},
        }
        self.start = {}
        rng = np.random.default_rng(SEED)
        for network, options in layers.items():
            layer = build_backbone(network, **options)
            state = {name: np.array(value.numpy()) for name, value in layer.state_dict().items()}
            for name, value in sorted(state.items()):
                if value.ndim > 1:
                    fan_in = max(1, math.prod(value.shape[1:]))
                    state[name] = (rng.normal(size=value.shape) / math.sqrt(fan_in)).astype(np.float32)
            save_pdparams(self.folder / f"{network}.pdparams", state)
            self.start[network] = state
        head = PartialFC(size.classes, 128, build_margin("arcface"), seed=SEED)
        self.rows_CD = head.export_weight()

    def settings(self, name: str, case: Case, device: str, updates: int) -> dict:
        """All settings of the run that ``train.py`` does."""
        size = self.sizes
        output = str(self.folder / name.replace(" ", "_"))
        chosen = {
            **dotted("data", kind="synthetic", num_classes=size.classes, num_images=64 * size.batch),
            **dotted("model", network="iresnet18", width=size.width, input_size=size.input_size, embedding_size=128),
            **dotted("head", sample_rate=0.3, chunk=size.chunk),
            **dotted("run", seed=SEED, batch_size=size.batch, max_steps=updates, precision="fp32"),
            **dotted("run", device=device, output=output),
            "optim.lr": 0.02,
            "schedule.name": "constant",
            "verify.every_steps": 0,
            **dotted("log", every_steps=1, tensorboard=False),
            **dotted("checkpoint", every_steps=0, asynchronous=False),
            **case.settings,
        }
        if not chosen["run.batch_size"]:  # 0 stands for the whole batch shared out
            shares = case.ranks * chosen.get("run.accumulation", 1)
            chosen["run.batch_size"] = size.batch // shares
        chosen["init.backbone"] = str(self.folder / f"{chosen['model.network']}.pdparams")
        return chosen

    def write_config(self, name: str, settings: dict) -> Path:
        """A configuration file of dotted settings."""
        tree: dict = {}
        for key, value in settings.items():
            section, leaf = key.split(".")
            tree.setdefault(section, {})[leaf] = value
        path = self.folder / f"{name.replace(' ', '_')}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def train(self, name: str, settings: dict, ranks: int = 1, *words: str) -> Path:
        """A run of ``train.py``; returns its folder. UserError holds the end of what a failing one printed."""
        command = [str(ROOT / "train.py"), str(self.write_config(name, settings)), *words]
        run_child(command, self.folder, settings["run.device"], ranks, self.left())
        return Path(settings["run.output"])

    def left(self) -> float:
        """Seconds that a child may take."""
        return max(10.0, min(600.0, self.stop - time.monotonic()))

    def run_case(self, name: str, case: Case, device: str, updates: int = 3) -> Path:
        """The case's run, made once."""
        if name not in self.runs:
            self.runs[name] = self.train(name, self.settings(name, case, device, updates), case.ranks)
        return self.runs[name]

    def judge(self, name: str, case: Case, cases: dict[str, Case]) -> dict:
        """Train, and compare with the reference."""
        ours = self.run_case(name, case, self.device)
        if not case.reference:
            return {"passed": True}
        device = self.device if case.reference in cases else "cpu"
        reference = self.run_case(case.reference, cases.get(case.reference, case), device)
        found = self.compare(ours, reference, case.settings.get("model.network", "iresnet18"))
        worst = max(value for key, value in found.items() if key != "loss")
        passed = found["loss"] <= case.bounds[0] and worst <= case.bounds[1]
        return {"passed": passed, "against": case.reference, **found}

    def compare(self, ours: Path, theirs: Path, network: str) -> dict[str, float]:
        """Relative differences: of the losses, and of what training changed (in the 2-norm, over what it changed)."""
        mine, other, start = read_run(ours), read_run(theirs), self.start_of(network)
        losses = np.array([mine["losses"], other["losses"]])
        found = {"loss": float(np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[1])))}
        for kind in ("rows", "row momentum", "backbone", "backbone momentum", "statistics"):
            keys = [key for key in other["arrays"] if kind_of(key) == kind]
            change = norm_of([other["arrays"][key] - start.get(key, 0.0) for key in keys])
            difference = norm_of([mine["arrays"][key] - other["arrays"][key] for key in keys])
            if change > 0 or difference > 0:
                found[kind] = difference / max(change, 1e-30)
        return found

    def start_of(self, network: str) -> dict[str, np.ndarray]:
        """What every run of this network started from, named as in ``read_run``."""
        return {"rows": self.rows_CD, **{f"backbone/{key}": value for key, value in self.start[network].items()}}

    def overflow(self) -> dict:
        """A loss scale that no float16 gradient survives: the update is skipped, and nothing changes."""
        case = Case({"run.precision": "fp16", "run.loss_scale": 1e30})
        settings = {**self.settings("overflow", case, self.device, 1), "log.angles": False}
        run = self.train("overflow", settings)
        skips, arrays = read_meta(list_checkpoints(run)[0])["scaler"]["skips"], read_run(run)["arrays"]
        unchanged = all(np.array_equal(arrays[key], value) for key, value in self.start_of("iresnet18").items())
        return {"passed": skips == 1 and unchanged, "skips": skips, "unchanged": unchanged}

    def resume(self) -> dict:
        """Four updates at once, and two and two: the same bits."""
        whole = self.train("resume whole", self.settings("resume whole", Case(), self.device, 4))
        settings = self.settings("resume parts", Case(), self.device, 2)
        self.train("resume parts", settings)
        parts = self.train("resume parts", {**settings, "run.max_steps": 4}, 1, "--resume")
        folders = [list_checkpoints(run)[0] for run in (whole, parts)]
        names = sorted(path.name for path in folders[0].glob("*.safetensors"))
        other = [name for name in names if file_digest(folders[0] / name) != file_digest(folders[1] / name)]
        return {"passed": not other and bool(names), "differ": ", ".join(other) or "none"}

    # ------------------------------------------------------------------ how fast

    def head_speed(self, classes: int, dtype: str) -> dict:
        """Milliseconds an update of the head alone, and its peak memory."""
        out = self.folder / "head.json"
        words = ["--child", "head", self.device, str(out), str(classes), dtype, str(self.sizes.head_samples)]
        run_child([str(Path(__file__).resolve()), *words], self.folder, self.device, 1, self.left())
        return json.loads(out.read_text())

    def speed_settings(self, name: str, network: str, settings: dict, precision: str, ranks: int) -> dict:
        """A run whose speed is of interest."""
        size = self.sizes
        chosen = self.settings(name, Case(), self.device, size.speed_updates)
        for key in ("init.backbone", "model.width", "model.input_size", "head.chunk"):
            del chosen[key]
        num_images = size.speed_batch * ranks * (size.speed_updates + 1)
        return {
            **chosen,
            **dotted("model", network=network, embedding_size=512),
            **dotted("data", num_classes=size.speed_classes, num_images=num_images, num_threads=4),
            **dotted("run", batch_size=size.speed_batch, precision=precision),
            **dotted("log", every_steps=max(1, size.speed_updates // 3), angles=False),
            "head.sample_rate": 0.1,
            **settings,
        }

    def train_speed(self, network: str, settings: dict, precision: str, ranks: int) -> dict:
        """Images a second of ``train.py`` with its loader; peak memory beside the planner's."""
        name = f"speed {network} {precision} {ranks}"
        chosen = self.speed_settings(name, network, settings, precision, ranks)
        run = self.train(name, chosen, ranks)
        last, planned = logged_updates(run)[-1], self.planned(network, chosen, ranks)
        found = {"passed": True, "images_s": last["images_s"], "waiting for data": last["data_wait"]}
        return {**found, "peak_mb": last["memory_mb"], "planned_mb": planned}

    def profile(self, network: str, settings: dict, precision: str) -> dict:
        """The same run inside Paddle's profiler."""
        out = self.output.with_suffix(".profile.txt")
        config = self.write_config("profile", self.speed_settings("profile", network, settings, precision, 1))
        words = ["--child", "profile", self.device, str(out), str(config)]
        run_child([str(Path(__file__).resolve()), *words], self.folder, self.device, 1, self.left())
        return {"passed": True, "written to": str(out)}

    def planned(self, network: str, settings: dict, ranks: int) -> float | str:
        """What ``tools/plan.py`` says for the same run, in MB a rank; its message where it cannot."""
        out = self.folder / "plan.json"
        device = "cpu" if self.device == "cpu" else "gpu"
        words = ["--classes", str(settings["data.num_classes"]), "--gpus", str(ranks), "--backbone", network]
        words += ["--batch", str(settings["run.batch_size"]), "--sample-rate", str(settings["head.sample_rate"])]
        words += ["--device", device, "--precision", settings["run.precision"], "--json", str(out)]
        words += ["--recompute"] if settings.get("model.recompute") else []
        try:
            run_child([str(ROOT / "tools" / "plan.py"), *words], self.folder, "cpu", 1, self.left())
        except UserError as error:
            return str(error)
        return json.loads(out.read_text())["total"] / 2**20


def run_child(command: list[str], folder: Path, device: str, ranks: int, timeout: float) -> None:
    """A Python program on so many ranks; UserError with the end of its output if it fails."""
    words = [sys.executable, *command]
    if ranks > 1:
        words = launch_command(ranks, command[0], command[1:], folder / "log")
    options = {"cwd": ROOT, "env": rank_environment(device), "timeout": timeout}
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        text = (done.stdout + done.stderr).strip() or f"status {done.returncode}, no output"
        raise UserError(f"{' '.join(command[:2])} ended with status {done.returncode}: {text[-600:]}")


def kind_of(key: str) -> str:
    """Which part of a run an array of ``read_run`` belongs to."""
    if key.startswith("backbone/"):
        return "statistics" if key.endswith(("._mean", "._variance")) else "backbone"
    return {"rows": "rows", "row momentum": "row momentum"}.get(key, "backbone momentum")


def read_run(run: Path) -> dict:
    """Losses of a run and the arrays of its last checkpoint, class rows joined."""
    folder = list_checkpoints(run)[0]
    shards = [load_file(path) for path in sorted(folder.glob("head_*.safetensors"))]
    arrays = {f"backbone/{key}": value for key, value in load_file(folder / "backbone.safetensors").items()}
    arrays |= load_file(folder / "optimizer.safetensors")
    arrays["rows"] = np.concatenate([shard["rows/weight"] for shard in shards])
    arrays["row momentum"] = np.concatenate([shard["rows/momentum"] for shard in shards])
    return {"losses": [row["loss"] for row in logged_updates(run)], "arrays": arrays}


def logged_updates(run: Path) -> list[dict]:
    """The lines of a run's updates."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def norm_of(arrays: list[np.ndarray]) -> float:
    """2-norm of all values."""
    return math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in arrays))


def time_head(device: str, out: Path, classes: int, dtype: str, samples: int, updates: int = 10) -> None:
    """The child's part of ``Checker.head_speed``."""
    distributed.init(device)
    head = PartialFC(classes, 512, build_margin("arcface"), 1.0, seed=SEED, matmul_dtype=dtype)
    rng = np.random.default_rng(SEED)
    embedding_BD = paddle.to_tensor(rng.normal(size=(samples, 512)).astype(np.float32), stop_gradient=False)
    labels = rng.integers(0, classes, (updates + 2, samples))
    for step in range(updates + 2):
        if step == 2:
            wait_for(device)
            began = time.perf_counter()
        head(embedding_BD, paddle.to_tensor(labels[step])).backward()
        head.step(0.01)
    wait_for(device)
    milliseconds = 1e3 * (time.perf_counter() - began) / updates
    write_json(out, {"passed": True, "ms": milliseconds, "peak_mb": peak_memory_mb()})


def wait_for(device: str) -> None:
    """Until the device has done all that was launched; the CPU does it at once."""
    if device != "cpu":
        paddle.device.synchronize()


def profile_training(device: str, out: Path, config: str) -> None:
    """``train.py`` as a script inside Paddle's profiler; its tables as text."""
    from paddle import profiler

    targets = [profiler.ProfilerTarget.CPU] + ([profiler.ProfilerTarget.GPU] if device == "gpu" else [])
    sys.argv = ["train.py", config]
    with profiler.Profiler(targets=targets, on_trace_ready=lambda _: None) as measured:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    order = profiler.SortedKeys.GPUTotal if device == "gpu" else profiler.SortedKeys.CPUTotal
    with out.open("w") as file, contextlib.redirect_stdout(file):
        measured.summary(sorted_by=order)


def print_published(checker: Checker) -> None:
    """Our figures beside arcface_torch's, which were taken on other cards: for orientation."""
    table = PrettyTable(["identities", "arcface_torch, 8 x V100, PFC 0.1 (images/s)"])
    table.add_rows([[f"{classes:,}", rate] for classes, rate in PUBLISHED.items()])
    ours = PrettyTable(["ours", "images/s", "peak MB", "planned MB"])
    for name, found in checker.report["speeds"].items():
        if "images_s" in found:
            ours.add_row([name, f"{found['images_s']:.1f}", f"{found['peak_mb']:.0f}", f"{found['planned_mb']:.0f}"])
    print(ours)
    print(table)


def run_all(checker: Checker, num_devices: int) -> None:
    """Every check, then every speed."""
    accelerator, sizes = checker.device != "cpu", checker.sizes
    capability = gpu_capability() if accelerator else None
    checker.report |= {"devices": num_devices, "capability": capability}
    place = checker.device if checker.device == "cpu" else f"{checker.device}:0"

    def smoke() -> dict:
        problem = failing_operation(place)
        return {"passed": problem is None, "problem": problem or "none"}

    checker.note("checks", "smoke", smoke)
    checker.prepare()
    cases = cases_of(accelerator, capability, num_devices)
    for name, case in cases.items():
        checker.note("checks", name, partial(checker.judge, name, case, cases))
    if accelerator:
        checker.note("checks", "fp16 overflow", checker.overflow)
    checker.note("checks", "resume", checker.resume)
    precisions = ("fp16", "bf16") if accelerator else ("fp32",)
    for network, settings in sizes.speeds:
        for ranks in sorted({1, num_devices}):
            for precision in precisions:
                work = partial(checker.train_speed, network, settings, precision, ranks)
                checker.note("speeds", f"train {network} {precision} x{ranks}", work)
    for classes in sizes.head_classes:
        for dtype in ("fp32", "tf32", "bf16") if accelerator else ("fp32",):
            checker.note("speeds", f"head {classes} {dtype}", partial(checker.head_speed, classes, dtype))
    network, settings = sizes.speeds[0]
    checker.note("speeds", "profile", partial(checker.profile, network, settings, precisions[0]))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", default="auto", help="auto (an accelerator must be there), or cpu: the small form")
    parser.add_argument("--minutes", type=float, default=20.0, help="what is not begun by then is reported as not run")
    parser.add_argument("--small", action="store_true", help="the small form on an accelerator too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        kind, device, out, *words = args.child
        if kind == "head":
            time_head(device, Path(out), int(words[0]), words[1], int(words[2]))
        else:
            profile_training(device, Path(out), words[0])
        return
    device = pick_device(args.device)
    if args.device == "auto" and device == "cpu":
        built = f"paddle {paddle.__version__}, built with CUDA: {paddle.device.is_compiled_with_cuda()}"
        raise UserError(f"no usable GPU ({built}); install paddlepaddle-gpu on a machine with one, or --device cpu")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    count = 2 if device == "cpu" else device_counts()[device]
    sizes = SMALL if args.small or device == "cpu" else FULL
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        checker = Checker(device, sizes, Path(folder), args.output, args.minutes)
        run_all(checker, count)
    print_published(checker)
    print(f"written to {args.output}; please send it back")
    if not all(found["passed"] for found in checker.report["checks"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
