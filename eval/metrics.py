"""Verification accuracy, VAL, AUC, EER and TAR at fixed FAR, in exact counts and float64.

Legend: N embeddings, P pairs (P = N/2), D embedding size, F folds, K thresholds of a grid.
The arithmetic is that of the common face-verification protocol (ten folds, squared L2 distance of unit vectors); every
rate is a quotient of integer counts, so no loop over thresholds is needed: one pass sorts each distance into the grid.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from utils.errors import UserError
from utils.system import threads_of_rank
from utils.vectors import scale_to_unit

ACCURACY_GRID = (0.0, 4.0, 0.01)
VAL_GRID = (0.0, 4.0, 0.001)
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_PAIRS_PER_BLOCK = 64
_WHOLE_CURVE_PAIRS = 1 << 17


@dataclass(frozen=True)
class VerificationMetrics:
    """What one pair list says about one set of embeddings. Rates are fractions; a rate nothing defines is NaN.

    Attributes:
        accuracy, accuracy_std: mean and population standard deviation over the folds, each fold judged at the
            threshold that was best (the first such) on the other folds.
        val, val_std, far: true-accept rate, its deviation, and the false-accept rate, each fold judged at the
            threshold that gives ``far_target`` on the other folds (linear between grid points).
        auc, eer: from the exact curve over all pairs, ties counted half; EER is linear between curve points.
        threshold: first best threshold of the accuracy grid over all pairs, squared L2 (cosine = 1 - threshold / 2).
        num_folds: folds used: the number asked for, or the number of pairs where there are fewer.
        fold_accuracy, fold_threshold: the values behind ``accuracy``.
        tpr_K, fpr_K: rates at each accuracy threshold, mean over the folds.
    """

    accuracy: float
    accuracy_std: float
    val: float
    val_std: float
    far: float
    auc: float
    eer: float
    threshold: float
    num_folds: int
    fold_accuracy: tuple[float, ...]
    fold_threshold: tuple[float, ...]
    tpr_K: np.ndarray = field(repr=False, compare=False)
    fpr_K: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class TarAtFar:
    """TAR at one FAR, all fractions."""

    far: float  # asked for
    nearest: float  # TAR of the curve point nearest in FAR, as published tables have it
    nearest_far: float  # FAR of that point; it may lie above ``far``
    strict: float  # TAR of the lowest threshold whose FAR does not exceed ``far``
    strict_far: float  # FAR of that threshold
    threshold: float  # a score at or above it is accepted; +inf where even the best score is an impostor's


def pair_distances(embedding_ND: np.ndarray) -> np.ndarray:
    """Squared L2 distance of unit vectors, rows 2i and 2i+1 being pair i. Any float dtype -> [P] float64 in [0, 4].

    A zero vector stays zero.

    Raises:
        UserError: not two-dimensional, an odd number of rows, or a row that is not finite.
    """
    embedding_ND = np.asarray(embedding_ND)
    if embedding_ND.ndim != 2 or len(embedding_ND) % 2:
        raise UserError(f"embeddings have shape {embedding_ND.shape}; [2 * pairs, size] is needed")
    distance_P = np.empty(len(embedding_ND) // 2)

    def fill(first: int, stop: int) -> None:
        """Distances of pairs first ... stop - 1, in buffers that stay in cache."""
        rows_BD = np.empty((2 * _PAIRS_PER_BLOCK, embedding_ND.shape[1]))
        difference_BD = np.empty((_PAIRS_PER_BLOCK, embedding_ND.shape[1]))
        for start in range(first, stop, _PAIRS_PER_BLOCK):
            end = min(start + _PAIRS_PER_BLOCK, stop)
            rows, difference = rows_BD[: 2 * (end - start)], difference_BD[: end - start]
            rows[...] = embedding_ND[2 * start : 2 * end]
            scale_to_unit(rows, out=rows)
            np.subtract(rows[0::2], rows[1::2], out=difference)
            np.square(difference, out=difference).sum(1, out=distance_P[start:end])

    num_threads = threads_of_rank()
    bounds = np.linspace(0, len(distance_P), num_threads + 1).astype(int)
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(fill, bounds[:-1], bounds[1:]))
    if not np.isfinite(distance_P).all():
        pair = int(np.argmin(np.isfinite(distance_P)))
        row = 2 * pair + int(np.isfinite(embedding_ND[2 * pair]).all())
        raise UserError(f"embedding {row} holds NaN or infinity (or overflows when squared)")
    return distance_P


def verification_metrics(
    embedding_ND: np.ndarray, same_P: np.ndarray, num_folds: int = 10, far_target: float = 1e-3
) -> VerificationMetrics:
    """Judge embeddings (already summed over flips, not yet normalised) on pairs (2i, 2i+1) with labels ``same_P``.

    Folds are contiguous runs of pairs, the first ``P % num_folds`` one longer. Where a set has fewer pairs than folds,
    every pair is a fold. Distances strictly below a threshold count as the same person.

    Raises:
        UserError: shapes that do not fit, fewer than two pairs or folds, or values that are not finite.
    """
    return distance_metrics(pair_distances(embedding_ND), same_P, num_folds, far_target)


def fold_of_pairs(num_pairs: int, num_folds: int) -> np.ndarray:
    """Fold of each pair, [P]: contiguous runs, the first ``num_pairs % num_folds`` one longer."""
    sizes_F = np.full(num_folds, num_pairs // num_folds)
    sizes_F[: num_pairs % num_folds] += 1
    return np.repeat(np.arange(num_folds), sizes_F)


def distance_metrics(
    distance_P: np.ndarray, same_P: np.ndarray, num_folds: int = 10, far_target: float = 1e-3
) -> VerificationMetrics:
    """``verification_metrics`` from squared distances in [0, 4]."""
    same_P = np.asarray(same_P).astype(bool)
    num_pairs = len(distance_P)
    if same_P.shape != (num_pairs,):
        raise UserError(f"{same_P.size} labels for {num_pairs} pairs; each pair needs one")
    if num_pairs < 2 or num_folds < 2:
        raise UserError(f"{num_pairs} pairs in {num_folds} folds cannot be cross-validated; two of each are needed")
    num_folds = min(num_folds, num_pairs)
    fold_P = fold_of_pairs(num_pairs, num_folds)
    sizes_F = np.bincount(fold_P, minlength=num_folds)
    grid = np.arange(*ACCURACY_GRID)
    same_FK, different_FK = _counts_below(distance_P, same_P, fold_P, num_folds, grid)
    num_same_F = np.bincount(fold_P[same_P], minlength=num_folds)
    num_different_F = sizes_F - num_same_F
    correct_FK = same_FK + num_different_F[:, None] - different_FK
    best_F = (correct_FK.sum(0) - correct_FK).argmax(1)
    accuracy_F = correct_FK[np.arange(num_folds), best_F] / sizes_F
    vals, fars = _val_at_far(distance_P, same_P, fold_P, num_same_F, num_different_F, far_target)
    auc, eer = _auc_eer(distance_P[same_P], distance_P[~same_P])
    return VerificationMetrics(
        accuracy=float(accuracy_F.mean()),
        accuracy_std=float(accuracy_F.std()),
        val=float(np.mean(vals)) if vals else float("nan"),
        val_std=float(np.std(vals)) if vals else float("nan"),
        far=float(np.mean(fars)) if fars else float("nan"),
        auc=auc,
        eer=eer,
        threshold=float(grid[correct_FK.sum(0).argmax()]),
        num_folds=num_folds,
        fold_accuracy=tuple(map(float, accuracy_F)),
        fold_threshold=tuple(map(float, grid[best_F])),
        # A fold without genuine (impostor) pairs counts as rate 0 in the mean curve, as the protocol's code has it.
        tpr_K=(same_FK / np.maximum(num_same_F, 1)[:, None]).mean(0),
        fpr_K=(different_FK / np.maximum(num_different_F, 1)[:, None]).mean(0),
    )


def accuracy_at(distance_P: np.ndarray, same_P: np.ndarray, threshold: float) -> float:
    """Fraction of pairs judged rightly at one fixed squared-L2 threshold (strictly below is the same person)."""
    return float(((np.asarray(distance_P) < threshold) == np.asarray(same_P).astype(bool)).mean())


def tar_at_far(score_P: np.ndarray, same_P: np.ndarray, fars: Sequence[float] = FARS) -> list[TarAtFar]:
    """TAR at each FAR of the list, higher scores meaning more alike; exact for any number of pairs.

    ``nearest`` reproduces the published tables: the ROC of scikit-learn, whose collinear points are dropped, searched
    from its highest FAR down for the least distance in FAR. ``strict`` uses every point of the curve. Only the pairs
    that score high enough to matter are sorted; if that turns out too few to decide, more are taken.

    Raises:
        UserError: lengths differ, a score is NaN, or genuine or impostor pairs are missing.
    """
    score_P, same_P, _, _ = _checked_scores(score_P, same_P)
    fraction = 1.0 if len(score_P) <= _WHOLE_CURVE_PAIRS else min(1.0, 1.05 * max(fars) + 1e-3)
    while True:
        curve = _curve(score_P, same_P, fraction)
        rows = [_at_far(far, curve) for far in fars]
        if None not in rows:
            return rows
        fraction = min(1.0, 4 * fraction)


def roc_at(score_P: np.ndarray, same_P: np.ndarray, far_K: np.ndarray) -> np.ndarray:
    """Strict TAR at many FARs (for drawing): [K] float64, from one sort of the impostors."""
    score_P, same_P, num_same, num_different = _checked_scores(score_P, same_P)
    impostor = np.sort(score_P[~same_P])[::-1]
    genuine = np.sort(score_P[same_P])
    allowed_K = np.floor(np.asarray(far_K) * num_different * (1 + 1e-12)).astype(np.int64)
    # Just above the first impostor that must be rejected; where all may be accepted, everything is.
    limit_K = np.append(impostor, -np.inf)[np.minimum(allowed_K, num_different)]
    return (num_same - np.searchsorted(genuine, limit_K, side="right")) / num_same


def _checked_scores(score_P, same_P):
    score_P, same_P = np.asarray(score_P), np.asarray(same_P).astype(bool, copy=False)
    if score_P.ndim != 1 or score_P.shape != same_P.shape:
        raise UserError(f"{score_P.shape} scores for {same_P.shape} labels; each pair needs one of both")
    if np.isnan(score_P.sum()) and np.isnan(score_P).any():
        raise UserError(f"score {int(np.argmax(np.isnan(score_P)))} is NaN; the features hold NaN or infinity")
    return score_P, same_P, *count_kinds(same_P)


def count_kinds(same_P: np.ndarray, where: str = "") -> tuple[int, int]:
    """How many genuine and how many impostor pairs; ``UserError`` (``where`` before it) where a kind is missing."""
    num_same = int(np.count_nonzero(same_P))
    if num_same in (0, len(same_P)):
        found = f"{num_same} genuine pairs of {len(same_P)}"
        raise UserError(f"{where}{found}; TAR at FAR needs genuine and impostor pairs")
    return num_same, len(same_P) - num_same


@dataclass(frozen=True)
class _Curve:
    """Rates at each distinct score, best first."""

    fpr_K: np.ndarray
    tpr_K: np.ndarray
    score_K: np.ndarray
    corners: np.ndarray  # indices of the points that published tables may use
    complete: bool


def _curve(score_P, same_P, fraction):
    """The curve over about the top ``fraction`` of all pairs."""
    num_pairs, num_same = len(score_P), np.count_nonzero(same_P)
    if fraction < 1:
        sample = score_P[:: max(1, num_pairs // (1 << 16))]
        limit = np.quantile(sample, 1 - fraction)
        taken = np.flatnonzero(score_P >= limit)
        score_P, same_P = score_P[taken], same_P[taken]
    ascending = np.sort(score_P)
    first_K = np.append(0, np.flatnonzero(ascending[1:] != ascending[:-1]) + 1)
    score_K = ascending[first_K]
    # Only the few genuine pairs are looked up; everything else at or above a score is an impostor.
    same_K = np.bincount(np.searchsorted(score_K, score_P[same_P]), minlength=len(score_K))
    tps_K = np.cumsum(same_K[::-1])
    fps_K = (len(score_P) - first_K)[::-1] - tps_K
    # scikit-learn keeps both ends, and where a step differs from the one before; the step after the last point of an
    # incomplete curve is not known.
    kept_K = np.ones(len(fps_K), bool)
    kept_K[1:-1] = (np.diff(fps_K, 2) != 0) | (np.diff(tps_K, 2) != 0)
    kept_K[-1] = complete = len(score_P) == num_pairs
    rates = {"fpr_K": fps_K / (num_pairs - num_same), "tpr_K": tps_K / num_same}
    return _Curve(**rates, score_K=score_K[::-1], corners=np.flatnonzero(kept_K), complete=complete)


def _at_far(far: float, curve: _Curve) -> TarAtFar | None:
    """One row, or None where the part of the curve at hand cannot decide it."""
    # The curve starts at (0, 0), one point before the best score.
    fpr = np.append(0.0, curve.fpr_K[curve.corners])
    distance = np.abs(fpr - far)
    best = len(distance) - 1 - int(distance[::-1].argmin())
    if not curve.complete and curve.fpr_K[-1] - far <= distance[best]:
        return None
    within = int(np.searchsorted(curve.fpr_K, far, side="right")) - 1
    nearest = float(curve.tpr_K[curve.corners[best - 1]]) if best else 0.0
    # Before the best score nobody is accepted.
    strict, strict_far, threshold = 0.0, 0.0, float("inf")
    if within >= 0:
        strict, strict_far, threshold = (float(x[within]) for x in (curve.tpr_K, curve.fpr_K, curve.score_K))
    found = {"strict": strict, "strict_far": strict_far, "threshold": threshold}
    return TarAtFar(far=far, nearest=nearest, nearest_far=float(fpr[best]), **found)


def _counts_below(distance_P, same_P, fold_P, num_folds, grid_K):
    """[F, K] int64 twice: genuine and impostor pairs of each fold whose distance is strictly below each threshold."""
    first_P = np.searchsorted(grid_K, distance_P, side="right")
    width = len(grid_K) + 1
    cell_P = (fold_P * 2 + same_P) * width + first_P
    counts = np.bincount(cell_P, minlength=num_folds * 2 * width).reshape(num_folds, 2, width)
    below = counts[:, :, :-1].cumsum(2)
    return below[:, 1], below[:, 0]


def _val_at_far(distance_P, same_P, fold_P, num_same_F, num_different_F, far_target):
    """VAL and FAR of each fold that defines it, at the threshold the other folds give for ``far_target``.

    The threshold is linear between the last grid point at or under the target and the first above it. Where the other
    folds never reach the target it is 0, which accepts nobody.
    """
    grid_K = np.arange(*VAL_GRID)
    _, different_FK = _counts_below(distance_P, same_P, fold_P, len(num_same_F), grid_K)
    others_FK = different_FK.sum(0) - different_FK
    num_others_F = num_different_F.sum() - num_different_F
    vals, fars = [], []
    for fold, (below_K, num_others) in enumerate(zip(others_FK, num_others_F, strict=True)):
        if num_others == 0:
            continue
        far_K = below_K / num_others
        threshold = np.interp(far_target, far_K, grid_K) if far_K[-1] >= far_target else 0.0
        start, stop = np.searchsorted(fold_P, [fold, fold + 1])
        accepted = distance_P[start:stop] < threshold
        same = same_P[start:stop]
        if num_same_F[fold]:
            vals.append(np.count_nonzero(accepted & same) / num_same_F[fold])
        if num_different_F[fold]:
            fars.append(np.count_nonzero(accepted & ~same) / num_different_F[fold])
    return vals, fars


def _auc_eer(same_distance, different_distance):
    """Area under the ROC (ties half) and the rate at which false accepts equal false rejects."""
    if not len(same_distance) or not len(different_distance):
        return float("nan"), float("nan")
    same, different = np.sort(same_distance), np.sort(different_distance)
    above = len(different) - np.searchsorted(different, same, side="right")
    not_below = len(different) - np.searchsorted(different, same, side="left")
    auc = (int(above.sum()) + int(not_below.sum())) / (2 * len(same) * len(different))
    points = np.concatenate([[-np.inf], np.unique(np.concatenate([same, different]))])
    accept = np.searchsorted(different, points, side="right") / len(different)
    reject = 1 - np.searchsorted(same, points, side="right") / len(same)
    right = int(np.argmax(accept >= reject))
    left = right - 1
    gap_left, gap_right = reject[left] - accept[left], accept[right] - reject[right]
    share = gap_left / (gap_left + gap_right)
    return auc, float(accept[left] + share * (accept[right] - accept[left]))
