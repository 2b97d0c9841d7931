"""What makes figures of an evaluation say less than they seem to: one line each, beside the figures, never instead.

Legend: P pairs, N images or embeddings, D embedding size, F folds.
"""

from collections.abc import Sequence

import numpy as np

from eval.distractors import DistractorResult
from eval.metrics import ACCURACY_GRID, fold_of_pairs
from eval.protocols import TemplateProtocol

_EQUAL = 1e-9  # of a cosine: what is nearer differs by rounding alone


def set_remarks(image_NHWC: np.ndarray, same_P: np.ndarray, num_folds: int = 10, far_target: float = 1e-3) -> list[str]:
    """About a pair set itself: one kind alone, folds without a kind, too few impostors, repeated and identical images.

    Image 2i and 2i+1 are pair i; ``num_folds`` is what was asked for, ``far_target`` that of VAL.
    """
    num_pairs, remarks = len(same_P), []
    num_same = int(np.count_nonzero(same_P))
    if num_same in (0, num_pairs):
        kind, other = ("genuine", "impostor") if num_same else ("impostor", "genuine")
        remarks.append(
            f"all {num_pairs} pairs are {kind}: without {other} pairs accuracy says nothing about telling people "
            "apart, and VAL, AUC and EER are not defined"
        )
    if num_pairs < num_folds:
        remarks.append(f"{num_pairs} pairs for {num_folds} folds: each pair is a fold")
    num_folds = min(num_folds, num_pairs)
    fold_P = fold_of_pairs(num_pairs, num_folds)
    num_different_F = np.bincount(fold_P[~same_P], minlength=num_folds)
    if 0 < num_same < num_pairs:
        for kind, chosen_P in (("genuine", same_P), ("impostor", ~same_P)):
            lacking = np.flatnonzero(np.bincount(fold_P[chosen_P], minlength=num_folds) == 0)
            if len(lacking):
                remarks.append(
                    f"{len(lacking)} of {num_folds} folds have no {kind} pair (the first is fold {lacking[0] + 1}): "
                    f"rates of {kind} pairs are means over the others; mix the list"
                )
        most = int((num_different_F.sum() - num_different_F).max())
        remarks += far_remarks([far_target], most, "of all folds but one")
    number: dict[int, int] = {}  # pixels -> which distinct image
    distinct_N = np.array([number.setdefault(hash(image.tobytes()), len(number)) for image in image_NHWC])
    left_P, right_P = distinct_N[0::2], distinct_N[1::2]
    itself = np.flatnonzero(left_P == right_P)
    if len(itself):
        different = int(np.count_nonzero(~same_P[itself]))
        called = f", {different} of them called different people" if different else ""
        remarks.append(f"{len(itself)} pairs hold the same image on both sides (the first is pair {itself[0]}){called}")
    return remarks + _repeats(left_P, right_P, same_P)


def score_remarks(score_P: np.ndarray, what: str = "pairs") -> list[str]:
    """About scores (cosine): all equal, or nearer to each other than the thresholds that are tried."""
    if not len(score_P):
        return []
    low, high = float(np.min(score_P)), float(np.max(score_P))
    if high - low <= _EQUAL:
        found = f"are equal ({low:.6f}): these embeddings tell nobody apart"
    elif 2 * (high - low) < ACCURACY_GRID[2]:
        found = f"lie within {high - low:.2g} of each other: these embeddings hardly tell anybody apart"
    else:
        return []
    return [f"the scores of all {what} {found}; check weights and images"]


def norm_remarks(norm_N: np.ndarray, what: str = "embeddings") -> list[str]:
    """About embeddings of length zero, whose cosine to anything is 0."""
    zero = np.flatnonzero(norm_N == 0)
    if not len(zero):
        return []
    which = f"{len(zero)} of {len(norm_N):,} {what} are zero (the first is number {zero[0]})"
    return [f"{which}: their scores mean nothing"]


def far_remarks(fars: Sequence[float], num_impostors: int, which: str = "") -> list[str]:
    """About false-accept rates that so many impostor pairs cannot show: one accepted pair is more."""
    below = [far for far in fars if far * num_impostors * (1 + 1e-12) < 1]
    if not below or not num_impostors:
        return []
    names, pairs = ", ".join(f"{far:g}" for far in below), f"{num_impostors:,} impostor pairs {which}".rstrip()
    least = f"1/{num_impostors} = {1 / num_impostors:.1e}"
    return [f"FAR {names} lies below what {pairs} can show ({least}): no impostor is accepted there"]


def landmark_remarks(num_outside: int | None, num_images: int) -> list[str]:
    """About images with a landmark outside of the picture; None: nobody counted."""
    if not num_outside:
        return []
    which = f"{num_outside:,} of {num_images:,} images have a landmark outside of the picture"
    return [f"{which}: they are aligned and embedded all the same; check the landmark list"]


def template_remarks(
    protocol: TemplateProtocol,
    template_TD: np.ndarray,
    score_P: np.ndarray,
    fars: Sequence[float],
    num_outside: int | None = None,
) -> list[str]:
    """About a template protocol and its scores. ``num_outside``: images with a landmark outside of the picture."""
    left_P, right_P, same_P = protocol.left_P, protocol.right_P, protocol.same_P
    remarks = landmark_remarks(num_outside, len(protocol.image_N))
    remarks += norm_remarks(np.abs(template_TD).max(1), "templates")
    remarks += score_remarks(score_P) + far_remarks(fars, int(np.count_nonzero(~same_P)))
    itself = int(np.count_nonzero(left_P == right_P))
    if itself:
        remarks.append(f"{itself:,} pairs compare a template with itself")
    return remarks + _repeats(left_P, right_P, same_P)


def distractor_remarks(
    result: DistractorResult, sizes: Sequence[int], fars: Sequence[float], num_distractors: int
) -> list[str]:
    """About identification among distractors: what was asked for and cannot be measured with so few."""
    remarks = []
    beyond = [size for size in sizes if size > num_distractors]
    if beyond:
        names = ", ".join(f"{size:,}" for size in beyond)
        remarks.append(f"{names} distractors were asked for, there are {num_distractors:,}: the figures stop there")
    remarks += far_remarks(fars, result.num_impostor)
    return remarks + score_remarks(np.array(result.score_range), "genuine and impostor pairs")


def _repeats(left_P: np.ndarray, right_P: np.ndarray, same_P: np.ndarray) -> list[str]:
    """About pairs that occur again, in either order; and with the other label."""
    low_P, high_P = np.minimum(left_P, right_P), np.maximum(left_P, right_P)
    width = int(high_P.max()) + 1
    if int(low_P.min()) < 0 or int(high_P.max()) >= 2**62 // width:  # ids that do not combine: number them
        ids, both = np.unique(np.concatenate([low_P, high_P]), return_inverse=True)
        low_P, high_P, width = both[: len(low_P)], both[len(low_P) :], len(ids)
    order_P = np.sort((low_P.astype(np.int64) * width + high_P) * 2 + same_P)
    again = (order_P[1:] >> 1) == (order_P[:-1] >> 1)
    num_again = int(np.count_nonzero(again))
    if not num_again:
        return []
    both_ways = int(np.count_nonzero(again & (order_P[1:] != order_P[:-1])))
    called = f", {both_ways} times with the other label" if both_ways else ""
    return [f"{num_again:,} of {len(low_P):,} pairs repeat an earlier one{called}: they count again"]
