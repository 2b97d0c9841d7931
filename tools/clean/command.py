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
from pathlib import Path

import numpy as np

from dataset import Source
from eval.embed import load_embedder
from eval.options import add_device_option, add_engine_options
from eval.pages import Page
from tools.clean.against import Overlap, TestSet, embed_test_set, find_overlap, open_test_set
from tools.clean.analysis import Findings, analyse
from tools.clean.duplicates import exact_pairs, near_pairs, pair_cosines, surplus
from tools.clean.reading import read_source
from tools.clean.rows import Rows
from tools.clean.sheets import add_sheets
from tools.sources import open_source
from utils import distributed
from utils.errors import CommandLine, UserError, one_line_errors
from utils.files import write_csv, write_json, write_text
from utils.progress import progress_bar

COLUMNS = {
    "outliers": ("key", "label", "nearest", "cos_own", "cos_nearest"),
    "same_person": ("label_a", "label_b", "cos"),
    "several_people": ("label", "parts", "cos"),
    "parts": ("key", "label", "part"),
    "duplicates": ("key_a", "key_b", "cos"),
    "overlap": ("label", "set", "image", "cos"),
}
DROPS = ("outliers", "same_person", "several_people", "duplicates", "overlap")
_IN_A_ROW = 8  # images of a row of a contact sheet


def test_paths(given: list[str]) -> list[Path]:
    """``--against``: paths, or several with commas between where no such path exists."""
    paths = []
    for text in given:
        parts = [text] if Path(text).exists() else [part.strip() for part in text.split(",")]
        paths += [Path(part) for part in parts if part]
    return paths


def open_test_sets(paths: list[Path]) -> list[TestSet]:
    """The sets of ``--against`` under their file names; two of one name are told apart by their whole paths."""
    names = [path.name or str(path) for path in paths]
    return [
        open_test_set(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


def tables_of(source: Source, rows: Rows, findings: Findings, pair_P2: np.ndarray,
              overlaps: list[tuple[TestSet, list[Overlap]]]) -> dict[str, list[dict]]:  # fmt: skip
    """The rows of every CSV file by its name without suffix."""
    keys, labels = np.asarray(source.keys), rows.label_L
    cosine = "{:.4f}".format
    outliers = zip(
        findings.outlier_F.tolist(),
        findings.nearest_F.tolist(),
        findings.cos_own_F.tolist(),
        findings.cos_nearest_F.tolist(),
        strict=True,
    )
    return {
        "outliers": [
            dict(zip(COLUMNS["outliers"], (
                int(keys[i]), int(labels[rows.identity_N[i]]), int(labels[nearest]), cosine(own), cosine(other)
            ), strict=True))
            for i, nearest, own, other in outliers
        ],
        "same_person": [
            {"label_a": int(labels[a]), "label_b": int(labels[b]), "cos": cosine(cos)}
            for (a, b), cos in zip(findings.same_P2.tolist(), findings.same_cos_P.tolist(), strict=True)
        ],
        "several_people": [
            {"label": int(labels[identity]), "parts": len(people), "cos": cosine(findings.several_cos[identity])}
            for identity, people in findings.several.items()
        ],
        "parts": [
            {"key": int(keys[i]), "label": int(labels[identity]), "part": number}
            for identity, people in findings.several.items()
            for number, images in enumerate(people, 1)
            for i in images.tolist()
        ],
        "duplicates": [
            {"key_a": int(keys[a]), "key_b": int(keys[b]), "cos": cosine(cos)}
            for (a, b), cos in zip(pair_P2.tolist(), pair_cosines(rows, pair_P2).tolist(), strict=True)
        ],
        "overlap": [
            {"label": int(labels[found.identity]), "set": test.name, "image": name, "cos": cosine(cos)}
            for test, overlap in overlaps
            for found in overlap
            for i, cos in zip(found.number_F.tolist(), found.cos_F.tolist(), strict=True)
            for name in test.names_M[i]
        ],
    }  # fmt: skip


def kept_images(rows: Rows, findings: Findings, pair_P2: np.ndarray,
                overlaps: list[tuple[TestSet, list[Overlap]]], drop: tuple[str, ...]) -> np.ndarray:  # fmt: skip
    """Images that nothing in ``drop`` speaks against, bool [N].

    Of several people under one label the first stays, of several labels of one person the largest, of duplicates one.
    """
    keep_N = np.ones(len(rows), bool)
    if "outliers" in drop:
        keep_N[findings.outlier_F] = False
    if "several_people" in drop:
        for people in findings.several.values():
            keep_N[np.concatenate(people[1:])] = False
    if "overlap" in drop:
        for identity in {found.identity for _, overlap in overlaps for found in overlap}:
            keep_N[rows.images_of(identity)] = False
    if "same_person" in drop:
        # The smaller label of a pair goes, the smallest first, so that of a chain of labels one is left.
        left_L = np.bincount(rows.identity_N[keep_N], minlength=rows.num_identities)
        gone = left_L == 0
        for pair in sorted(findings.same_P2.tolist(), key=lambda pair: min(left_L[pair])):
            if not gone[pair].any():
                smaller = pair[0] if left_L[pair[0]] < left_L[pair[1]] else pair[1]
                gone[smaller] = True
                keep_N[rows.images_of(smaller)] = False
    if "duplicates" in drop:
        both = pair_P2[keep_N[pair_P2].all(1)] if len(pair_P2) else pair_P2
        keep_N &= ~surplus(both, len(rows))
    return keep_N


def write_page(path: Path, source: Source, root: Path, rows: Rows, findings: Findings, pair_P2: np.ndarray,
               overlaps: list[tuple[TestSet, list[Overlap]]], tables: dict[str, list[dict]],
               most: int) -> None:  # fmt: skip
    """Contact sheets of the first ``most`` cases of each kind."""
    page = Page(f"Labels of {root}")

    def mine(images) -> list:
        return [(lambda i: source[i][0], int(i)) for i in images]

    def others_of(identity: int, but: np.ndarray) -> np.ndarray:
        images = rows.images_of(identity)
        return images[~np.isin(images, but)][:_IN_A_ROW]

    label = rows.label_L
    counts = {name: len(table) for name, table in tables.items()}
    page.table(("what", "found"), [(f"{name}.csv", counts[name]) for name in COLUMNS])
    cases = [
        (f"{source.describe(i)}: label {label[rows.identity_N[i]]} ({row['cos_own']}), "
         f"nearest {label[nearest]} ({row['cos_nearest']})",
         [mine([i]), mine(others_of(rows.identity_N[i], findings.outlier_F)),
          mine(others_of(nearest, findings.outlier_F))])
        for i, nearest, row in zip(findings.outlier_F[:most].tolist(), findings.nearest_F[:most].tolist(),
                                   tables["outliers"][:most], strict=True)
    ]  # fmt: skip
    text = "First row: the image. Second: others of its label. Third: the identity that it is closer to."
    add_sheets(page, "Images closer to another identity", text, cases, counts["outliers"])
    cases = [
        (f"labels {row['label_a']} and {row['label_b']}: cosine {row['cos']}",
         [mine(rows.images_of(identity)[:_IN_A_ROW]) for identity in pair])
        for pair, row in zip(findings.same_P2[:most].tolist(), tables["same_person"][:most], strict=True)
    ]  # fmt: skip
    add_sheets(page, "Identities that are one person", "A row a label.", cases, counts["same_person"])
    cases = [
        (f"label {label[identity]}: {', '.join(str(len(images)) for images in people)} images",
         [mine(images[:_IN_A_ROW]) for images in people])
        for identity, people in list(findings.several.items())[:most]
    ]  # fmt: skip
    add_sheets(page, "Identities that are several people", "A row a person.", cases, counts["several_people"])
    cases = [
        (f"keys {row['key_a']} and {row['key_b']}: cosine {row['cos']}", [mine(pair)])
        for pair, row in zip(pair_P2[:most].tolist(), tables["duplicates"][:most], strict=True)
    ]
    add_sheets(page, "Duplicates", "A pair a sheet.", cases, counts["duplicates"])
    cases = [
        (f"label {label[found.identity]} and {test.name}: cosine {found.cos_F[0]:.4f}",
         [mine(rows.images_of(found.identity)[:_IN_A_ROW]),
          [(lambda i, test=test: test.get(i, 112), int(i)) for i in found.number_F[:_IN_A_ROW]]])
        for test, overlap in overlaps for found in overlap
    ]  # fmt: skip
    text = "First row: the data set's. Second: the test set's."
    add_sheets(page, "Identities that are in a test set", text, cases[:most], len(cases))
    page.heading("Thresholds")
    page.text("Closenesses measured on this data set (see docs/tutorials/clean.md).")
    limits = findings.thresholds
    page.table(("what", "value"), [
        ("groups of one label are two people below", f"{limits.person:.3f}"),
        *((f"labels are one person above, from {size} images on", f"{same:.3f}") for size, same in limits.same.items()),
        ("an image is closer to another identity by more than", f"{limits.outlier:.3f}"),
        ("mean cosine of two images of one identity (median)", f"{findings.parts.typical:.3f}"),
    ])  # fmt: skip
    page.write(path)


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = CommandLine(__doc__, prog="clean.py")
    parser.add_argument("dataset", type=Path, help="record set, folder of identities, list, or tar shards")
    parser.add_argument("--model", required=True, help="run directory, weights file or .onnx")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--against", nargs="+", default=[], metavar="SET", help="test sets that it must not overlap")
    parser.add_argument("--drop", default=",".join(DROPS), help="what keep.txt leaves out (default: %(default)s)")
    parser.add_argument("--shown", type=int, default=50, help="cases of each kind on the page (default: %(default)s)")
    parser.add_argument("--prefix", default="train", help="name of a record set's files without suffix")
    parser.add_argument("--resize", action="store_true", help="stretch images that are not square")
    parser.add_argument("--network", help="backbone name, where the model does not say it")
    parser.add_argument("--which", default="last", choices=("last", "best"), help="weights of a run directory")
    add_engine_options(parser)
    parser.add_argument("--batch-size", type=int, default=64)
    add_device_option(parser)
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
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
        tests = open_test_sets(test_paths(args.against))
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
    pair_P2 = np.unique(np.concatenate([near_P2, np.sort(exact_pairs(reading.pixels_N), axis=1)]), axis=0)
    overlaps = [
        (test, find_overlap(test_rows, pixels_M, rows, findings, reading.pixels_N))
        for test, test_rows, pixels_M in embedded
    ]
    tables = tables_of(source, rows, findings, pair_P2, overlaps)
    keep_N = kept_images(rows, findings, pair_P2, overlaps, drop)
    for name, table in tables.items():
        write_csv(args.output / f"{name}.csv", table, COLUMNS[name])
    write_text(args.output / "keep.txt", "".join(f"{key}\n" for key in np.asarray(source.keys)[keep_N].tolist()))
    write_page(args.output / "page.html", source, args.dataset, rows, findings, pair_P2, overlaps, tables, args.shown)
    report(args.output, rows, findings, tables, overlaps, keep_N)


def report(output: Path, rows: Rows, findings: Findings, tables: dict[str, list[dict]], overlaps: list,
           keep_N: np.ndarray) -> None:  # fmt: skip
    """Counts, to stdout and ``summary.json``."""
    several = len(findings.several)
    counts = {
        "images": len(rows),
        "identities": rows.num_identities,
        "outliers": len(findings.outlier_F),
        "same_person": len(findings.same_P2),
        "several_people": several,
        "duplicates": len(tables["duplicates"]),
        "overlap": len({found.identity for _, overlap in overlaps for found in overlap}),
        "kept": int(keep_N.sum()),
    }
    write_json(output / "summary.json", counts)
    for note in findings.notes:
        print(f"note: {note}")
    print(
        f"{counts['images']} images of {counts['identities']} identities: {counts['outliers']} images closer to "
        f"another identity, {counts['same_person']} pairs of identities that are one person, {several} identities "
        f"that are several, {counts['duplicates']} duplicates, {counts['overlap']} identities in a test set"
    )
    print(f"{output / 'page.html'} shows them; {output / 'keep.txt'} keeps {counts['kept']} images")
