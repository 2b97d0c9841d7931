"""Face verification on LFW-style sets.

    python eval/verification.py --model work_dirs/run --data-dir faces --target lfw,cfp_fp,agedb_30 --report report.html
    python eval/verification.py --model backbone.pdparams --network iresnet50 --data-dir lfw --pairs pairs.txt

Accuracy without and with flip (ten folds), VAL@FAR, XNorm, AUC, EER and the best threshold of each set, as a table,
JSON and CSV, with ROC curve, score histogram and the most confident errors as pictures.

Legend: P pairs, N = 2P images (2i and 2i+1 are pair i), D embedding size, W ranks.
"""

import argparse
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import paddle
from prettytable import PrettyTable

from eval.bins import load_bin
from eval.embed import Embedder, load_embedder
from eval.metrics import VerificationMetrics, accuracy_at, distance_metrics, pair_distances, roc_at
from eval.options import add_model_options, add_report_options, default_result_dir, told_settings
from eval.plots import draw_errors, draw_histogram, draw_roc
from eval.protocols import read_pair_list
from eval.report import write_csv, write_json, write_report
from utils import distributed
from utils.decode import fit_image
from utils.errors import UserError, one_line_errors
from utils.progress import progress_bar

KNOWN_SETS = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw", "vgg2_fp", "cfp_ff")
Pairs = tuple[np.ndarray, np.ndarray]  # images uint8 [2P, H, W, 3] RGB, same bool [P]


@dataclass(frozen=True)
class SetResult:
    """One set. ``metrics`` is with flip (embedding plus that of the mirror image); ``no_flip`` is without.

    ``xnorm`` is the mean norm of the raw embeddings over both passes; ``distance_P`` are squared L2 distances.
    """

    name: str
    metrics: VerificationMetrics
    no_flip: VerificationMetrics
    xnorm: float
    distance_P: np.ndarray = field(repr=False, compare=False)
    same_P: np.ndarray = field(repr=False, compare=False)


def verify(
    model: object,
    sets: Mapping[str, Pairs],
    batch_size: int = 64,
    num_folds: int = 10,
    far_target: float = 1e-3,
    show_progress: bool = False,
) -> dict[str, SetResult]:
    """Judge a model on verification sets; every rank enters and gets the same result, whatever their number.

    Batches are cut from the set alone, then dealt to the ranks, so that no embedding depends on W. Where the model is a
    layer whose buffers differ between ranks (batch-norm statistics), all ranks use rank 0's, which is what is saved.

    Args:
        model: an ``Embedder``, or a Paddle layer (its train/eval mode is kept).
        sets: name -> (images, same); images of another size are resized to the network's input.

    Raises:
        UserError: a set that cannot be judged, named, on every rank.
    """
    is_layer = isinstance(model, paddle.nn.Layer)
    embedder = load_embedder(model, batch_size=batch_size) if is_layer else model
    results = {}
    with _buffers_of_rank_zero(model if is_layer else None):
        for name, (image_NHWC, same_P) in sets.items():
            embedding_N2D = _embed(embedder, image_NHWC, batch_size, name, show_progress)
            try:
                results[name] = _judge(name, embedding_N2D, same_P, num_folds, far_target)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from error
    return results


def load_sets(
    data_dir: Path, targets: list[str] | None = None, allow_missing: bool = False, size: int = 112
) -> dict[str, Pairs]:
    """``<data_dir>/<name>.bin`` of each target, images brought to ``size`` x ``size``.

    Without targets, whichever of the known sets are there.

    Raises:
        UserError: sets that were asked for are missing (all are named), or there is none at all.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; --data-dir must hold the .bin sets")
    missing = [name for name in targets or () if not (data_dir / f"{name}.bin").is_file()]
    if missing and not allow_missing:
        raise UserError(
            f"{data_dir}: {', '.join(f'{n}.bin' for n in missing)} missing; get them, or pass --allow-missing"
        )
    names = [name for name in targets or KNOWN_SETS if (data_dir / f"{name}.bin").is_file()]
    if not names:
        raise UserError(
            f"{data_dir}: none of {', '.join(f'{n}.bin' for n in targets or KNOWN_SETS)} is there; use --target"
        )
    return {name: load_bin(data_dir / f"{name}.bin", (size, size)) for name in names}


def _embed(embedder: Embedder, image_NHWC: np.ndarray, batch_size: int, name: str, show: bool) -> np.ndarray:
    """Raw embeddings of the images and of their mirror images, [N, 2, D] float32, complete on every rank."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    num_images, num_batches = len(image_NHWC), -(-len(image_NHWC) // batch_size)
    rounds = -(-num_batches // world_size)
    local = np.zeros((rounds, batch_size, 2, embedder.embedding_size), np.float32)
    failure = None
    try:
        with progress_bar(name, num_images, enabled=show and rank == 0) as advance:
            for index in range(rank, num_batches, world_size):
                start = index * batch_size
                batch = _resized(image_NHWC[start : start + batch_size], embedder.input_size)
                for mirrored in (0, 1):
                    local[index // world_size, : len(batch), mirrored] = embedder(batch, flip=bool(mirrored))
                advance(min(len(batch) * world_size, num_images - start))
    except Exception as error:  # whatever it is, the other ranks wait in the collective below
        failure = error
    distributed.raise_together(failure)
    if world_size > 1:
        gathered = distributed.all_gather_rows(paddle.to_tensor(local)).numpy()
        local = gathered.reshape(world_size, *local.shape).swapaxes(0, 1)
    return local.reshape(-1, 2, embedder.embedding_size)[:num_images]


def _judge(name, embedding_N2D, same_P, num_folds, far_target):
    both = embedding_N2D.astype(np.float64)
    distance_P = pair_distances(both.sum(1))
    return SetResult(
        name=name,
        metrics=distance_metrics(distance_P, same_P, num_folds, far_target),
        no_flip=distance_metrics(pair_distances(both[:, 0]), same_P, num_folds, far_target),
        xnorm=float(np.sqrt(np.square(both).sum(2)).mean()),
        distance_P=distance_P,
        same_P=np.asarray(same_P).astype(bool),
    )


@contextmanager
def _buffers_of_rank_zero(layer):
    if layer is None or distributed.get_world_size() == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        for buffer, _ in own:
            buffer.set_value(distributed.broadcast(buffer, 0))
        yield
    finally:
        for buffer, value in own:
            buffer.set_value(value)


def _resized(image_NHWC: np.ndarray, size: int) -> np.ndarray:
    if image_NHWC.shape[1:3] == (size, size):
        return image_NHWC
    return np.stack([fit_image(image, (size, size), "stretch") for image in image_NHWC])


def result_row(result: SetResult, threshold: float | None = None) -> dict:
    """The figures of one set by name, as JSON, CSV and table have them."""
    metrics = result.metrics
    row = {
        "set": result.name,
        "pairs": len(result.same_P),
        "accuracy": result.no_flip.accuracy,
        "accuracy_std": result.no_flip.accuracy_std,
        "accuracy_flip": metrics.accuracy,
        "accuracy_flip_std": metrics.accuracy_std,
        "val": metrics.val,
        "val_std": metrics.val_std,
        "far": metrics.far,
        "xnorm": result.xnorm,
        "auc": metrics.auc,
        "eer": metrics.eer,
        "threshold": metrics.threshold,
        "folds": metrics.num_folds,
    }
    if threshold is not None:
        row |= {
            "fixed_threshold": threshold,
            "fixed_accuracy": accuracy_at(result.distance_P, result.same_P, threshold),
        }
    return row


def result_table(rows: list[dict], far_target: float) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the printed table."""
    head = ["Set", "Pairs", "Accuracy", "Accuracy-Flip", f"VAL@FAR={far_target:g}", "XNorm", "AUC", "EER", "Threshold"]
    fixed = "fixed_accuracy" in rows[0]
    body = [
        [
            row["set"],
            f"{row['pairs']}",
            "{accuracy:1.5f}+-{accuracy_std:1.5f}".format(**row),
            "{accuracy_flip:1.5f}+-{accuracy_flip_std:1.5f}".format(**row),
            "{val:1.5f}+-{val_std:1.5f} @ {far:1.5f}".format(**row),
            *(f"{row[key]:.5f}" for key in ("xnorm", "auc", "eer")),
            f"{row['threshold']:.2f}",
            *([f"{row['fixed_accuracy']:1.5f}"] if fixed else []),
        ]
        for row in rows
    ]
    return head + ([f"Accuracy at {rows[0]['fixed_threshold']:g}"] if fixed else []), body


def write_results(folder: Path, results: dict[str, SetResult], sets: Mapping[str, Pairs], settings: dict) -> list[dict]:
    """``verification.json``, ``.csv`` and pictures into ``folder``; returns the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [result_row(result, settings["threshold"]) for result in results.values()]
    far_grid = np.logspace(-5, 0, 251)
    roc, pictures = {}, []
    for name, result in results.items():
        cosine_P = 1 - result.distance_P / 2
        threshold = result.metrics.threshold
        if 0 < result.same_P.sum() < len(result.same_P):
            shown = far_grid[far_grid >= 0.5 / np.count_nonzero(~result.same_P)]
            roc[name] = {"far": shown.tolist(), "tar": roc_at(cosine_P, result.same_P, shown).tolist()}
        draw_histogram(cosine_P, result.same_P, folder / f"{name}_histogram.png", name, 1 - threshold / 2)
        draw_errors(
            _worst(result, sets[name][0], settings["num_errors"]),
            folder / f"{name}_errors.png",
            f"{name}: most confident errors",
        )
        pictures += [
            {"file": f"{name}_histogram.png", "title": f"{name}: score histogram"},
            {"file": f"{name}_errors.png", "title": f"{name}: most confident errors"},
        ]
    draw_roc({name: (curve["far"], curve["tar"]) for name, curve in roc.items()}, folder / "roc.png", "Verification")
    head, body = result_table(rows, settings["far"])
    content = {
        "kind": "verification",
        "label": settings["label"],
        "settings": settings,
        "sets": {row["set"]: row for row in rows},
        "tables": [{"title": "Sets", "head": head, "rows": body}],
        "roc": roc,
        "pictures": [{"file": "roc.png", "title": "ROC"}, *pictures],
    }
    write_json(folder / "verification.json", content)
    write_csv(folder / "verification.csv", rows)
    return rows


def _worst(result: SetResult, image_NHWC: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """The wrongly judged pairs furthest from the threshold, furthest first."""
    threshold = result.metrics.threshold
    wrong = np.flatnonzero((result.distance_P < threshold) != result.same_P)
    order = wrong[np.argsort(-np.abs(result.distance_P[wrong] - threshold), kind="stable")][:count]
    return [
        (
            image_NHWC[2 * pair],
            image_NHWC[2 * pair + 1],
            f"pair {pair}, {'same' if result.same_P[pair] else 'different'}, cos {1 - result.distance_P[pair] / 2:.2f}",
        )
        for pair in order
    ]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, "run directory or weights file (.pdparams, .safetensors, .onnx)", required=True)
    parser.add_argument("--data-dir", type=Path, help="folder of <set>.bin files")
    parser.add_argument(
        "--target", help=f"comma-separated sets (default: those of {','.join(KNOWN_SETS)} that are there)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="go on without targets that are not there")
    parser.add_argument("--image-dir", type=Path, help="images of --pairs, where not in --data-dir")
    parser.add_argument("--pairs", type=Path, help="pair list: LFW's pairs.txt or 'path path label' lines")
    parser.add_argument("--threshold", type=float, help="also judge at this fixed squared-L2 threshold (2 - 2 cos)")
    parser.add_argument("--num-folds", type=int, default=10)
    parser.add_argument("--far", type=float, default=1e-3, help="false-accept rate for VAL")
    add_report_options(parser, "JSON, CSV and pictures")
    args = parser.parse_args(argv)
    if args.image_dir is not None and args.pairs is None:
        raise UserError("--image-dir and --pairs belong together: a folder of images and the list of its pairs")
    if args.data_dir is None and (args.pairs is None or args.image_dir is None):
        raise UserError("nothing to judge: give --data-dir (with .bin sets), or a folder of images and --pairs")
    if args.batch_size < 1 or args.num_folds < 2 or not 0 < args.far < 1:
        raise UserError(
            f"--batch-size {args.batch_size}, --num-folds {args.num_folds}, --far {args.far}: >= 1, >= 2, in (0, 1)"
        )
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line; under ``paddle.distributed.launch`` the ranks share the work and rank 0 reports."""
    args = _arguments(argv)
    distributed.init(args.device)
    sets, embedder, failure = {}, None, None
    try:
        embedder = load_embedder(args.model, args.network, args.engine, args.batch_size, which=args.which)
        if args.data_dir is not None and (args.pairs is None or args.target or args.image_dir is not None):
            targets = [name for name in args.target.split(",") if name] if args.target else None
            sets |= load_sets(args.data_dir, targets, args.allow_missing, embedder.input_size)
        if args.pairs is not None:
            sets[args.pairs.stem] = read_pair_list(args.pairs, args.image_dir or args.data_dir, embedder.input_size)
    except Exception as error:
        failure = error
    distributed.raise_together(failure)
    results = verify(embedder, sets, args.batch_size, args.num_folds, args.far, show_progress=True)
    if distributed.get_rank() != 0:
        return
    folder = args.result_dir or default_result_dir(args.model, "verification")
    settings = told_settings(args, Path(args.model).name, engine=embedder.engine)
    rows = write_results(folder, results, sets, settings)
    for row in rows:
        print("[{set}]XNorm: {xnorm:f}".format(**row))
        print("[{set}]Accuracy: {accuracy:1.5f}+-{accuracy_std:1.5f}".format(**row))
        print("[{set}]Accuracy-Flip: {accuracy_flip:1.5f}+-{accuracy_flip_std:1.5f}".format(**row))
    head, body = result_table(rows, args.far)
    table = PrettyTable(head)
    table.add_rows(body)
    print(table)
    print(f"results in {folder}")
    if args.report is not None:
        write_report(args.report, [folder, *args.compare])
        print(f"report {args.report}")


if __name__ == "__main__":
    main()
