"""Which classes of a shard take part in an update: all positives, and negatives drawn uniformly.

Legend: N local classes, P positives, k negatives.
"""

import numpy as np

from utils.errors import UserError


def sample_classes(
    positive_P: np.ndarray, num_classes: int, sample_rate: float, seed: int, step: int, rank: int
) -> np.ndarray:
    """Sorted unique int64 ids, out of ``range(num_classes)``, that take part in one update.

    The quota is ``int(sample_rate * num_classes)``. All positives are kept even beyond the quota; the rest of the quota
    is a uniformly random subset of the negatives (An et al. 2021, Partial FC). The draw depends on
    ``(seed, step, rank)`` alone, so a resumed run repeats it.

    Args:
        positive_P: ids that must be kept; any order, duplicates allowed, may be empty.
        num_classes: N, classes of this shard.
        sample_rate: 0 (positives only) to 1 (all).
    """
    if not 0 <= sample_rate <= 1:
        raise UserError(f"sample_rate: {sample_rate} must lie in [0, 1]")
    if sample_rate == 1:
        return np.arange(num_classes, dtype=np.int64)
    positive_P = np.unique(np.asarray(positive_P, dtype=np.int64))
    if positive_P.size and not (positive_P[0] >= 0 and positive_P[-1] < num_classes):
        raise UserError(f"positives {positive_P[0]}..{positive_P[-1]} must lie in [0, {num_classes})")
    num_negatives = min(int(sample_rate * num_classes), num_classes) - positive_P.size
    if num_negatives <= 0:
        return positive_P
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, rank])))
    kept_N = np.zeros(num_classes, dtype=bool)
    pool = num_classes - positive_P.size
    # Draw the smaller side: k of the pool to keep, or pool - k of it to leave out.
    leave_out = num_negatives > pool // 2
    drawn_k = _subset(rng, pool, pool - num_negatives if leave_out else num_negatives)
    # The i-th negative is i plus the number of positives below it.
    drawn_k += np.searchsorted(positive_P - np.arange(positive_P.size), drawn_k, side="right")
    kept_N[drawn_k] = True
    if leave_out:
        np.logical_not(kept_N, out=kept_N)
    kept_N[positive_P] = True
    return np.flatnonzero(kept_N)


def _subset(rng: np.random.Generator, num: int, k: int) -> np.ndarray:
    """A uniformly random k-subset of ``range(num)`` (k <= num / 2), int64, without sorting ``num`` values.

    Drawing one value after another and dropping repeats gives every subset the same chance; drawing as many as are
    missing at once never overshoots, so rounds of that are the same process. Rounds shrink by k / num or faster.
    """
    seen = np.zeros(num, dtype=bool)
    missing = k
    while missing:
        seen[rng.integers(0, num, size=missing)] = True
        missing = k - int(np.count_nonzero(seen))
    return np.flatnonzero(seen)
