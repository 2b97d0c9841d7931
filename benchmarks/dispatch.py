"""What an update asks of the host on an accelerator: transfers, reads and calls, counted; and its time beside PyTorch.

    python benchmarks/dispatch.py [--json FILE] [--networks iresnet50] [--classes 85742] [--ranks 1 2] [--rates 1.0 0.1]

``train.train`` itself runs on the test device (``tests/device``), which counts every copy and every kernel: its loop,
its loader and ``update`` as a GPU would see them. All figures are those of one update (the largest of several without a
log line), from one call of ``train.update`` to the next:

    uploads                 copies host to device, with a head of several chunks
    reads                   copies device to host
    calls_outside_backbone  what the device is asked to do (kernels, copies of any direction, collectives) but for the
                            backbone's forward and backward, with a head of one chunk
    calls_per_chunk         how many more calls each further chunk takes

``host_ms`` is the time of an update whose kernels cost little: width 4, 32 pixels, 16 features, the classes of the
case (with ``--classes 1000`` it is Python and the framework alone). It is taken on the CPU with the head's chunked
kernel, one thread a rank, beside ``benchmarks/peer_dispatch.py``: the same network in PyTorch, Partial FC as
arcface_torch has it, SGD, clipping. The sides take turns; the median of all updates counts.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, which has an eval.py as well

from benchmarks.common import ROOT, build_parser, case, read_options, write_report
from utils.errors import one_line_errors
from utils.launch import launch_command

NETWORKS = ("iresnet18", "iresnet50", "iresnet100")  # what the peer has as well
WIDTH, INPUT_SIZE, EMBEDDING_SIZE, BATCH = 4, 32, 16, 4
CHUNKS = 6  # of the count with several chunks
SKIPPED = 3  # updates at the start that are not counted: the first is logged, and momentum comes into being


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = build_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=["iresnet50"], choices=NETWORKS)
    parser.add_argument("--classes", type=int, default=85742)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side of host_ms; 0 leaves it out")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    args = read_options(parser, argv)
    if args.child:
        run_child(args.child[0], Path(args.child[1]), args.settings)
        return
    cases = []
    for network in args.networks:
        for rate in args.rates:
            for num_ranks in args.ranks:
                cases += measure(network, args.classes, rate, num_ranks, args.rounds)
    write_report(args.json, cases, f"{max(args.ranks)} ranks of 1 thread")


def measure(network: str, num_classes: int, rate: float, num_ranks: int, rounds: int) -> list[dict]:
    """All cases of one name; prints them."""
    name = f"dispatch/{network}/{num_classes}/{rate}/{num_ranks}"
    figures = count(network, num_classes, rate, num_ranks)
    print(name, " ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    cases = [{"name": name, "metric": metric, "value": value} for metric, value in figures.items()]
    if rounds:
        sides = {"ours": [], "peer": []}
        for _ in range(rounds):
            for side, found in sides.items():
                found += time_updates(side, network, num_classes, rate, num_ranks)
        cases.append(case(name, "host_ms", sides["ours"], sides["peer"], "pytorch", smaller=True))
    return cases


def count(network: str, num_classes: int, rate: float, num_ranks: int, *more: str) -> dict[str, float]:
    """The counted figures of an update; ``more``: further settings of the run."""
    from tests.device.build import DEVICE, environment

    rows = int(-(-num_classes // num_ranks) * (rate or 1.0)) + BATCH * num_ranks  # at most so many in an update
    found = []
    for chunks in (1, CHUNKS):
        words = settings(network, num_classes, rate, DEVICE, -(-rows // chunks), 2 * SKIPPED + 2)
        found.append(run("count", [*words, *more], num_ranks, environment() | {"PADDLE_DISTRI_BACKEND": "auto"}))
    one, several = found
    return {
        "uploads": max(several["uploads"]),
        "reads": max(several["reads"]),
        "calls_outside_backbone": max(one["outside"]),
        "calls_per_chunk": (max(several["outside"]) - max(one["outside"])) / (CHUNKS - 1),
    }


def time_updates(side: str, network: str, num_classes: int, rate: float, num_ranks: int) -> list[float]:
    """Milliseconds of some updates of ``ours`` or the ``peer``, each the slowest rank's."""
    environment = {name: value for name, value in os.environ.items() if name != "CUSTOM_DEVICE_ROOT"}
    if side == "ours":
        words = settings(network, num_classes, rate, "cpu", 16384, 2 * SKIPPED + 20)
        return run("time", words, num_ranks, environment)["ms"]
    words = [network, num_classes, rate, BATCH, WIDTH, INPUT_SIZE, EMBEDDING_SIZE, 2 * SKIPPED + 20]
    return run("peer", list(map(str, words)), num_ranks, environment)["ms"]


def settings(network: str, num_classes: int, rate: float, device: str, chunk_rows: int, updates: int) -> list[str]:
    """A run of ``train.py``."""
    return [
        f"run.device={device}", f"run.batch_size={BATCH}", f"run.max_steps={updates}", "run.accumulation=1",
        "data.kind=synthetic", "data.root=null", f"data.num_classes={num_classes}", "data.num_threads=1",
        f"data.num_images={BATCH * 8 * (updates + 2)}", f"model.network={network}", f"model.width={WIDTH}",
        f"model.input_size={INPUT_SIZE}", f"model.embedding_size={EMBEDDING_SIZE}", f"head.sample_rate={rate}",
        f"head.chunk={chunk_rows}", "head.matmul_dtype=fp32", "optim.lr=0.01",
        "optim.lr_batch=null", "schedule.warmup_epochs=0", "run.precision=fp32", "run.compile=false",
        "verify.sets=[]", "checkpoint.every_steps=0", "checkpoint.asynchronous=false", "log.every_steps=1000",
        "log.tensorboard=false",
    ]  # fmt: skip


def run(kind: str, words: list[str], num_ranks: int, environment: dict[str, str]) -> dict:
    """A child on so many ranks; what its rank 0 found."""
    environment = {key: value for key, value in environment.items() if not key.startswith("PADDLE_TRAINER")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if kind != "count":
        environment["PADDLE_DISTRI_BACKEND"] = "gloo"
    with tempfile.TemporaryDirectory(prefix="dispatch_") as folder:
        out = Path(folder) / "found.json"
        if kind == "peer":
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
            command = [sys.executable, *start, str(ROOT / "benchmarks" / "peer_dispatch.py"), str(out), *words]
        else:
            words = ["--child", kind, str(out), *words, f"run.output={folder}/run"]
            command = [sys.executable, __file__, *words]
            if num_ranks > 1:
                command = launch_command(num_ranks, __file__, words, f"{folder}/log")
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode or not out.is_file():
            logs = [path.read_text()[-2000:] for path in Path(folder).glob("log/workerlog.*")]
            raise SystemExit("\n".join([" ".join(command), done.stdout[-2000:], done.stderr[-2000:], *logs]))
        return json.loads(out.read_text())


def run_child(kind: str, out: Path, words: list[str]) -> None:
    """One rank: trains by ``train.train``, watches it, and rank 0 writes what it saw."""
    import train
    from utils import distributed

    config = train.parse_arguments(words, train.DEFAULT_CONFIG, "")
    distributed.init(config.run.device)
    with replaced(train, "PartialFC", lambda head: functools.partial(head, backend="paddle")):  # on the CPU as well
        parts = train.build(config)
    watch = count_updates if kind == "count" else time_each
    with watch(train) as found:
        train.train(parts)
    parts.watchdog.stop()
    parts.log.close()
    parts.loader.close()
    everyone = distributed.all_gather_object(found)
    if distributed.get_rank() == 0:
        # Ranks may differ (where the labels lie), and the slowest is waited for: the largest of them, update by update.
        largest = {key: list(map(max, zip(*(each[key] for each in everyone), strict=True))) for key in found}
        out.write_text(json.dumps(largest))


@contextlib.contextmanager
def time_each(train) -> Iterator[dict]:
    """``ms``: from one call of ``train.update`` to the next, once the first few are over."""
    found, marks = {"ms": []}, []
    with replaced(train, "update", lambda update: noting(update, lambda: marks.append(time.perf_counter()))):
        yield found
    found["ms"] += [1e3 * (b - a) for a, b in itertools.pairwise(marks[SKIPPED:])]


@contextlib.contextmanager
def count_updates(train) -> Iterator[dict]:
    """``uploads``, ``reads`` and ``outside`` (calls but the backbone's) of each update after the first few."""
    import paddle

    from tests.device.counters import counts
    from utils.model.replica import Replica

    marks, inside, began = [], [0], []

    def forward(call: Callable) -> Callable:
        def counted(replica, image):
            before = counts().calls
            embedding = call(replica, image)
            inside[0] += counts().calls - before
            # The embedding's gradient is there: what backward asks for from now on is the backbone's.
            embedding.register_hook(lambda _: began.append(counts().calls) or None)
            return embedding

        return counted

    def backward(call: Callable) -> Callable:
        def counted(*args, **options):
            began.clear()
            result = call(*args, **options)
            if began:
                inside[0] += counts().calls - began[0]
            return result

        return counted

    def note() -> None:
        now = counts()
        marks.append((now.h2d_calls, now.d2h_calls, now.calls - inside[0]))

    found = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(train, "update", lambda update: noting(update, note)))
        stack.enter_context(replaced(Replica, "__call__", forward))
        stack.enter_context(replaced(paddle.Tensor, "backward", backward))
        yield found
    steps = [
        [b - a for a, b in zip(*pair, strict=True)] for pair in zip(marks[SKIPPED:], marks[SKIPPED + 1 :], strict=False)
    ]
    found |= dict(zip(("uploads", "reads", "outside"), map(list, zip(*steps, strict=True)), strict=True))


def noting(function: Callable, note: Callable) -> Callable:
    """``function`` that calls ``note`` first."""

    def noted(*args, **options):
        note()
        return function(*args, **options)

    return noted


@contextlib.contextmanager
def replaced(owner: object, name: str, wrap: Callable) -> Iterator[None]:
    """``owner.name`` is ``wrap`` of itself inside."""
    before = getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


if __name__ == "__main__":
    main()
