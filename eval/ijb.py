"""Template verification and identification: IJB-B, IJB-C, and sets of one's own.

    python eval/ijb.py --model work_dirs/run --image-path IJB_release/IJBC --target IJBC --result-dir results/ijbc
    python eval/ijb.py --model work_dirs/run --protocol my_set --result-dir results/my_set

Aligns every crop by its five landmarks, embeds it and its mirror image, pools templates, scores the pairs and prints
TAR@FAR in the published layout (the curve point nearest in FAR), then the strict table with the FAR actually used; 1:N
where gallery and probe lists are there. ``scores.npy``, ``ijb.json``, ``ijb.csv`` and ROC pictures go to --result-dir.
Embeddings are kept there too (``features.npy``) or where --features says: an interrupted run goes on, a later one with
other switches embeds nothing. A cache of other weights is made anew, but one named by --features is an error.

The switches, by their letters (the published default is N1D1F1; public scripts give ``use_norm_score`` opposite
meanings, so here the word only ever means "keep"):

    --use-norm-score      N1 keeps the embedding's norm as a quality weight; N0 (--no-...) makes it a unit vector first
    --use-detector-score  D1 multiplies by the detector's score; D0 does not
    --use-flip-test       F1 adds the mirror image's embedding; F0 uses the image's alone
"""

import argparse
import sys
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from eval import options, tables
from eval.embed import load_embedder
from eval.features import Features, protocol_features, weights_digest
from eval.metrics import FARS
from eval.protocols import TemplateProtocol, read_csv_protocol, read_ijb
from eval.remarks import template_remarks
from eval.results import check_report, tell, write_template_results
from eval.stream import claimed
from utils import distributed
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    model_help = "run directory or weights file; not needed where --features is complete"
    options.add_model_options(parser, model_help, required=False)
    parser.add_argument("--image-path", type=Path, help="folder with meta/ and loose_crop/")
    parser.add_argument("--target", default="IJBC", help="IJBC, IJBB, or the prefix of another set of that layout")
    parser.add_argument("--protocol", type=Path, help="folder with images.csv and pairs.csv (instead of --image-path)")
    parser.add_argument("--features", type=Path, help="cache of embeddings (default: in --result-dir)")
    switch = {"action": argparse.BooleanOptionalAction, "default": True}
    for letter, name in (("N", "norm-score"), ("D", "detector-score"), ("F", "flip-test")):
        parser.add_argument(f"--use-{name}", help=f"{letter}1 or {letter}0", **switch)
    parser.add_argument("--all-settings", action="store_true", help="all eight N/D/F rows in the table")
    parser.add_argument("--identification", help="1:N, if listed", **switch)
    parser.add_argument("--num-threads", type=int, help="threads that read and align (default: one a core)")
    options.add_report_options(parser, "scores, tables and pictures")
    args = parser.parse_args(argv)
    if (args.image_path is None) == (args.protocol is None):
        raise UserError("give either --image-path (with --target) or --protocol")
    if args.model is None and args.features is None:
        raise UserError("give --model, or --features with embeddings that are complete")
    check_ranges(args, batch_size=POSITIVE, num_threads=POSITIVE, num_errors=COUNT)
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line; under ``paddle.distributed.launch`` the ranks share the embedding, rank 0 judges and reports."""
    args = _arguments(argv)
    distributed.init(args.device)
    protocol, digest = None, None
    with distributed.together():
        check_report(args.report, args.compare)
        protocol = read_ijb(args.image_path, args.target) if args.protocol is None else read_csv_protocol(args.protocol)
        digest = None if args.model is None else weights_digest(args.model, args.which, args.precision)
    if distributed.get_rank() == 0:
        images = f"{len(protocol.image_N):,} images, {len(np.unique(protocol.template_N)):,} templates"
        pairs = f"{len(protocol.same_P):,} pairs ({int(protocol.same_P.sum()):,} genuine)"
        print(f"{protocol.name}: {images}, {pairs}", flush=True)

    def load():
        return load_embedder(
            args.model, args.network, args.engine, args.batch_size, which=args.which, precision=args.precision
        )

    source = args.model or args.features
    folder = args.result_dir or options.default_result_dir(source, f"ijb/{protocol.name}")
    with claimed(folder, "name another --result-dir"):
        features = protocol_features(
            protocol,
            None if args.model is None else load,
            digest,
            args.features or folder / "features.npy",
            num_threads=args.num_threads,
            replace=args.features is None,
        )
        if distributed.get_rank() == 0:
            _report(args, folder, protocol, features)


def _report(args: argparse.Namespace, folder: Path, protocol: TemplateProtocol, features: Features) -> None:
    """Judge the features; print and write what came out."""
    chosen = tables.Setting(args.use_norm_score, args.use_detector_score, args.use_flip_test)
    result = tables.evaluate_templates(protocol, features.feature_N2D, chosen)
    every = {}
    for setting in tables.ALL_SETTINGS if args.all_settings else (chosen,):
        judged = result if setting == chosen else tables.evaluate_templates(protocol, features.feature_N2D, setting)
        every[str(setting)] = judged.table
    options.print_table(*tables.published_table(protocol, every))
    options.print_table(*tables.strict_table(result))
    identification = tables.identify(protocol, result.template_T, result.feature_TD) if args.identification else []
    if identification:
        options.print_table(*tables.identification_table(identification))
    warnings = template_remarks(protocol, result.feature_TD, result.score_P, FARS, features.num_outside)
    options.print_warnings(warnings)
    settings = options.shown_settings(args, Path(args.model or args.features).name, setting=str(chosen))
    write_template_results(folder, protocol, result, every, identification, settings, warnings)
    tell(folder, args.report, args.compare)


if __name__ == "__main__":
    main()
