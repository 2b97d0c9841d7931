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
kernel, one thread a rank, beside ``benchmarks/peer_train.py``: the same network in PyTorch, Partial FC as
arcface_torch has it, SGD, clipping. The sides take turns; the median of all updates counts.
"""

import contextlib
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, which has an eval.py as well

from benchmarks.common import ROOT, build_parser, case, measured, run, told_by

NETWORKS = ("iresnet18", "iresnet50", "iresnet100")  # what the peer has as well
WIDTH, INPUT_SIZE, EMBEDDING_SIZE, BATCH = 4, 32, 16, 4
CHUNKS = 6  # of the count with several chunks
SKIPPED = 3  # updates at the start that are not counted: the first is logged, and momentum comes into being
TIMED = 20  # updates of a turn of host_ms
SETTINGS = f"""
run.batch_size={BATCH} run.accumulation=1 run.precision=fp32 run.compile=false
data.kind=synthetic data.root=null data.num_threads=1
model.width={WIDTH} model.input_size={INPUT_SIZE} model.embedding_size={EMBEDDING_SIZE}
head.matmul_dtype=fp32 optim.lr=0.01 optim.lr_batch=null schedule.warmup_epochs=0
verify.sets=[] checkpoint.every_steps=0 checkpoint.asynchronous=false log.every_steps=1000 log.tensorboard=false
"""


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = build_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=["iresnet50"], choices=NETWORKS)
    parser.add_argument("--classes", type=int, default=85742)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side of host_ms; 0 leaves it out")

    def measure_all(args) -> list[dict]:
        names = itertools.product(args.networks, [args.classes], args.rates, args.ranks)
        return [found for name in names for found in measure(*name, args.rounds)]

    run(parser, argv, measure_all, "{ranks} ranks of 1 thread", child=run_child)


def measure(network: str, num_classes: int, rate: float, num_ranks: int, rounds: int) -> list[dict]:
    """All cases of one name; prints them."""
    name = f"dispatch/{network}/{num_classes}/{rate}/{num_ranks}"
    figures = count(network, num_classes, rate, num_ranks)
    print(name, " ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    cases = [{"name": name, "metric": metric, "value": value} for metric, value in figures.items()]
    ours, peer = [], []
    for _ in range(rounds):
        words = settings(network, num_classes, rate, "cpu", 16384, 2 * SKIPPED + TIMED)
        ours += watched_run("time", words, num_ranks, CUSTOM_DEVICE_ROOT="")["ms"]
        shape = (WIDTH, INPUT_SIZE, EMBEDDING_SIZE)
        words = [ROOT / "benchmarks" / "peer_train.py", network, BATCH, num_classes, rate, *shape]
        turns = measured({"peer": words}, TIMED, SKIPPED, threads=1, num_ranks=num_ranks)
        peer += [1e3 * turn["seconds"] for turn in turns["peer"]]
    return [*cases, case(name, "host_ms", ours, peer, "pytorch", smaller=True)] if rounds else cases


def count(network: str, num_classes: int, rate: float, num_ranks: int, *more: str) -> dict[str, float]:
    """The counted figures of an update; ``more``: further settings of the run."""
    from tests.device.build import DEVICE, environment

    launched = {"PADDLE_DISTRI_BACKEND": "xccl", "PADDLE_XCCL_BACKEND": DEVICE, f"FLAGS_selected_{DEVICE}s": "0"}
    variables = environment() | launched | {"OMP_NUM_THREADS": "1"}
    rows = int(-(-num_classes // num_ranks) * (rate or 1.0)) + BATCH * num_ranks  # at most so many in an update
    found = []
    for chunks in (1, CHUNKS):
        words = settings(network, num_classes, rate, DEVICE, -(-rows // chunks), 2 * SKIPPED + 2)
        found.append(watched_run("count", [*words, *more], num_ranks, **variables))
    one, several = found
    return {
        "uploads": max(several["uploads"]),
        "reads": max(several["reads"]),
        "calls_outside_backbone": max(one["outside"]),
        "calls_per_chunk": (max(several["outside"]) - max(one["outside"])) / (CHUNKS - 1),
    }


def settings(network: str, num_classes: int, rate: float, device: str, chunk_rows: int, updates: int) -> list[str]:
    """A run of ``train.py``."""
    data = f"data.num_classes={num_classes} data.num_images={BATCH * 8 * (updates + 2)} model.network={network}"
    rest = f"run.device={device} run.max_steps={updates} head.sample_rate={rate} head.chunk={chunk_rows}"
    return f"{SETTINGS} {data} {rest}".split()


def watched_run(kind: str, words: list[str], num_ranks: int, **variables: str) -> dict[str, list]:
    """``train.train`` on so many ranks; what was seen of each update, the largest of all ranks."""
    with tempfile.TemporaryDirectory(prefix="dispatch_") as folder:
        words = [__file__, "--child", kind, *words, f"run.output={folder}/run"]
        return told_by("ours", words, threads=1, num_ranks=num_ranks, **variables)


def run_child(kind: str, *words: str) -> None:
    """One rank: trains by ``train.train``, watches it and tells what all ranks saw."""
    import train
    from utils import distributed

    config = train.parse_arguments(list(words), train.DEFAULT_CONFIG, "")
    distributed.init(config.run.device)
    with mock.patch.object(train, "PartialFC", functools.partial(train.PartialFC, backend="paddle")):  # on the CPU too
        parts = train.build(config)
    watch = count_updates if kind == "count" else time_each
    with watch(train) as found:
        train.train(parts)
    parts.watchdog.stop()
    parts.log.close()
    parts.loader.close()
    everyone = distributed.all_gather_object(found)
    # Ranks may differ (where the labels lie), and the slowest is waited for: the largest of them, update by update.
    largest = {key: list(map(max, zip(*(each[key] for each in everyone), strict=True))) for key in found}
    print(json.dumps(largest), flush=True)


@contextlib.contextmanager
def time_each(train) -> Iterator[dict]:
    """``ms``: from one call of ``train.update`` to the next, once the first few are over."""
    found, marks = {"ms": []}, []
    with mock.patch.object(train, "update", noting(train.update, lambda: marks.append(time.perf_counter()))):
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
        stack.enter_context(mock.patch.object(train, "update", noting(train.update, note)))
        stack.enter_context(mock.patch.object(Replica, "__call__", forward(Replica.__call__)))
        stack.enter_context(mock.patch.object(paddle.Tensor, "backward", backward(paddle.Tensor.backward)))
        yield found
    for key, column in zip(("uploads", "reads", "outside"), zip(*marks[SKIPPED:], strict=True), strict=True):
        found[key] = [b - a for a, b in itertools.pairwise(column)]


def noting(function: Callable, note: Callable) -> Callable:
    """``function`` that calls ``note`` first."""

    def noted(*args, **options):
        note()
        return function(*args, **options)

    return noted


if __name__ == "__main__":
    main()
