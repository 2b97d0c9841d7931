"""Pair verification: what ``eval/verification.py``, the tools and a training run's own verification share.

Legend: P pairs, N = 2P images (2i and 2i+1 are pair i), D embedding size, W ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle

from eval.bins import load_bin
from eval.embed import CHECKED_IMAGES, Embedder, load_embedder, start
from eval.metrics import VerificationMetrics, accuracy_at, distance_metrics, pair_distances
from eval.remarks import norm_remarks, score_remarks, set_remarks
from utils import distributed
from utils.decode import fit_image
from utils.errors import UserError
from utils.progress import progress_bar
from utils.vectors import row_norms

KNOWN_SETS = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw", "vgg2_fp", "cfp_ff")
Pairs = tuple[np.ndarray, np.ndarray]  # images uint8 [2P, H, W, 3] RGB, same bool [P]


@dataclass(frozen=True)
class SetResult:
    """One set."""

    name: str
    metrics: VerificationMetrics  # with flip: embedding plus that of the mirror image
    no_flip: VerificationMetrics
    xnorm: float  # mean norm of the raw embeddings over both passes
    distance_P: np.ndarray = field(repr=False, compare=False)  # squared L2
    same_P: np.ndarray = field(repr=False, compare=False)
    warnings: tuple[str, ...] = field(default=(), repr=False)  # what makes the figures mean less than they seem to


def verify(
    model: object,
    sets: Mapping[str, Pairs | Path],
    batch_size: int = 64,
    num_folds: int = 10,
    far_target: float = 1e-3,
    show_progress: bool = False,
) -> dict[str, SetResult]:
    """Judge a model on verification sets; every rank enters and gets the same result, whatever their number.

    Batches are cut from the set alone, then dealt to the ranks, so that no embedding depends on W. A layer must hold
    the same weights and running statistics on all ranks (training keeps them equal: ``utils.model.replica``).

    Args:
        model: an ``Embedder``, or a Paddle layer (its train/eval mode is kept).
        sets: name -> (images, same), or a ``.bin`` file, which is read when its turn comes and not kept. Images of
            another size are resized to the network's input.

    Raises:
        UserError: a set that cannot be judged, named, on every rank.
    """
    embedder = load_embedder(model, batch_size=batch_size) if isinstance(model, paddle.nn.Layer) else model
    results = {}
    for name, given in sets.items():
        with distributed.together():
            size = (embedder.input_size, embedder.input_size)
            image_NHWC, same_P = load_bin(given, size) if isinstance(given, Path) else given
            check_set(name, same_P)
        embedding_N2D = _embed(embedder, image_NHWC, batch_size, name, show_progress)
        warnings = set_remarks(image_NHWC, same_P, num_folds, far_target)
        try:
            results[name] = _judge(name, embedding_N2D, same_P, num_folds, far_target, warnings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return results


def check_set(name: str, same_P: np.ndarray) -> None:
    """Refuse a set before anything is embedded: ``UserError`` for one pair, which no fold can be judged by."""
    if len(same_P) < 2:
        raise UserError(f"{name}: {len(same_P)} pair in it; folds need at least two, one to choose the threshold on")


def set_names(text: str) -> list[str]:
    """The sets of a comma-separated list: blanks around a name do not count, nor does ``.bin`` behind it."""
    return list(dict.fromkeys(name.strip().removesuffix(".bin") for name in text.split(",") if name.strip()))


def find_sets(data_dir: Path, targets: Sequence[str], flag: str = "--data-dir") -> dict[str, Path]:
    """``<data_dir>/<name>.bin`` of each target that is there, by name; ``UserError`` where there is no such folder."""
    if not Path(data_dir).is_dir():
        raise UserError(f"{data_dir}: no such folder; {flag} must hold the .bin sets")
    paths = {name: Path(data_dir) / f"{name}.bin" for name in targets}
    return {name: path for name, path in paths.items() if path.is_file()}


def load_sets(
    data_dir: Path, targets: list[str] | None = None, allow_missing: bool = False, size: int = 112
) -> dict[str, Pairs]:
    """``<data_dir>/<name>.bin`` of each target, else of the known sets that are there; images ``size`` x ``size``.

    Raises:
        UserError: sets that were asked for are missing (all are named), there is none at all, or one cannot be judged.
    """
    found = find_sets(data_dir, targets or KNOWN_SETS)
    missing = [f"{name}.bin" for name in targets or () if name not in found]
    if missing and not allow_missing:
        raise UserError(f"{data_dir}: {', '.join(missing)} missing; get them, or pass --allow-missing")
    if not found:
        wanted = ", ".join(f"{name}.bin" for name in targets or KNOWN_SETS)
        raise UserError(f"{data_dir}: none of {wanted} is there; use --target")
    sets = {name: load_bin(path, (size, size)) for name, path in found.items()}
    for name, (_, same_P) in sets.items():
        check_set(str(found[name]), same_P)
    return sets


def _embed(embedder: Embedder, image_NHWC: np.ndarray, batch_size: int, name: str, show: bool) -> np.ndarray:
    """Raw embeddings of the images and of their mirror images, [N, 2, D] float32, complete on every rank."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    num_images = len(image_NHWC)
    batch_size = min(batch_size, max(1, num_images))  # rows are set aside for whole batches
    num_batches = -(-num_images // batch_size)
    rounds = -(-num_batches // world_size)
    local = np.zeros((rounds, batch_size, 2, embedder.embedding_size), np.float32)
    with distributed.together():
        if isinstance(embedder, Embedder) and embedder.undecided and num_images:
            # The first images on every rank: all of them decide alike, without a message.
            embedder.settle(_resized(image_NHWC[:CHECKED_IMAGES], embedder.input_size))
    with distributed.together(), progress_bar(name, num_images, enabled=show and rank == 0) as advance:

        def finish(index: int, pending) -> None:
            embedding_B2D = pending.result()
            local[index // world_size, : len(embedding_B2D)] = embedding_B2D
            advance(min(len(embedding_B2D) * world_size, num_images - index * batch_size))

        begun = None  # the network works on one batch while the next is resized
        for index in range(rank, num_batches, world_size):
            batch = image_NHWC[index * batch_size : (index + 1) * batch_size]
            before, begun = begun, (index, start(embedder, _resized(batch, embedder.input_size), "both"))
            if before is not None:
                finish(*before)
        if begun is not None:
            finish(*begun)
    if world_size > 1:
        gathered = distributed.all_gather_rows(paddle.to_tensor(local)).numpy()
        local = gathered.reshape(world_size, *local.shape).swapaxes(0, 1)
    return local.reshape(-1, 2, embedder.embedding_size)[:num_images]


def _judge(name, embedding_N2D, same_P, num_folds, far_target, warnings):
    both = embedding_N2D.astype(np.float64)
    total_ND = both.sum(1)
    distance_P = pair_distances(total_ND)
    warnings = (*warnings, *norm_remarks(row_norms(total_ND)), *score_remarks(1 - distance_P / 2))
    return SetResult(
        name=name,
        metrics=distance_metrics(distance_P, same_P, num_folds, far_target),
        no_flip=distance_metrics(pair_distances(both[:, 0]), same_P, num_folds, far_target),
        xnorm=float(np.sqrt(np.square(both).sum(2)).mean()),
        distance_P=distance_P,
        same_P=np.asarray(same_P).astype(bool),
        warnings=warnings,
    )


def _resized(image_NHWC: np.ndarray, size: int) -> np.ndarray:
    if image_NHWC.shape[1:3] == (size, size):
        return image_NHWC
    return np.stack([fit_image(image, (size, size), "stretch") for image in image_NHWC])


def set_warnings(results: Mapping[str, SetResult]) -> list[str]:
    """The warnings of all sets, each with its set's name."""
    return [f"{name}: {warning}" for name, result in results.items() for warning in result.warnings]


def result_row(result: SetResult, threshold: float | None = None) -> dict:
    """The figures of one set by name, as JSON, CSV and table have them."""
    metrics = result.metrics
    row = {"set": result.name, "pairs": len(result.same_P)}
    for name, judged in (("accuracy", result.no_flip), ("accuracy_flip", metrics)):
        row |= {name: judged.accuracy, f"{name}_std": judged.accuracy_std}
    row |= {name: getattr(metrics, name) for name in ("val", "val_std", "far")}
    row |= {"xnorm": result.xnorm, "auc": metrics.auc, "eer": metrics.eer}
    row |= {"threshold": metrics.threshold, "folds": metrics.num_folds}
    if threshold is not None:
        fixed_accuracy = accuracy_at(result.distance_P, result.same_P, threshold)
        row |= {"fixed_threshold": threshold, "fixed_accuracy": fixed_accuracy}
    return row


def result_table(rows: list[dict], far_target: float) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the printed table."""
    head = ["Set", "Pairs", "Accuracy", "Accuracy-Flip", f"VAL@FAR={far_target:g}", "XNorm", "AUC", "EER", "Threshold"]
    cells = ["{set}", "{pairs}", "{accuracy:1.5f}+-{accuracy_std:1.5f}"]
    cells += ["{accuracy_flip:1.5f}+-{accuracy_flip_std:1.5f}", "{val:1.5f}+-{val_std:1.5f} @ {far:1.5f}"]
    cells += ["{xnorm:.5f}", "{auc:.5f}", "{eer:.5f}", "{threshold:.2f}"]
    if "fixed_threshold" in rows[0]:
        head.append(f"Accuracy at {rows[0]['fixed_threshold']:g}")
        cells.append("{fixed_accuracy:1.5f}")
    return head, [[cell.format(**row) for cell in cells] for row in rows]
