"""Make, check and change RecordIO face sets.

    python tools/rec.py pack   faces/ out/                    one folder an identity -> out/train.rec, .idx, property
    python tools/rec.py pack   train.lst out/ --resize crop   lines 'path label'; images of another size are cut to it
    python tools/rec.py pack   train.parquet out/             image and label columns, rows in their order
    python tools/rec.py info   data/ms1m                      what is in it
    python tools/rec.py verify data/ms1m                      read everything, report every bad record
    python tools/rec.py unpack data/ms1m faces/               original bytes to faces/000123/00000007.jpg
    python tools/rec.py shuffle data/ms1m out/ --seed 1       records in a random order, for sequential readers
    python tools/rec.py merge  data/a data/b out/             classes of b are numbered behind those of a
    python tools/rec.py subset data/ms1m out/ --classes 0-999 the first thousand identities

A data set is a folder with train.rec (see --prefix) or a .rec file. Outputs appear under their names when whole.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import FaceRecordDataset, ListDataset, Source, build_source, check_labels, recognise, save_identities
from mxnet_reader.recordio import IRHeader, pack, unpack
from tools.rec.parquet import ParquetDataset, find_parquet
from tools.rec.verify import verify
from tools.rec.write import in_order, write_records
from utils.data.labels import LABELS_NAME, Relabelled
from utils.decode import DecodeError, face_file
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import write_json
from utils.progress import progress
from utils.text import read_text_lines

LARGEST_LABEL = 1 << 24  # float32 holds every whole number up to it


def run_pack(args: argparse.Namespace) -> None:
    """Images to records: keys 1..N grouped by class, then the header (key 0) and one record an identity.

    Parquet rows keep their order and get the keys 0..N-1, without header.
    """
    source = _open_images(args)
    if args.relabel and not source.numbered:
        source = Relabelled(source)
    check_labels(source, args.source, remedy="--relabel")
    for note in source.notes:
        print(note, file=sys.stderr)
    labels, num_images, num_classes = source.read_labels(), len(source), int(source.num_classes)
    if num_classes > LARGEST_LABEL:
        raise UserError(f"{args.source}: {num_classes} classes; a record's float32 label ends at {LARGEST_LABEL}")
    size = (args.image_size, args.image_size) if args.image_size else None
    sequential = isinstance(_origin(source), ParquetDataset)  # its rows can only be read one after the other
    order = np.arange(num_images) if sequential else np.argsort(labels, kind="stable")
    labels = labels[order]
    starts = np.searchsorted(labels, np.arange(num_classes + 1))

    def produce(n: int) -> tuple[int, bytes]:
        if n < num_images:
            encoded = _prepare(source, int(order[n]), size, args.resize, args.quality)
            key = n if sequential else n + 1
            return key, pack(IRHeader(0, float(labels[n]), key, 0), encoded)
        if n == num_images:
            return 0, pack(IRHeader(0, [num_images + 1, num_images + 1 + num_classes], 0, 0), b"")
        which = n - num_images - 1
        key = num_images + 1 + which
        return key, pack(IRHeader(0, [starts[which] + 1, starts[which + 1] + 1], key, 0), b"")

    identity = [_fingerprint(source, order), labels.tolist(), [args.image_size, args.resize, args.quality]]
    prefix = Path(args.output) / args.prefix
    total = num_images if sequential else num_images + 1 + num_classes
    write_records(prefix, total, produce, identity, args.workers, num_classes, size or (0, 0))
    if args.relabel or isinstance(source, ParquetDataset):
        save_identities(args.output, source)
    print(f"{prefix}.rec: {num_images} images of {num_classes} identities")


def _open_images(args: argparse.Namespace) -> Source:
    path = Path(args.source)
    parquet = find_parquet(path)
    if parquet:
        return ParquetDataset(parquet, args.image_column, args.label_column)
    kind = recognise(path, args.prefix)
    if kind == "rec":
        raise UserError(f"{path}: a record set already; see 'merge' and 'subset'")
    if kind == "list":
        return ListDataset(path, args.root)
    return build_source(kind or "folder", root=args.source)


def _origin(source: Source) -> Source:
    return source.source if isinstance(source, Relabelled) else source


def _fingerprint(source: Source, order: np.ndarray) -> list:
    """What tells one set of images from another, for the second run of an interrupted command."""
    origin = _origin(source)
    if isinstance(origin, ListDataset):
        return [str(origin.path(int(i))) for i in order]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in origin.paths]


def _prepare(source: Source, i: int, size: tuple[int, int] | None, resize: str | None, quality: int) -> bytes:
    try:
        return face_file(bytes(source.fetch(i)[0]), size, resize, quality, name=lambda: source.describe(i))
    except DecodeError as error:
        raise source.damaged(i, str(error)) from error


def run_unpack(args: argparse.Namespace) -> None:
    """Every image to <label>/<key>.jpg (.png), original bytes; header and identity records are not images."""
    data = FaceRecordDataset(args.source, args.prefix)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists; remove it or choose another output")
    partial = output.with_name(output.name + ".partial")

    def write(i: int) -> None:
        encoded, label = data.fetch(i)
        suffix = ".png" if encoded[:4] == b"\x89PNG" else ".jpg"
        path = partial / f"{label:06d}" / f"{int(data.keys[i]):08d}{suffix}"
        if path.exists() and path.stat().st_size == len(encoded):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)

    partial.mkdir(parents=True, exist_ok=True)
    for _ in progress(in_order(write, range(len(data)), args.workers), len(data), "unpacking"):
        pass
    partial.replace(output)
    print(f"{output}: {len(data)} images")


def run_info(args: argparse.Namespace) -> None:
    """Counts, layout and sizes; with --labels every record header is read as well."""
    data = FaceRecordDataset(args.source, args.prefix)
    found = {
        "file": str(data.rec_path),
        "bytes": data.rec_path.stat().st_size,
        "records": data.num_records,
        "images": len(data),
        "classes": data.num_classes,
        "header_record": data.has_header,
        "property_size": data.image_size,
    }
    if len(data):
        image, label = data[0]
        found["first_image"] = {"key": int(data.keys[0]), "label": label, "size": list(image.shape[:2])}
    if args.labels and len(data):
        labels = data.read_labels()
        counts = np.unique(labels, return_counts=True)[1]
        found["labels"] = {"classes": len(counts), "highest": int(labels.max())}
        found["images_a_class"] = {"least": int(counts.min()), "most": int(counts.max())}
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:15s} {value}" for name, value in found.items()))


def run_verify(args: argparse.Namespace) -> None:
    """Read everything; report every bad record and duplicate key; exit status 1 if there is one."""
    problems, summary = verify(FaceRecordDataset(args.source, args.prefix), args.workers, args.image_size)
    for problem in problems:
        print(problem)
    print(summary)
    if problems:
        raise SystemExit(1)


def run_shuffle(args: argparse.Namespace) -> None:
    """Image records in a random order under the keys 0..N-1; the header and identity records are dropped."""
    data = FaceRecordDataset(args.source, args.prefix)
    order = np.random.default_rng(args.seed).permutation(len(data))
    _copy(args, [Part(data, order)], data.num_classes, data.image_size, ["shuffle", args.seed])


def run_merge(args: argparse.Namespace) -> None:
    """Several sets one after the other; labels move behind those before, unless they are shared.

    --relabel numbers the labels that occur in each set 0, 1, ... first.
    """
    *sources, output = args.paths
    if len(sources) < 2:
        raise UserError("merge: at least two data sets and an output were expected")
    if args.relabel and args.shared_labels:
        raise UserError("merge: --relabel gives the labels another meaning in each set; drop it or --shared-labels")
    args.output = output
    parts, start = [], 0
    for source in sources:
        data = FaceRecordDataset(source, args.prefix)
        first = 0 if args.shared_labels else start
        if args.relabel:
            old = np.unique(data.read_labels())
            numbers = dict(zip(old.tolist(), range(first, first + len(old)), strict=True))
            num_classes = len(old)
        else:
            if not args.shared_labels:
                check_labels(data, data.rec_path, remedy="--relabel")
            num_classes = data.num_classes or int(data.read_labels().max(initial=-1)) + 1
            numbers = first
        parts.append(Part(data, np.arange(len(data)), numbers))
        start = max(start, num_classes) if args.shared_labels else start + num_classes
    sizes = {_size_of(part.data): part.data.rec_path for part in parts}
    if len(sizes) > 1:
        found = ", ".join(f"{path} {size[0]}x{size[1]}" for size, path in sizes.items())
        raise UserError(f"merge: the sets have different image sizes ({found}); pack them alike first")
    _copy(args, parts, start, next(iter(sizes)), ["merge", *map(str, sources), args.shared_labels, args.relabel])


def _size_of(data: FaceRecordDataset) -> tuple[int, int]:
    """Of all images by ``property``; without that file, of the first image."""
    if data.image_size is not None or len(data) == 0:
        return data.image_size or (0, 0)
    return data[0][0].shape[:2]


def run_subset(args: argparse.Namespace) -> None:
    """Chosen classes, keys or a random part; --relabel numbers the remaining classes 0, 1, ..."""
    data = FaceRecordDataset(args.source, args.prefix)
    chosen = np.arange(len(data))
    if args.keys:
        words = [word for line in read_text_lines(args.keys) for word in line.split()]
        wanted = np.array([_number(args.keys, word) for word in words], np.int64)
        missing = np.setdiff1d(wanted, data.keys)
        if len(missing):
            raise UserError(f"{args.keys}: key {missing[0]} is not an image of {data.rec_path}")
        chosen = np.flatnonzero(np.isin(data.keys, wanted))
    labels = data.read_labels() if args.classes or args.max_per_class or args.relabel else None
    if args.classes:
        chosen = chosen[np.isin(labels[chosen], _ranges(args.classes))]
    rng = np.random.default_rng(args.seed)
    if args.max_per_class:
        mixed = rng.permutation(chosen)
        mixed = mixed[np.argsort(labels[mixed], kind="stable")]
        of_class = labels[mixed]
        rank = np.arange(len(mixed)) - np.searchsorted(of_class, of_class)
        chosen = np.sort(mixed[rank < args.max_per_class])
    if args.num_images:
        chosen = np.sort(rng.permutation(chosen)[: args.num_images])
    if len(chosen) == 0:
        raise UserError(f"subset: no image of {data.rec_path} is chosen")
    num_classes, numbers = data.num_classes, 0
    if args.relabel:
        classes = np.unique(labels[chosen])
        numbers = dict(zip(classes.tolist(), range(len(classes)), strict=True))
        num_classes = len(classes)
    _copy(args, [Part(data, chosen, numbers)], num_classes, data.image_size, ["subset", chosen.tolist(), str(numbers)])
    if args.relabel:
        write_json(Path(args.output) / LABELS_NAME, {"identities": classes.tolist()})
    elif labels is not None and num_classes is not None and (left := len(np.unique(labels[chosen]))) < num_classes:
        advice = "train with data.relabel=true, or give --relabel"
        print(f"labels keep their numbers: {left} of {num_classes} classes have images; {advice}", file=sys.stderr)


def _number(path: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{path}: {text[:40]!r} is not a key")
    return int(text)


def _ranges(text: str) -> np.ndarray:
    """``0-9,17`` -> the numbers meant."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or (last and not last.strip().isdecimal()):
            raise UserError(f"--classes: {part!r}, numbers and ranges like 0-999,1500 were expected")
        numbers.append(np.arange(int(first), int(last or first) + 1))
    return np.concatenate(numbers)


@dataclass(frozen=True)
class Part:
    """What is taken from a set: sample numbers, and what to add to every label, or each label's new number."""

    data: FaceRecordDataset
    order: np.ndarray
    numbers: int | dict[int, int] = 0


def _copy(args: argparse.Namespace, parts: list[Part], num_classes: int | None, size: tuple | None, job: list) -> None:
    """Write chosen records of several sets under the keys 0..N-1; ``job`` tells one command from another."""
    if num_classes is not None and num_classes > LARGEST_LABEL:
        raise UserError(f"{args.output}: {num_classes} classes; a record's float32 label ends at {LARGEST_LABEL}")
    ends = np.cumsum([len(part.order) for part in parts])

    def produce(n: int) -> tuple[int, bytes]:
        which = int(np.searchsorted(ends, n, side="right"))
        part = parts[which]
        i = int(part.order[n - (ends[which - 1] if which else 0)])
        payload, (_, label) = part.data.record(i), part.data.fetch(i)
        moved = part.numbers[label] if isinstance(part.numbers, dict) else label + part.numbers
        if moved == label:
            return n, payload
        header, encoded = unpack(payload)
        if header.flag:
            return n, pack(header._replace(label=np.concatenate([[moved], header.label[1:]])), encoded)
        return n, pack(header._replace(label=float(moved)), encoded)

    prefix = Path(args.output) / args.prefix
    described = [*job, *[(str(part.data.rec_path), part.data.rec_path.stat().st_size) for part in parts]]
    write_records(prefix, int(ends[-1]), produce, described, args.workers, num_classes, size)
    print(f"{prefix}.rec: {int(ends[-1])} images")


def build_parser() -> argparse.ArgumentParser:
    positive = _whole(1, math.inf, "a whole number from 1 on")
    side = _whole(0, 65500, "a side in pixels (0 keeps every size)")
    quality = _whole(1, 100, "a JPEG quality from 1 to 100")
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: object, example: str, **positionals: str | None) -> argparse.ArgumentParser:
        text = " ".join((function.__doc__ or "").split())
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: python tools/rec.py {example}")
        sub.set_defaults(run=function)
        sub.add_argument("--prefix", default="train", help="name of the files without suffix (default: train)")
        sub.add_argument("--workers", type=positive, default=2, help="threads (default: 2)")
        for positional, told in positionals.items():
            sub.add_argument(positional, help=told)
        return sub

    what = "folder of identity folders, list of 'path label' lines, .tar shards, or .parquet files (or their folder)"
    into = "folder for <prefix>.rec, <prefix>.idx and property"
    sub = command("pack", run_pack, "pack faces/ out/ --resize crop", source=what, output=into)
    sub.add_argument("--root", help="where the paths of a list start (default: the list's folder)")
    sub.add_argument("--image-size", type=side, default=112, help="side in pixels; 0 keeps every size (default: 112)")
    sub.add_argument("--resize", choices=("no", "stretch", "crop"), default="no", help="what to do with other sizes")
    sub.add_argument("--quality", type=quality, default=95, help="JPEG quality of resized images (default: 95)")
    told = "number the labels that occur 0, 1, ... (kept: labels.json)"
    sub.add_argument("--relabel", action="store_true", help=told)
    sub.add_argument("--image-column", help="Parquet: the column of the images")
    sub.add_argument("--label-column", help="Parquet: the column of the labels, numbers or names")

    command("unpack", run_unpack, "unpack data/ms1m faces/", source=None, output="folder to make")

    sub = command("info", run_info, "info data/ms1m --labels", source=None)
    sub.add_argument("--labels", action="store_true", help="read all labels and count them")
    sub.add_argument("--json", action="store_true")

    sub = command("verify", run_verify, "verify data/ms1m --workers 8", source=None)
    sub.add_argument("--image-size", type=positive, help="side every image must have (default: from property)")

    sub = command("shuffle", run_shuffle, "shuffle data/ms1m out/ --seed 1", source=None, output=None)
    sub.add_argument("--seed", type=int, default=0)

    sub = command("merge", run_merge, "merge data/a data/b out/")
    sub.add_argument("paths", nargs="+", metavar="PATH", help="data sets, then the output folder")
    sub.add_argument("--shared-labels", action="store_true", help="equal labels mean equal people: do not renumber")
    sub.add_argument("--relabel", action="store_true", help="number the labels that occur in each set 0, 1, ... first")

    example = "subset data/ms1m out/ --classes 0-999 --max-per-class 20 --relabel"
    sub = command("subset", run_subset, example, source=None, output=None)
    sub.add_argument("--classes", help="labels to keep, like 0-999,1500")
    sub.add_argument("--keys", help="file of record keys to keep")
    sub.add_argument("--max-per-class", type=positive, help="at most so many images of one class")
    sub.add_argument("--num-images", type=positive, help="a random part of so many images")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--relabel", action="store_true", help="number the remaining classes 0, 1, ...")
    return parser


def _whole(lowest: int, highest: float, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return parse


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_ranges(args, seed=COUNT)
    args.run(args)


if __name__ == "__main__":
    main()
