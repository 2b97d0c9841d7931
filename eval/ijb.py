"""Template verification and identification: IJB-B, IJB-C, and sets of one's own.

    python eval/ijb.py --model work_dirs/run --image-path IJB_release/IJBC --target IJBC --result-dir results/ijbc
    python eval/ijb.py --model work_dirs/run --protocol my_set --result-dir results/my_set

Aligns every crop by its five landmarks, embeds it and its mirror image, pools templates, scores the pairs and prints
TAR@FAR in the published layout (the curve point nearest in FAR), then the strict table with the FAR actually used; 1:N
where gallery and probe lists are there. ``scores.npy``, ``ijb.json``, ``ijb.csv`` and ROC pictures go to --result-dir.
Embeddings are kept there too (``features.npy``) or where --features says: an interrupted run goes on, a later one with
other switches embeds nothing. A cache of other weights is made anew, but one named by --features is an error.

The switches, by their letters (the published default is N1D1F1; trap: two public scripts give ``use_norm_score``
opposite meanings, so here the word only ever means "keep"):

    --use-norm-score      N1 keeps the embedding's norm as a quality weight; N0 (--no-...) makes it a unit vector first
    --use-detector-score  D1 multiplies by the detector's score; D0 does not
    --use-flip-test       F1 adds the mirror image's embedding; F0 uses the image's alone

Legend: N images, D embedding size, T templates, P pairs.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from prettytable import PrettyTable

from eval.embed import load_embedder
from eval.features import aligned_image, protocol_features, weights_digest
from eval.identification import ClosedSet, OpenSet, PairRecall, cmc, pair_recall, tpir_at_fpir
from eval.metrics import FARS, TarAtFar, roc_at, tar_at_far
from eval.options import add_model_options, add_report_options, default_result_dir, told_settings
from eval.plots import draw_errors, draw_histogram, draw_roc
from eval.protocols import SubjectList, TemplateProtocol, read_csv_protocol, read_ijb
from eval.report import write_csv, write_json, write_report
from eval.search import search
from eval.templates import pool_templates, score_pairs
from utils import distributed
from utils.errors import UserError, one_line_errors

NOTES = (
    "TAR@FAR: the ROC point nearest in FAR, as published tables have it; it may lie above the FAR asked for. Strict: "
    "the lowest threshold whose FAR does not exceed it.",
    "Closed set: share of mated probes found within the best k subjects. Open set: TPIR is the share of mated probes "
    "accepted at rank 1, at the lowest threshold whose FPIR (share of non-mated probes with an accepted candidate) is "
    "not above the one asked for.",
    "All galleries together: the closed-set numbers of the reference script; its 'FAR' accepts as many impostor PAIRS "
    "as the given share of the probes, which is neither a pair rate nor FPIR.",
)


@dataclass(frozen=True)
class Setting:
    """The N/D/F switches (see the module's text)."""

    norm: bool = True
    detector: bool = True
    flip: bool = True

    def __str__(self) -> str:
        return f"N{int(self.norm)}D{int(self.detector)}F{int(self.flip)}"

    def transform(self, score_N: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Stored rows [n, 2, D] and their image indices -> features [n, D] float64."""

        def apply(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
            feature = rows[:, 0].astype(np.float64)
            if self.flip:
                feature += rows[:, 1]
            if not self.norm:
                length = np.sqrt(np.einsum("ij,ij->i", feature, feature))
                length[length == 0] = 1
                feature /= length[:, None]
            if self.detector:
                feature *= score_N[index][:, None]
            return feature

        return apply


ALL_SETTINGS = tuple(Setting(n, d, f) for n in (False, True) for d in (False, True) for f in (False, True))


@dataclass(frozen=True)
class TemplateResult:
    """What one setting gives: pooled templates, the score of every pair (float64) and the table."""

    setting: Setting
    template_T: np.ndarray = field(repr=False)
    feature_TD: np.ndarray = field(repr=False)
    score_P: np.ndarray = field(repr=False)
    table: tuple[TarAtFar, ...]


Tables = dict[str, tuple[TarAtFar, ...]]  # by setting


@dataclass(frozen=True)
class Identification:
    """1:N figures of one gallery; what a list does not allow (no non-mated probes, say) is None."""

    gallery: str
    closed: ClosedSet | None
    open: tuple[OpenSet, ...] | None
    reference: tuple[PairRecall, ...] | None = None


def evaluate_templates(protocol: TemplateProtocol, feature_N2D: np.ndarray, setting: Setting) -> TemplateResult:
    """Features to table. Raises ``UserError`` for features that are not finite."""
    try:
        template_T, feature_TD = pool_templates(
            feature_N2D, protocol.template_N, protocol.media_N, setting.transform(protocol.score_N)
        )
    except ValueError as error:
        raise UserError(f"{protocol.name}: {error}") from error
    score_P = score_pairs(template_T, feature_TD, protocol.left_P, protocol.right_P)
    return TemplateResult(setting, template_T, feature_TD, score_P, tuple(tar_at_far(score_P, protocol.same_P, FARS)))


def identify(protocol: TemplateProtocol, template_T: np.ndarray, feature_TD: np.ndarray) -> list[Identification]:
    """Every gallery by itself, then all together as the reference script has it."""
    if protocol.probes is None or not protocol.galleries:
        return []

    def of(listed: SubjectList) -> np.ndarray:
        return feature_TD[np.searchsorted(template_T, listed.template_T)]

    probe_QD, probes = of(protocol.probes), protocol.probes.subject_T
    rows = []
    for name, gallery in protocol.galleries.items():
        found = search(of(gallery), gallery.subject_T, probe_QD, probes)
        mated = found.mated_Q
        open_set = tuple(tpir_at_fpir(found)) if mated.any() and not mated.all() else None
        rows.append(Identification(name, cmc(found) if mated.any() else None, open_set))
    merged = SubjectList(*(np.concatenate(parts) for parts in zip(*(
        (gallery.template_T, gallery.subject_T) for gallery in protocol.galleries.values()), strict=True)))  # fmt: skip
    num_impostors = max(1, -(-len(probes) // 10))
    found = search(of(merged), merged.subject_T, probe_QD, probes, num_impostors)
    if found.mated_Q.any() and found.num_subjects > 1:
        enough = len(found.impostor_K) >= num_impostors
        rows.append(Identification("all", cmc(found), None, tuple(pair_recall(found)) if enough else None))
    return rows


def published_table(protocol: TemplateProtocol, tables: Tables) -> tuple[list[str], list[list[str]]]:
    """The reference's layout: one row a setting, percent with two decimals."""
    name = f"{protocol.name.lower()}-{protocol.name}"
    names = {setting: name if len(tables) == 1 else f"{name} {setting}" for setting in tables}
    body = [[names[key], *(f"{100 * point.nearest:.2f}" for point in table)] for key, table in tables.items()]
    return ["Methods", *(str(far) for far in FARS)], body


def strict_table(result: TemplateResult) -> tuple[list[str], list[list[str]]]:
    """Strict TAR and the FAR actually used, beside the FAR that the published table used."""
    rows = (
        ("strict TAR (%)", [f"{100 * point.strict:.2f}" for point in result.table]),
        ("FAR used", [f"{point.strict_far:.3e}" for point in result.table]),
        ("threshold", [f"{point.threshold:.4f}" for point in result.table]),
        ("nearest: TAR (%)", [f"{100 * point.nearest:.2f}" for point in result.table]),
        ("nearest: FAR used", [f"{point.nearest_far:.3e}" for point in result.table]),
    )
    return [f"{result.setting}", *(str(far) for far in FARS)], [[name, *values] for name, values in rows]


def identification_table(rows: list[Identification]) -> tuple[list[str], list[list[str]]]:
    """One row a gallery, percent."""
    head = [
        "Gallery",
        "Rank-1",
        "Rank-5",
        "Rank-10",
        "TPIR@FPIR=0.01",
        "TPIR@FPIR=0.1",
        "reference: FAR=0.01",
        "FAR=0.1",
    ]
    body = []
    for row in rows:
        closed = [f"{100 * rate:.2f}" for rate in row.closed.rates] if row.closed else ["-"] * 3
        tpir = [f"{100 * point.tpir:.2f}" for point in row.open] if row.open else ["-"] * 2
        recall = [f"{100 * point.recall:.2f}" for point in row.reference] if row.reference else ["-"] * 2
        body.append([row.gallery, *closed, *tpir, *recall])
    return head, body


def write_results(
    folder: Path,
    protocol: TemplateProtocol,
    result: TemplateResult,
    every: Tables,
    identification: list[Identification],
    settings: dict,
) -> None:
    """``scores.npy``, ``ijb.json``, ``ijb.csv`` and pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "scores.npy", result.score_P)
    far_grid = np.logspace(-6, 0, 241)
    far_grid = far_grid[far_grid >= 0.5 / np.count_nonzero(~protocol.same_P)]
    curve = (far_grid.tolist(), roc_at(result.score_P, protocol.same_P, far_grid).tolist())
    for suffix in ("pdf", "png"):
        draw_roc({f"{settings['label']} {result.setting}": curve}, folder / f"roc.{suffix}", f"{protocol.name} 1:1")
    draw_histogram(result.score_P, protocol.same_P, folder / "histogram.png", f"{protocol.name}: template scores")
    pictures = [{"file": "roc.png", "title": "ROC"}, {"file": "histogram.png", "title": "Score histogram"}]
    errors = _worst(protocol, result, settings["num_errors"])
    if errors is not None:
        draw_errors(errors, folder / "errors.png", f"{protocol.name}: most alike impostors, least alike genuine pairs")
        pictures.append({"file": "errors.png", "title": "Worst pairs (first image of each template)"})
    tables = [
        ("TAR@FAR (%), nearest point", published_table(protocol, every)),
        ("Strict TAR@FAR", strict_table(result)),
    ]
    if identification:
        tables.append(("Identification 1:N (%)", identification_table(identification)))
    content = {
        "kind": "ijb",
        "label": settings["label"],
        "settings": settings,
        "tar_at_far": {key: [asdict(point) for point in table] for key, table in every.items()},
        "identification": [asdict(row) for row in identification],
        "tables": [
            {"title": f"{protocol.name}: {title}", "head": head, "rows": body} for title, (head, body) in tables
        ],
        "roc": {f"{protocol.name} 1:1": {"far": curve[0], "tar": curve[1]}},
        "pictures": pictures,
        "notes": NOTES,
    }
    write_json(folder / "ijb.json", content)
    write_csv(
        folder / "ijb.csv", [{"setting": key, **asdict(point)} for key, table in every.items() for point in table]
    )


def _worst(protocol: TemplateProtocol, result: TemplateResult, count: int):
    """Half impostors that score highest, half genuine pairs that score lowest; None where images are not at hand."""
    first = {int(template): index for index, template in reversed(list(enumerate(protocol.template_N)))}
    chosen = []
    for same, sign, share in ((False, -1, count - count // 2), (True, 1, count // 2)):
        pairs = np.flatnonzero(protocol.same_P == same)
        share = min(share, len(pairs))
        part = np.argpartition(sign * result.score_P[pairs], share - 1)[:share] if share else np.empty(0, np.int64)
        chosen += sorted(pairs[part].tolist(), key=lambda pair: (sign * result.score_P[pair], pair))
    cells = []
    for pair in chosen:
        ids = [int(side[pair]) for side in (protocol.left_P, protocol.right_P)]
        if not all((protocol.image_dir / protocol.image_N[first[template]]).is_file() for template in ids):
            return None
        kind = "same" if protocol.same_P[pair] else "different"
        images = [aligned_image(protocol, first[template], 112) for template in ids]
        cells.append((*images, f"{ids[0]}, {ids[1]}: {kind}, {result.score_P[pair]:.2f}"))
    return cells


def _print_table(head: list[str], body: list[list[str]]) -> None:
    table = PrettyTable(head)
    table.add_rows(body)
    print(table, flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, "run directory or weights file; not needed where --features is complete", required=False)
    parser.add_argument("--image-path", type=Path, help="folder with meta/ and loose_crop/")
    parser.add_argument("--target", default="IJBC", help="IJBC, IJBB, or the prefix of another set of that layout")
    parser.add_argument("--protocol", type=Path, help="folder with images.csv and pairs.csv (instead of --image-path)")
    parser.add_argument("--features", type=Path, help="cache of embeddings (default: in --result-dir)")
    for letter, name in (("N", "norm-score"), ("D", "detector-score"), ("F", "flip-test")):
        parser.add_argument(
            f"--use-{name}", action=argparse.BooleanOptionalAction, default=True, help=f"{letter}1 or {letter}0"
        )
    parser.add_argument("--all-settings", action="store_true", help="all eight N/D/F rows in the table")
    parser.add_argument("--identification", action=argparse.BooleanOptionalAction, default=True, help="1:N, if listed")
    parser.add_argument("--num-threads", type=int, help="threads that read and align (default: one a core)")
    add_report_options(parser, "scores, tables and pictures")
    args = parser.parse_args(argv)
    if (args.image_path is None) == (args.protocol is None):
        raise UserError("give either --image-path (with --target) or --protocol")
    if args.model is None and args.features is None:
        raise UserError("give --model, or --features with embeddings that are complete")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line; under ``paddle.distributed.launch`` the ranks share the embedding, rank 0 judges and reports."""
    args = _arguments(argv)
    distributed.init(args.device)
    protocol, digest, failure = None, None, None
    try:
        protocol = read_ijb(args.image_path, args.target) if args.protocol is None else read_csv_protocol(args.protocol)
        digest = None if args.model is None else weights_digest(args.model, args.which)
    except (OSError, ValueError) as error:
        failure = error
    distributed.raise_together(failure)
    if distributed.get_rank() == 0:
        print(f"{protocol.name}: {len(protocol.image_N):,} images, {len(np.unique(protocol.template_N)):,} templates, "
              f"{len(protocol.same_P):,} pairs ({int(protocol.same_P.sum()):,} genuine)", flush=True)  # fmt: skip

    def load():
        return load_embedder(args.model, args.network, args.engine, args.batch_size, which=args.which)

    source = args.model or args.features
    folder = args.result_dir or default_result_dir(source, f"ijb/{protocol.name}")
    feature_N2D = protocol_features(
        protocol,
        None if args.model is None else load,
        digest,
        args.features or folder / "features.npy",
        args.num_threads,
        replace=args.features is None,
    )
    if distributed.get_rank() != 0:
        return
    chosen = Setting(args.use_norm_score, args.use_detector_score, args.use_flip_test)
    result = evaluate_templates(protocol, feature_N2D, chosen)
    every = {str(chosen): result.table}
    if args.all_settings:
        every = {str(s): every.get(str(s)) or evaluate_templates(protocol, feature_N2D, s).table for s in ALL_SETTINGS}
    _print_table(*published_table(protocol, every))
    _print_table(*strict_table(result))
    identification = identify(protocol, result.template_T, result.feature_TD) if args.identification else []
    if identification:
        _print_table(*identification_table(identification))
    settings = told_settings(args, Path(source).name, setting=str(chosen))
    write_results(folder, protocol, result, every, identification, settings)
    print(f"results in {folder}")
    if args.report is not None:
        write_report(args.report, [folder, *args.compare])
        print(f"report {args.report}")


if __name__ == "__main__":
    main()
