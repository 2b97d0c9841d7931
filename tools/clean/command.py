"""What is wrong with the labels of a data set, told by a trained network.

    python tools/clean.py data/ms1m --model work_dirs/run --output work_dirs/clean
    python tools/clean.py faces/ --model w600k_r50.onnx --output work_dirs/clean --against lfw.bin,IJB_release/IJBC
    python tools/rec.py subset data/ms1m out/ --keys work_dirs/clean/keep.txt --relabel

DATASET is a record set, a folder with a folder an identity, or a list of ``path label`` lines; it is read once. The
output folder gets

    outliers.csv        key,label,nearest,cos_own,cos_nearest   images closer to another identity than to their own
    same_person.csv     label_a,label_b,cos                     identities that are one person
    several_people.csv  label,parts,cos                         identities that are several; parts.csv says who is who
    duplicates.csv      key_a,key_b,cos                         the same picture twice
    overlap.csv         label,set,image,cos                     identities that are in a set of --against
    keep.txt            the keys that none of this speaks against
    page.html           contact sheets, to decide by eye

and ``embeddings/``, which the next call uses again (it may be deleted). ``--against`` takes .bin sets, IJB folders,
record sets and folders of aligned images. Thresholds are measured on the data set itself (docs/tutorials/clean.md).
"""

import argparse
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

import numpy as np

from eval.embed import load_embedder
from eval.options import add_model_options
from tools.clean.against import TestSet, embed_test_set, find_overlap, open_test_set
from tools.clean.analysis import analyse
from tools.clean.duplicates import exact_pairs, near_pairs
from tools.clean.reading import read_source
from tools.clean.results import COLUMNS, DROPS, Results, kept_images, tables_of
from tools.clean.rows import Rows
from tools.clean.sheets import write_page
from tools.sources import open_source
from utils import distributed
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import write_csv, write_json, write_text
from utils.progress import progress_bar


def open_test_sets(given: list[str]) -> list[TestSet]:
    """The sets of ``--against`` under their file names; two of one name are told apart by their whole paths.

    ``given``: paths, or several with commas between where no such path exists.
    """
    parts = [part for text in given for part in ([text] if Path(text).exists() else map(str.strip, text.split(",")))]
    paths = [Path(part) for part in parts if part]
    names = [path.name or str(path) for path in paths]
    return [
        open_test_set(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = CommandLine(__doc__, prog="clean.py")
    parser.add_argument("dataset", type=Path, help="record set, folder of identities, list, or tar shards")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--against", nargs="+", default=[], metavar="SET", help="test sets that it must not overlap")
    parser.add_argument("--drop", default=",".join(DROPS), help="what keep.txt leaves out (default: %(default)s)")
    parser.add_argument("--shown", type=int, default=50, help="cases of each kind on the page (default: %(default)s)")
    parser.add_argument("--prefix", default="train", help="name of a record set's files without suffix")
    parser.add_argument("--resize", action="store_true", help="stretch images that are not square")
    add_model_options(parser, "run directory, weights file or .onnx", required=True)
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    check_ranges(args, shown=COUNT, batch_size=POSITIVE)
    drop = tuple(part.strip() for part in args.drop.split(",") if part.strip())
    unknown = [part for part in drop if part not in DROPS]
    if unknown:
        raise UserError(f"--drop {unknown[0]!r}: choose from {','.join(DROPS)}")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: is a file; name a folder")
    distributed.init(args.device)
    with distributed.together():
        source = open_source(args.dataset, args.prefix)
        if not len(source):
            raise UserError(f"{args.dataset}: no images in it")
        tests = open_test_sets(args.against)
        embedder = load_embedder(
            args.model, args.network, args.engine, args.batch_size, which=args.which, precision=args.precision
        )
    folder = args.output / "embeddings"
    reading = read_source(source, args.dataset, embedder, folder, args.resize)
    embedded = [(test, *embed_test_set(test, embedder, folder, args.resize)) for test in tests]
    if distributed.get_rank() != 0:
        return
    rows = Rows.of(reading.feature_ND, reading.label_N, source.describe)
    findings = analyse(rows)
    with progress_bar("duplicates", len(rows)) as advance:
        close_F = np.flatnonzero(findings.close_N > 0)
        near_P2 = near_pairs(
            rows, reading.thumbnail_NP, findings.same_P2, close_F, findings.nearest_N[close_F], advance
        )
    duplicate_P2 = np.unique(np.concatenate([near_P2, np.sort(exact_pairs(reading.pixels_N), axis=1)]), axis=0)
    overlaps = [
        (test, overlap)
        for test, test_rows, pixels_M in embedded
        for overlap in find_overlap(test_rows, pixels_M, rows, findings, reading.pixels_N)
    ]
    found = Results(source, rows, findings, duplicate_P2, overlaps)
    tables = tables_of(found)
    keep_N = kept_images(found, drop)
    for name, columns in COLUMNS.items():
        table = [dict(zip(columns, row, strict=True)) for row in tables[name]]
        write_csv(args.output / f"{name}.csv", table, columns)
    write_text(args.output / "keep.txt", "".join(f"{key}\n" for key in np.asarray(source.keys)[keep_N].tolist()))
    write_page(args.output / "page.html", args.dataset, found, tables, args.shown)
    report(args.output, found, int(keep_N.sum()))


def report(output: Path, found: Results, num_kept: int) -> None:
    """Counts, to stdout and ``summary.json``."""
    findings = found.findings
    counts = {
        "images": len(found.rows),
        "identities": found.rows.num_identities,
        "outliers": len(findings.outlier_F),
        "same_person": len(findings.same_P2),
        "several_people": len(findings.several),
        "duplicates": len(found.duplicate_P2),
        "overlap": len(found.in_test_sets),
        "kept": num_kept,
    }
    write_json(output / "summary.json", counts)
    for note in findings.notes:
        print(f"note: {note}")
    print(
        "{images} images of {identities} identities: {outliers} images closer to another identity, {same_person} pairs "
        "of identities that are one person, {several_people} identities that are several, {duplicates} duplicates, "
        "{overlap} identities in a test set".format(**counts)
    )
    print(f"{output / 'page.html'} shows them; {output / 'keep.txt'} keeps {num_kept} images")
