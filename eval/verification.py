"""Face verification on LFW-style sets.

    python eval/verification.py --model work_dirs/run --data-dir faces --target lfw,cfp_fp,agedb_30 --report report.html
    python eval/verification.py --model backbone.pdparams --network iresnet50 --data-dir lfw --pairs pairs.txt

Accuracy without and with flip (ten folds), VAL@FAR, XNorm, AUC, EER and the best threshold of each set, as a table,
JSON and CSV, with ROC curve, score histogram and the most confident errors as pictures.
"""

import argparse
import math
import sys
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import options
from eval.embed import load_embedder
from eval.pairs import KNOWN_SETS, SetResult, check_set, load_sets, result_table, set_names, set_warnings, verify
from eval.protocols import read_pair_list
from eval.results import check_report, tell, write_pair_results
from eval.stream import claimed
from utils import distributed
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    options.add_model_options(parser, "run directory or weights file (.pdparams, .safetensors, .onnx)", required=True)
    parser.add_argument("--data-dir", type=Path, help="folder of <set>.bin files")
    known = f"those of {','.join(KNOWN_SETS)} that are there"
    parser.add_argument("--target", help=f"comma-separated sets (default: {known})")
    parser.add_argument("--allow-missing", action="store_true", help="go on without targets that are not there")
    parser.add_argument("--image-dir", type=Path, help="images of --pairs, where not in --data-dir")
    parser.add_argument("--pairs", type=Path, help="pair list: LFW's pairs.txt or 'path path label' lines")
    parser.add_argument("--threshold", type=float, help="also judge at this fixed squared-L2 threshold (2 - 2 cos)")
    parser.add_argument("--num-folds", type=int, default=10)
    parser.add_argument("--far", type=float, default=1e-3, help="false-accept rate for VAL")
    options.add_report_options(parser, "JSON, CSV and pictures")
    args = parser.parse_args(argv)
    if args.image_dir is not None and args.pairs is None:
        raise UserError("--image-dir and --pairs belong together: a folder of images and the list of its pairs")
    if args.data_dir is None and (args.pairs is None or args.image_dir is None):
        raise UserError("nothing to judge: give --data-dir (with .bin sets), or a folder of images and --pairs")
    if not 0 < args.far < 1:
        raise UserError(f"--far {args.far}: must lie between 0 and 1, as 1e-3 does")
    check_ranges(args, threshold=(0, 4), batch_size=POSITIVE, num_folds=(2, math.inf), num_errors=COUNT)
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line; under ``paddle.distributed.launch`` the ranks share the work and rank 0 reports."""
    args = _arguments(argv)
    distributed.init(args.device)
    sets, embedder = {}, None
    with distributed.together():
        check_report(args.report, args.compare)
        embedder = load_embedder(
            args.model, args.network, args.engine, args.batch_size, which=args.which, precision=args.precision
        )
        if args.data_dir is not None and (args.pairs is None or args.target or args.image_dir is not None):
            targets = set_names(args.target) if args.target else None
            sets |= load_sets(args.data_dir, targets, args.allow_missing, embedder.input_size)
        if args.pairs is not None:
            name = options.bare_name(args.pairs)
            listed = read_pair_list(args.pairs, args.image_dir or args.data_dir, embedder.input_size)
            check_set(str(args.pairs), listed[1])
            sets[args.pairs.name if name in sets else name] = listed
    folder = args.result_dir or options.default_result_dir(args.model, "verification")
    with claimed(folder, "name another --result-dir"):
        results = verify(embedder, sets, args.batch_size, args.num_folds, args.far, show_progress=True)
        if distributed.get_rank() == 0:
            settings = options.shown_settings(args, Path(args.model).name, engine=embedder.engine)
            _print(write_pair_results(folder, results, sets, settings), results, args.far)
            tell(folder, args.report, args.compare)


def _print(rows: list[dict], results: dict[str, SetResult], far_target: float) -> None:
    for row in rows:
        print("[{set}]XNorm: {xnorm:f}".format(**row))
        print("[{set}]Accuracy: {accuracy:1.5f}+-{accuracy_std:1.5f}".format(**row))
        print("[{set}]Accuracy-Flip: {accuracy_flip:1.5f}+-{accuracy_flip_std:1.5f}".format(**row))
    options.print_table(*result_table(rows, far_target))
    options.print_warnings(set_warnings(results))


if __name__ == "__main__":
    main()
