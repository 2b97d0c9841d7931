"""MegaFace-style identification among distractors, on feature files.

    python eval/megaface.py --probes facescrub.npy --subjects facescrub.txt --distractors megaface.npy --result-dir out

``--probes``: [N, D] features of people with several images each; ``--subjects``: one name a line, line i being row i.
``--distractors``: [M, D] features of other people. ``.npy``, or a text list of single-vector ``.bin`` files as the
MegaFace tools write them (int32 rows, columns, stride, type, then float32).

For every ordered pair (probe, other image of the same person): found at rank k if fewer than k of the first n
distractors score at least as high (``--shuffle SEED`` draws another order of distractors). TAR@FAR: genuine pairs are
those same pairs (each once), impostor pairs are all probe x distractor pairs, FAR strict.
"""

import sys
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from eval.distractors import FARS, SIZES, identify_among_distractors, load_features
from eval.options import bare_name, print_table, print_warnings
from eval.remarks import distractor_remarks
from eval.results import check_report, tell, write_distractor_results
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors
from utils.owner import claim
from utils.text import plain, read_text


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("--probes", type=Path, required=True)
    parser.add_argument("--subjects", type=Path, required=True)
    parser.add_argument("--distractors", type=Path, required=True)
    every = ",".join(map(str, SIZES))
    parser.add_argument("--sizes", default=every, help="numbers of distractors (default: %(default)s)")
    parser.add_argument("--shuffle", type=int, help="seed of another order of distractors")
    parser.add_argument("--label", help="name of this run in reports (default: the probe file's)")
    parser.add_argument("--result-dir", type=Path, default=Path("work_dirs/megaface"))
    parser.add_argument("--report", type=Path, help="also write one self-contained HTML page")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="result folders of other runs")
    args = parser.parse_args(argv)
    check_ranges(args, shuffle=COUNT)
    sizes = [size.strip() for size in args.sizes.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--sizes {args.sizes}: positive whole numbers, separated by commas")
    check_report(args.report, args.compare)
    probe_ND, distractor_MD = load_features(args.probes), load_features(args.distractors)
    if not args.subjects.is_file():
        raise UserError(f"{args.subjects}: no such file; one subject a line, in the order of the probes, is needed")
    subjects = np.array([line.strip() for line in read_text(args.subjects).rstrip("\n").split("\n")])
    if args.shuffle is not None:
        distractor_MD = distractor_MD[np.random.default_rng(args.shuffle).permutation(len(distractor_MD))]
    sizes = tuple(map(int, sizes))
    try:
        result = identify_among_distractors(probe_ND, subjects, distractor_MD, sizes, show_progress=True)
    except UserError as error:
        raise UserError(f"{args.probes}, {args.distractors}: {error}") from error
    folder, label = args.result_dir, plain(args.label or bare_name(args.probes))
    warnings = distractor_remarks(result, sizes, FARS, len(distractor_MD))
    settings = {key: str(value) for key, value in vars(args).items() if value is not None} | {"label": label}
    with claim(folder, "name another --result-dir"):
        for _, head, rows in write_distractor_results(folder, result, settings, warnings):
            print_table(head, rows)
        print_warnings(warnings)
        tell(folder, args.report, args.compare)


if __name__ == "__main__":
    main()
