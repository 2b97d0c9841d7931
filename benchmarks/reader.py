"""How fast a RecordIO face set becomes Paddle tensors, beside the bare JPEG decoder, mxnet and paddle.io.DataLoader.

    python benchmarks/reader.py                        prints the ratios; a minute or two
    python benchmarks/reader.py --json reader.json     writes them as well

All contestants read the same file of 112x112 JPEGs (made for the run at mxnet's default quality, 9 KB on average) with
the same number of threads or workers, in a random order, and take turns, so that a slow minute of the machine hits all
of them. The tar shards of ``reader/wds`` hold the same images. ``ratio`` above 1 means that ours is faster; beside the
bare decoder (encoded bytes in memory, pixels thrown away) 1 is the ceiling.
mxnet runs in an environment of its own (``make .venv-mxnet``); without it its case is left out, with a warning.
"""

import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import ROOT, Side, build_parser, case, run, timed

MXNET_PYTHON = ROOT / ".venv-mxnet" / "bin" / "python"

MXNET_LOOP = """
import json, os, sys, threading, time
import mxnet as mx, numpy as np
rec, idx, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
keys = mx.recordio.MXIndexedRecordIO(idx, rec, "r").keys
print("{}", flush=True)
readers = [mx.recordio.MXIndexedRecordIO(idx, rec, "r") for _ in range(threads)]
def work(reader, part):
    for key in part:
        header, data = mx.recordio.unpack(reader.read_idx(key))
        mx.image.imdecode(data).asnumpy()
for line in sys.stdin:
    order = np.random.default_rng(int(line)).permutation(keys)
    parts = np.array_split(order, threads)
    started = time.perf_counter()
    pool = [threading.Thread(target=work, args=pair) for pair in zip(readers, parts)]
    [thread.start() for thread in pool]; [thread.join() for thread in pool]
    print(json.dumps({"rate": len(order) / (time.perf_counter() - started)}), flush=True)
"""

OPEN_INDEX = """
import json, sys, time
{load}
def peak():  # ru_maxrss would still hold the parent's size
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
started = time.perf_counter()
reader = recordio.MXIndexedRecordIO(sys.argv[1], sys.argv[2], "r")
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": seconds, "peak_mb": (peak() - before) / 1024}}))
"""


def make_records(folder: Path, count: int) -> None:
    """``train.rec`` with face-sized JPEGs of about 9 KB: smooth shapes and some noise."""
    import cv2

    from mxnet_reader import recordio

    rng = np.random.default_rng(0)
    writer = recordio.MXIndexedRecordIO(folder / "train.idx", folder / "train.rec", "w")
    for key in range(count):
        image = cv2.resize(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
        noise = rng.integers(-16, 17, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        writer.write_idx(key, recordio.pack_img(recordio.IRHeader(0, key % 100, key, 0), image, quality=95))
    writer.close()


def make_shards(folder: Path, source: object, per_shard: int = 1000) -> None:
    """The images of a source as tar shards, ``<key>.jpg`` and ``<key>.cls``."""
    for start in range(0, len(source), per_shard):
        with tarfile.open(folder / f"train-{start // per_shard:04d}.tar", "w") as archive:
            for i in range(start, min(start + per_shard, len(source))):
                encoded, label = source.fetch(i)
                for suffix, data in (("jpg", bytes(encoded)), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def index_of_shards(folder: Path, copies: int = 20) -> dict:
    """Members a second of the index of tar shards (files in the page cache), beside Python's ``tarfile``."""
    from utils.data.shards import index_shard

    shards = sorted(folder.glob("*.tar"))

    def ours() -> int:
        return 2 * sum(len(index_shard(path)[0]) for _ in range(copies) for path in shards)

    def peer() -> int:
        members = 0
        for path in shards:
            with tarfile.open(path) as archive:
                members += len(archive.getmembers())
        return members

    rates = ([members / seconds] for members, seconds in (timed(ours), timed(peer)))
    return case("reader/wds_index", "members_s", *rates, "tarfile.getmembers, labels not read", paired=True)


def bare_decode(source: object, threads: int) -> Callable[[int], float]:
    """Images a second of nothing but the decoder, bytes in memory."""
    import simplejpeg

    encoded = [source.fetch(i)[0] for i in range(len(source))]

    def work(part: np.ndarray) -> None:
        for i in part:
            simplejpeg.decode_jpeg(encoded[i])

    def run(seed: int) -> float:
        parts = np.array_split(np.random.default_rng(seed).permutation(len(encoded)), threads)
        with ThreadPoolExecutor(threads) as pool:
            return len(encoded) / timed(lambda: list(pool.map(work, parts)))[1]

    return run


def our_loader(source: object, threads: int, batch_size: int, normalize: bool) -> Callable:
    """Images a second of our loader, from the first batch on (starting the workers is not counted for anybody)."""
    from utils.data.loader import build_train_loader

    options = {"normalize": normalize, "flip": normalize, "num_threads": threads}
    return lambda seed: _rate(build_train_loader(source, batch_size, seed=seed, **options), batch_size)


class PlainSource:
    """The data set as it is usually written: ``read_idx``, ``unpack``, ``cv2.imdecode``."""

    def __init__(self, folder: Path) -> None:
        from mxnet_reader import recordio

        self._unpack = recordio.unpack
        self._records = recordio.MXIndexedRecordIO(folder / "train.idx", folder / "train.rec", "r")

    def __len__(self) -> int:
        return len(self._records.keys)

    def __getitem__(self, i: int) -> tuple:
        import cv2

        header, encoded = self._unpack(self._records.read_idx(self._records.keys[i]))
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1], int(header.label)


def paddle_loader(source: object, workers: int, batch_size: int, normalize: bool) -> Callable[[int], float]:
    """``paddle.io.DataLoader`` over a source."""
    import paddle

    class Wrapped(paddle.io.Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, i: int) -> tuple:
            image, label = source[i]
            if normalize:
                image = image[:, ::-1] if image.sum() % 2 else image
                image = (image.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
            return image, label

    def run(seed: int) -> float:
        paddle.seed(seed)
        options = {"shuffle": True, "drop_last": True, "num_workers": workers}
        return _rate(paddle.io.DataLoader(Wrapped(), batch_size=batch_size, **options), batch_size)

    return run


def _rate(loader: object, batch_size: int) -> float:
    started, batches = None, 0
    for image, _ in loader:
        assert image.shape[0] == batch_size
        if started is None:
            started = time.perf_counter()
        else:
            batches += 1
    return batches * batch_size / (time.perf_counter() - started)


def mxnet_loop(folder: Path, threads: int) -> Callable[[int], float]:
    """``read_idx`` and ``imdecode`` of the real mxnet, a reader a thread."""
    words = ["-c", MXNET_LOOP, folder / "train.rec", folder / "train.idx", threads]
    side = Side("mxnet", words, python=MXNET_PYTHON)
    return lambda seed: side.turn(seed)["rate"]


def open_index(folder: Path, lines: int) -> list[dict]:
    """Seconds and memory to open a large index, each in a fresh process."""
    idx, rec = folder / "large.idx", folder / "large.rec"
    rec.write_bytes(b"")
    offsets = np.cumsum(np.random.default_rng(0).integers(2000, 4000, lines) * 4).tolist()
    with open(idx, "w") as file:
        file.writelines(f"{key}\t{offset}\n" for key, offset in enumerate(offsets))
    ours = f"sys.path.insert(0, {str(ROOT)!r})\nfrom mxnet_reader import recordio"
    sides = {"ours": (sys.executable, ours), "mxnet": (MXNET_PYTHON, "from mxnet import recordio")}
    found = {}
    for name, (python, load) in sides.items():
        if Path(python).exists():
            words = ["-W", "ignore", "-c", OPEN_INDEX.format(load=load), idx, rec]
            found[name] = [Side(name, words, python=python).told for _ in range(3)]
    idx.unlink()

    def measured(metric: str) -> dict:
        values = ([told[metric] for told in found[name]] if name in found else None for name in sides)
        return case(f"reader/open_index/{lines}", metric, *values, "mxnet", smaller=True, paired=True)

    return [measured("seconds"), measured("peak_mb")]


def measure(folder: Path, args) -> list[dict]:
    """All contestants in turn, ``args.runs`` rounds."""
    from dataset import FaceRecordDataset, ShardDataset

    make_records(folder, args.images)
    source = FaceRecordDataset(folder)
    size = (folder / "train.rec").stat().st_size / args.images / 1024
    print(f"{args.images} records of {size:.1f} KiB, {args.threads} threads, batches of {args.batch_size}", flush=True)
    make_shards(folder, source)
    ours, theirs = (args.threads, args.batch_size), (2, args.batch_size)
    contestants = {
        "decode": bare_decode(source, args.threads),
        "ours": our_loader(source, *ours, normalize=False),
        "wds": our_loader(ShardDataset(folder), *ours, normalize=False),
        "dataloader": paddle_loader(source, *theirs, normalize=False),
        "dataloader_plain": paddle_loader(PlainSource(folder), *theirs, normalize=False),
        "ours_float": our_loader(source, *ours, normalize=True),
        "dataloader_float": paddle_loader(source, *theirs, normalize=True),
    }
    if MXNET_PYTHON.exists():
        contestants["mxnet"] = mxnet_loop(folder, args.threads)
    else:
        print(f"warning: {MXNET_PYTHON} is missing, mxnet is left out; run 'make .venv-mxnet'", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():  # warm up: files, imports, pools
        contestant(0)
    for turn in range(args.runs):
        for name, contestant in contestants.items():
            rates[name].append(contestant(turn + 1))
        shown = ", ".join(f"{name} {found[-1]:.0f}/s" for name, found in rates.items())
        print(f"round {turn + 1}: {shown}", flush=True)
    bare, loader = "simplejpeg, bytes in memory", "paddle.io.DataLoader"
    plain = f"{loader}, 2 workers, read_idx + cv2.imdecode, uint8"
    same = f"{loader}, 2 workers, over our own reader and decoder, uint8"
    compared = [
        ("reader/fetch_decode", "vs_decode_limit", "ours", "decode", bare),
        ("reader/wds", "vs_rec", "wds", "ours", "our record reader, same images, same order"),
        ("reader/fetch_decode", "vs_mxnet", "ours", "mxnet", "mxnet 1.9.1 read_idx + imdecode"),
        ("reader/fetch_decode", "vs_dataloader", "ours", "dataloader_plain", plain),
        ("reader/fetch_decode", "vs_dataloader_same", "ours", "dataloader", same),
        ("reader/float32", "vs_dataloader", "ours_float", "dataloader_float", f"{loader}, our reader, float32"),
        ("reader/float32", "vs_decode_limit", "ours_float", "decode", bare),
    ]
    cases = [
        case(name, metric, rates[ours], rates.get(peer), peer_name, paired=True)
        for name, metric, ours, peer, peer_name in compared
    ]
    return [*cases, index_of_shards(folder)]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=8192, help="records in the file (default: 8192)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--index-lines", type=int, default=5_900_000, help="lines of the large index; 0 leaves it out")

    def measure_all(args) -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            cases = measure(Path(folder), args)
            return cases + open_index(Path(folder), args.index_lines) if args.index_lines else cases

    run(parser, argv, measure_all, "{threads} threads", ("paddlepaddle", "numpy"))


if __name__ == "__main__":
    main()
