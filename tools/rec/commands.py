"""Make, check and change RecordIO face sets.

    python tools/rec.py pack   faces/ out/                    one folder an identity -> out/train.rec, .idx, property
    python tools/rec.py pack   train.lst out/ --resize crop   lines 'path label'; images of another size are cut to it
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
from pathlib import Path

import cv2
import numpy as np

from dataset import FaceRecordDataset, FolderDataset, ListDataset
from mxnet_reader.recordio import IRHeader, pack, unpack
from tools.rec.verify import verify
from tools.rec.write import in_order, write_records
from utils.decode import DecodeError, decode_image, fit_image
from utils.errors import UserError, one_line_errors
from utils.progress import progress


def run_pack(args: argparse.Namespace) -> None:
    """Images to records: keys 1..N grouped by class, then the header (key 0) and one record an identity."""
    source = FolderDataset(args.source) if Path(args.source).is_dir() else ListDataset(args.source, args.root)
    size = (args.image_size, args.image_size) if args.image_size else None
    order = np.argsort(source.labels, kind="stable")
    labels = source.labels[order]
    num_images, num_classes = len(order), source.num_classes
    starts = np.searchsorted(labels, np.arange(num_classes + 1))

    def produce(n: int) -> tuple[int, bytes]:
        if n < num_images:
            encoded = _prepare(source, int(order[n]), size, args.resize, args.quality)
            return n + 1, pack(IRHeader(0, float(labels[n]), n + 1, 0), encoded)
        if n == num_images:
            return 0, pack(IRHeader(0, [num_images + 1, num_images + 1 + num_classes], 0, 0), b"")
        which = n - num_images - 1
        key = num_images + 1 + which
        return key, pack(IRHeader(0, [starts[which] + 1, starts[which + 1] + 1], key, 0), b"")

    names = [str(source.path(int(i))) for i in order]
    options = [args.image_size, args.resize, args.quality]
    identity = [names, labels.tolist(), options]
    prefix = Path(args.output) / args.prefix
    total = num_images + 1 + num_classes
    write_records(prefix, total, produce, identity, args.workers, num_classes, size or (0, 0))
    print(f"{prefix}.rec: {num_images} images of {num_classes} identities")


def _prepare(source: ListDataset, i: int, size: tuple[int, int] | None, resize: str | None, quality: int) -> bytes:
    """The file's own bytes if they are a whole JPEG or PNG of the right size, else a JPEG of that size."""
    encoded, _ = source.fetch(i)
    try:
        image = decode_image(encoded)
    except DecodeError as error:
        raise UserError(f"{source.describe(i)}: {error}") from error
    known = encoded[:3] == b"\xff\xd8\xff" or encoded[:4] == b"\x89PNG"
    if known and size in (None, image.shape[:2]):
        return encoded
    if size is not None and image.shape[:2] != size:
        if resize == "no":
            found = "x".join(map(str, image.shape[:2]))
            raise UserError(f"{source.describe(i)}: {found}, {size[0]}x{size[1]} expected; align it, or give --resize")
        image = fit_image(image, size, resize)
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


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
    if args.labels:
        counts = np.bincount(read_labels(data, args.workers))
        found["labels"] = {"classes": int((counts > 0).sum()), "highest": len(counts) - 1}
        found["images_a_class"] = {"least": int(counts[counts > 0].min()), "most": int(counts.max())}
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:15s} {value}" for name, value in found.items()))


def read_labels(data: FaceRecordDataset, workers: int = 2) -> np.ndarray:
    """Labels of all images, int64 [N]."""
    labels = in_order(lambda i: data.fetch(i)[1], range(len(data)), workers)
    return np.fromiter(progress(labels, len(data), "reading labels"), np.int64, len(data))


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
    _copy(args, [(data, order, np.zeros(1, np.int64))], data.num_classes, data.image_size, ["shuffle", args.seed])


def run_merge(args: argparse.Namespace) -> None:
    """Several sets one after the other; labels move behind those before, unless they are shared."""
    *sources, output = args.paths
    if len(sources) < 2:
        raise UserError("merge: at least two data sets and an output were expected")
    args.output = output
    parts, start = [], 0
    for source in sources:
        data = FaceRecordDataset(source, args.prefix)
        num_classes = data.num_classes or int(read_labels(data, args.workers).max(initial=-1)) + 1
        parts.append((data, np.arange(len(data)), np.array([0 if args.shared_labels else start])))
        start = max(start, num_classes) if args.shared_labels else start + num_classes
    sizes = {data.image_size for data, _, _ in parts}
    if len(sizes) > 1:
        raise UserError(f"merge: the sets have different image sizes {sorted(map(str, sizes))}; pack them alike first")
    _copy(args, parts, start, sizes.pop(), ["merge", *map(str, sources), args.shared_labels])


def run_subset(args: argparse.Namespace) -> None:
    """Chosen classes, keys or a random part; --relabel numbers the remaining classes 0, 1, ..."""
    data = FaceRecordDataset(args.source, args.prefix)
    chosen = np.arange(len(data))
    if args.keys:
        wanted = np.array([_number(args.keys, text) for text in Path(args.keys).read_text().split()], np.int64)
        missing = np.setdiff1d(wanted, data.keys)
        if len(missing):
            raise UserError(f"{args.keys}: key {missing[0]} is not an image of {data.rec_path}")
        chosen = np.flatnonzero(np.isin(data.keys, wanted))
    labels = read_labels(data, args.workers) if args.classes or args.max_per_class or args.relabel else None
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
    num_classes, mapping = data.num_classes, np.zeros(1, np.int64)
    if args.relabel:
        classes = np.unique(labels[chosen])
        mapping = np.zeros(int(classes[-1]) + 1, np.int64)
        mapping[classes] = np.arange(len(classes)) - classes
        num_classes = len(classes)
    _copy(args, [(data, chosen, mapping)], num_classes, data.image_size, ["subset", chosen.tolist(), mapping.tolist()])


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


def _copy(args: argparse.Namespace, parts: list, num_classes: int | None, size: tuple | None, identity: list) -> None:
    """Write chosen records of several sets under the keys 0..N-1.

    Each part is (data, sample numbers, shift of every label): a shift of length 1 holds for all labels.
    """
    ends = np.cumsum([len(order) for _, order, _ in parts])

    def produce(n: int) -> tuple[int, bytes]:
        which = int(np.searchsorted(ends, n, side="right"))
        data, order, shift = parts[which]
        i = int(order[n - (ends[which - 1] if which else 0)])
        payload = data.record(i)
        _, label = data.fetch(i)
        moved = label + int(shift[label] if len(shift) > 1 else shift[0])
        if moved == label:
            return n, payload
        header, encoded = unpack(payload)
        if header.flag:
            return n, pack(header._replace(label=np.concatenate([[moved], header.label[1:]])), encoded)
        return n, pack(header._replace(label=float(moved)), encoded)

    prefix = Path(args.output) / args.prefix
    described = [*identity, *[(str(data.rec_path), data.rec_path.stat().st_size) for data, _, _ in parts]]
    write_records(prefix, int(ends[-1]), produce, described, args.workers, num_classes, size)
    print(f"{prefix}.rec: {int(ends[-1])} images")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: object, example: str) -> argparse.ArgumentParser:
        text = " ".join((function.__doc__ or "").split())
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: python tools/rec.py {example}")
        sub.set_defaults(run=function)
        sub.add_argument("--prefix", default="train", help="name of the files without suffix (default: train)")
        sub.add_argument("--workers", type=_positive, default=2, help="threads (default: 2)")
        return sub

    sub = command("pack", run_pack, "pack faces/ out/ --resize crop")
    sub.add_argument("source", help="folder of identity folders, or a list of 'path label' lines")
    sub.add_argument("output", help="folder for <prefix>.rec, <prefix>.idx and property")
    sub.add_argument("--root", help="where the paths of a list start (default: the list's folder)")
    sub.add_argument("--image-size", type=int, default=112, help="side in pixels; 0 keeps every size (default: 112)")
    sub.add_argument("--resize", choices=("no", "stretch", "crop"), default="no", help="what to do with other sizes")
    sub.add_argument("--quality", type=int, default=95, help="JPEG quality of resized images (default: 95)")

    sub = command("unpack", run_unpack, "unpack data/ms1m faces/")
    sub.add_argument("source")
    sub.add_argument("output", help="folder to make")

    sub = command("info", run_info, "info data/ms1m --labels")
    sub.add_argument("source")
    sub.add_argument("--labels", action="store_true", help="read all labels and count them")
    sub.add_argument("--json", action="store_true")

    sub = command("verify", run_verify, "verify data/ms1m --workers 8")
    sub.add_argument("source")
    sub.add_argument("--image-size", type=int, help="side every image must have (default: from property)")

    sub = command("shuffle", run_shuffle, "shuffle data/ms1m out/ --seed 1")
    sub.add_argument("source")
    sub.add_argument("output")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("merge", run_merge, "merge data/a data/b out/")
    sub.add_argument("paths", nargs="+", metavar="PATH", help="data sets, then the output folder")
    sub.add_argument("--shared-labels", action="store_true", help="equal labels mean equal people: do not renumber")

    sub = command("subset", run_subset, "subset data/ms1m out/ --classes 0-999 --max-per-class 20 --relabel")
    sub.add_argument("source")
    sub.add_argument("output")
    sub.add_argument("--classes", help="labels to keep, like 0-999,1500")
    sub.add_argument("--keys", help="file of record keys to keep")
    sub.add_argument("--max-per-class", type=_positive, help="at most so many images of one class")
    sub.add_argument("--num-images", type=_positive, help="a random part of so many images")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--relabel", action="store_true", help="number the remaining classes 0, 1, ...")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
