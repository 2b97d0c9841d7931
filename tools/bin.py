"""Make, show and unpack verification sets (.bin).

    python tools/bin.py make lfw/ lfw.bin --pairs pairs.txt        LFW's pairs.txt; images lfw/<name>/<name>_0001.jpg
    python tools/bin.py make lfw/ lfw.bin --pairs lfw_test_pair.txt  lines 'a/1.jpg b/2.jpg 0'
    python tools/bin.py make faces/ mine.bin --num-pairs 6000      random pairs from a folder of identity folders
    python tools/bin.py show lfw.bin lfw.png --num-pairs 20        a contact sheet, same pairs framed in green
    python tools/bin.py unpack lfw.bin lfw_pairs/                  original bytes, and pairs.txt to make it again

Images of another size are an error unless --resize says how to change them. Outputs appear when they are whole.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

from dataset import FolderDataset
from eval.bins import load_bin, read_bin, save_bin
from eval.protocols import read_pair_files
from utils.decode import DecodeError, face_file
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import written_whole
from utils.progress import progress

GREEN, RED, FRAME = (40, 160, 40), (200, 40, 40), 3


def run_make(args: argparse.Namespace) -> None:
    """Pairs of image files to a .bin; whole JPEG and PNG files of the right size keep their bytes."""
    root, output = Path(args.root), Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists; remove it or choose another output")
    pairs = _listed(Path(args.pairs), root) if args.pairs else random_pairs(root, args.num_pairs, args.seed)
    size = (args.image_size, args.image_size)
    encoded: list[bytes] = []
    for left, right, _ in progress(pairs, len(pairs), "reading pairs"):
        encoded += [_prepare(path, size, args.resize, args.quality) for path in (left, right)]
    same = [flag for _, _, flag in pairs]
    save_bin(output, encoded, same)
    print(f"{output}: {len(pairs)} pairs, {sum(same)} of one person")


def _listed(path: Path, root: Path) -> list[tuple[Path, Path, bool]]:
    try:
        return read_pair_files(path, root)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def random_pairs(root: Path, count: int, seed: int) -> list[tuple[Path, Path, bool]]:
    """Half of the pairs of one person, half of two, none twice, in ten blocks of both kinds (for ten folds)."""
    data, rng = FolderDataset(root), np.random.default_rng(seed)
    members = [np.flatnonzero(data.labels == label) for label in range(data.num_classes)]
    sizes = np.array([len(member) for member in members])
    possible = sizes * (sizes - 1) // 2
    different = (len(data) * (len(data) - 1)) // 2 - int(possible.sum())
    if count < 2 or int(possible.sum()) < count // 2 or different < count - count // 2:
        found = f"{int(possible.sum())} pairs of one person and {different} of two"
        raise UserError(f"{root}: {found}, {count} pairs (half of each) were asked for")
    same: dict[tuple, bool] = {}
    while len(same) < count // 2:
        label = rng.choice(len(members), p=possible / possible.sum())
        left, right = rng.choice(members[label], 2, replace=False)
        same[min(left, right), max(left, right)] = True
    other: dict[tuple, bool] = {}
    while len(other) < count - count // 2:
        left, right = rng.choice(len(data), 2, replace=False)
        if data.labels[left] != data.labels[right]:
            other[min(left, right), max(left, right)] = False
    folds = [part for kind in (same, other) for part in _tenths(list(kind.items()))]
    ordered = [item for fold in range(10) for item in (*folds[fold], *folds[10 + fold])]
    return [(data.path(int(left)), data.path(int(right)), flag) for (left, right), flag in ordered]


def _tenths(items: list) -> list[list]:
    ends = np.linspace(0, len(items), 11).astype(int)
    return [items[start:stop] for start, stop in pairwise(ends)]


def _prepare(path: Path, size: tuple[int, int], resize: str, quality: int) -> bytes:
    try:
        return face_file(path.read_bytes(), size, resize, quality, name=lambda: path)
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from error


def run_show(args: argparse.Namespace) -> None:
    """A contact sheet: pairs side by side, framed green where they are one person, red where not."""
    output = Path(args.output)
    suffix = output.suffix or ".png"
    if not cv2.haveImageWriter(f"x{suffix}"):
        raise UserError(f"{output}: OpenCV cannot write this kind of picture; use .png or .jpg")
    images, same_P = load_bin(args.bin)
    chosen = np.arange(len(same_P))
    if len(chosen) > args.num_pairs:
        chosen = np.sort(np.random.default_rng(args.seed).choice(chosen, args.num_pairs, replace=False))
    columns = min(args.columns, len(chosen))
    height, width = images.shape[1] + 2 * FRAME, 2 * images.shape[2] + 2 * FRAME
    rows = -(-len(chosen) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for place, pair in enumerate(chosen.tolist()):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = GREEN if same_P[pair] else RED
        both = np.concatenate([images[2 * pair], images[2 * pair + 1]], axis=1)
        sheet[top + FRAME : top + height - FRAME, left + FRAME : left + width - FRAME] = both
    done, encoded = cv2.imencode(suffix, sheet[:, :, ::-1])
    if not done:
        raise UserError(f"{output}: OpenCV cannot write {sheet.shape[1]}x{sheet.shape[0]} pixels as {suffix}")
    with written_whole(output) as aside:
        aside.write_bytes(encoded.tobytes())
    print(f"{output}: {len(chosen)} of {len(same_P)} pairs, {int(same_P[chosen].sum())} of one person")


def run_unpack(args: argparse.Namespace) -> None:
    """Original bytes to 000000_a.jpg, 000000_b.jpg, ... and a pairs.txt that ``make`` reads."""
    encoded, same_P = read_bin(args.bin)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists; remove it or choose another output")
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lines = []
    for pair, flag in progress(enumerate(same_P.tolist()), len(same_P), "unpacking"):
        names = []
        for side, data in zip("ab", encoded[2 * pair : 2 * pair + 2], strict=True):
            names.append(f"{pair:06d}_{side}{'.png' if data[:4] == bytes.fromhex('89504e47') else '.jpg'}")
            (partial / names[-1]).write_bytes(data)
        lines.append(f"{names[0]} {names[1]} {int(flag)}\n")
    (partial / "pairs.txt").write_text("".join(lines))
    partial.replace(output)
    print(f"{output}: {len(same_P)} pairs, {int(same_P.sum())} of one person")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: object, example: str) -> argparse.ArgumentParser:
        text = " ".join((function.__doc__ or "").split())
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: python tools/bin.py {example}")
        sub.set_defaults(run=function)
        return sub

    sub = command("make", run_make, "make lfw/ lfw.bin --pairs pairs.txt --resize crop")
    sub.add_argument("root", help="folder that the pairs' paths start from, or of identity folders")
    sub.add_argument("output", help="the .bin file")
    sub.add_argument("--pairs", help="LFW's pairs.txt, or lines 'a.jpg b.jpg 1'; default: random pairs")
    sub.add_argument("--num-pairs", type=int, default=6000, help="random pairs (default: 6000)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--image-size", type=int, default=112, help="side in pixels (default: 112)")
    sub.add_argument("--resize", choices=("no", "stretch", "crop"), default="no", help="what to do with other sizes")
    sub.add_argument("--quality", type=int, default=95, help="JPEG quality of resized images (default: 95)")

    sub = command("show", run_show, "show lfw.bin lfw.png --num-pairs 20")
    sub.add_argument("bin")
    sub.add_argument("output", help="picture to write, .png or .jpg")
    sub.add_argument("--num-pairs", type=int, default=40, help="pairs on the sheet (default: 40)")
    sub.add_argument("--columns", type=int, default=5, help="pairs a row (default: 5)")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("unpack", run_unpack, "unpack lfw.bin lfw_pairs/")
    sub.add_argument("bin")
    sub.add_argument("output", help="folder to make")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_ranges(args, num_pairs=POSITIVE, columns=POSITIVE, image_size=(1, 4096), quality=(0, 100), seed=COUNT)
    args.run(args)


if __name__ == "__main__":
    main()
