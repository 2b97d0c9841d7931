"""Does every kernel that training calls exist in the GPU build of this Paddle? No GPU is needed to ask.

    make gpu-kernels                                   # in an environment of its own, paddlepaddle-gpu 2.6.2
    python tools/gpu_kernels.py --json gpu_kernels.json

Runs training (an update with every part, a resume), embedding and the backbones on the CPU with Paddle's own log of the
kernels it picks, then looks each of them up in the build's kernel registry for the GPU and for the types it was called
with; what runs under ``auto_cast`` must be there in float16 and bfloat16 too. A missing one is named, exit status 1.

What this cannot see: whether a kernel is right, and calls that only an accelerator's branch makes. The head's kernel
for any device and the loader's hand-over are made to take that branch here.
"""

import argparse
import functools
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import CommandLine, UserError, one_line_errors
from utils.files import write_json

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {
    "iresnet18": {"width": 8, "input_size": 32, "embedding_size": 32},
    "mobilefacenet": {"width": 32, "input_size": 32, "embedding_size": 32},
    "vit_t": {"width": 32, "input_size": 36, "embedding_size": 32},
}
HALF = ("float16", "bfloat16")
# Paddle's log at this level has a line for the kernel key that a call asks for, then one with the kernel's name.
LOG_LEVEL = "6"
_KEY = re.compile(r"\] \w+ API kernel key: \[\w+, [^,]+, (\w+)\]")
_NAME = re.compile(r"\] (\w+) kernel: \{")
_REGISTERED = re.compile(r"\((\w+), [^,]*, (\S+)\)")

Kernels = dict[str, set[str]]  # name -> types


def main_settings(folder: Path) -> list[str]:
    """A run of two updates in which every part of training takes part."""
    return [*SETTINGS.split(), f"run.output={folder / 'run'}"]


SETTINGS = """
    data.kind=synthetic data.num_classes=40 data.num_images=64
    model.network=iresnet18 model.width=8 model.input_size=32 model.embedding_size=32
    run.batch_size=4 run.accumulation=2 run.ema=0.9 run.device=cpu run.precision=fp32
    head.sample_rate=0.5 head.chunk=16 schedule.name=constant
    log.every_steps=1 log.tensorboard=false verify.sets=[] checkpoint.asynchronous=false
"""
WORK = {
    "update": ["run.max_steps=2"],
    "resume": ["run.max_steps=4", "checkpoint.resume=latest"],
    "update, adamw": ["run.max_steps=2", "optim.name=adamw", "head.sample_rate=1.0"],
    "update, lars": ["run.max_steps=1", "optim.name=lars", "head.margin.name=magface", "head.margin.m=null"],
    "update, vit": ["run.max_steps=1", "model.network=vit_t", "model.width=32", "model.input_size=36"],
}


def train(settings: list[str]) -> None:
    """``train.py`` as a script, with the head and the loader as on an accelerator."""
    import dataset
    import partial_fc

    build = partial_fc.PartialFC.__init__
    partial_fc.PartialFC.__init__ = functools.partialmethod(build, backend="paddle")
    dataset.build_train_loader = functools.partial(dataset.build_train_loader, flip_on_host=False)
    sys.argv = ["train.py", *settings]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def run_backbones() -> None:
    """Forward and backward of each family: what runs under ``auto_cast``."""
    import paddle

    from backbones import build_backbone

    for name, options in NETWORKS.items():
        layer = build_backbone(name, **options)
        layer.train()
        size = options["input_size"]
        layer(paddle.randn([2, 3, size, size])).sum().backward()


def embed() -> None:
    """Embedding by the dynamic graph, which is what an accelerator without a predictor runs."""
    import numpy as np

    from backbones import build_backbone
    from eval.embed import load_embedder

    embedder = load_embedder(build_backbone("iresnet18", **NETWORKS["iresnet18"]), engine="dynamic")
    embedder(np.zeros((2, 32, 32, 3), np.uint8), flip=True)


def parse_log(text: str) -> Kernels:
    """Kernels and the types they were called with, out of Paddle's log."""
    found: Kernels = {}
    dtype = None
    for line in text.splitlines():
        if match := _KEY.search(line):
            dtype = match[1]
        elif dtype is not None and (match := _NAME.search(line)):
            found.setdefault(match[1], set()).add(dtype)
            dtype = None
    return found


def record(words: list[str]) -> Kernels:
    """Run this file with ``--child words`` and read the kernels out of its log."""
    environment = {**os.environ, "GLOG_v": LOG_LEVEL, "GLOG_logtostderr": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *words]
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    if done.returncode != 0:
        plain = [line for line in text.splitlines() if not re.match(r"[IWE]\d{4} ", line)]
        raise UserError(f"{' '.join(words)}: ended with status {done.returncode}: {' '.join(plain[-2:])[:300]}")
    return parse_log(text)


def registered() -> Kernels:
    """GPU kernels of this build and their types."""
    from paddle.base import core

    found: Kernels = {}
    for name, keys in core._get_registered_phi_kernels().items():
        for key in keys:
            match = _REGISTERED.fullmatch(key)
            if match and match[1] in ("GPU", "GPUDNN", "KPS", "ALL_BACKEND"):
                found.setdefault(name, set()).add(match[2])
    return found


def in_half_precision(kernels: Kernels) -> Kernels:
    """Of what a backbone calls in float32, what ``auto_cast`` (O1) runs in half precision: all but its black list."""
    from paddle.amp import amp_lists

    black = set(amp_lists.FP16_BLACK_LIST) | set(amp_lists.EXTRA_BLACK_LIST)
    plain = {name for name, types in kernels.items() if "float32" in types}
    return {name: set(HALF) for name in plain if name.removesuffix("_grad") not in black | {"gaussian", "uniform"}}


def missing_kernels(needed: Kernels, there: Kernels) -> list[str]:
    """``name (type)`` of each kernel that is not there for the GPU."""
    lacking = []
    for name, types in sorted(needed.items()):
        known = there.get(name, set())
        # A kernel that only passes its input on is registered for any type.
        lacking += [f"{name} ({dtype})" for dtype in sorted(types) if not {dtype, "Undefined(ALL_DTYPE)"} & known]
    return lacking


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = CommandLine(__doc__)
    parser.add_argument("--json", type=Path, help="also write what was called and what is missing here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        kind, *words = args.child
        {"train": lambda: train(words), "backbones": run_backbones, "embed": embed}[kind]()
        return
    import paddle

    if not paddle.device.is_compiled_with_cuda():
        raise UserError(f"paddle {paddle.__version__}: a build without GPU kernels; run make gpu-kernels")
    report, lacking = {}, []
    there = registered()
    with tempfile.TemporaryDirectory(prefix="gpu_kernels_") as name:
        work = {title: ["train", *main_settings(Path(name)), *extra] for title, extra in WORK.items()}
        for title, words in {**work, "embedding": ["embed"], "backbones": ["backbones"]}.items():
            kernels = record(words)
            if title == "backbones":
                half = in_half_precision(kernels)
                kernels = {key: types | half.get(key, set()) for key, types in kernels.items()}
            problems = missing_kernels(kernels, there)
            status = "FAIL" if problems else "ok  "
            print(f"{status} {title}: {len(kernels)} kernels {', '.join(problems)}", flush=True)
            called = {key: sorted(types) for key, types in sorted(kernels.items())}
            report[title] = {"kernels": called, "missing": problems}
            lacking += problems
    if args.json:
        write_json(args.json, {"paddle": paddle.__version__, "cuda": paddle.version.cuda(), "work": report})
    if lacking:
        raise UserError(f"paddle {paddle.__version__} lacks GPU kernels: {', '.join(dict.fromkeys(lacking))}")


if __name__ == "__main__":
    main()
