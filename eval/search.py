"""Every probe against every gallery template: scores and ranks in float64, most comparisons settled in float32.

Legend: G gallery templates, S gallery subjects, Q probes, D embedding size, K chosen (probe, subject) cells. The score
of a subject is the best of its gallery templates. Equal scores rank in gallery order.

A float32 product of two vectors is off by at most ``(D + 3) 2^-24`` times their lengths, in whatever order it is summed
(Higham, Accuracy and Stability of Numerical Algorithms, 3.5). It settles nearly every comparison; what is nearer
to a limit than that is computed again in float64. In float64 alone a search of IJB-C's size takes 1.4 times as long.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError
from utils.system import threads_of_rank

_SCORES_PER_BLOCK = 1 << 22
_PAIRS_PER_GATHER = 1 << 7
_LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class Search:
    """All a probe's search leaves behind."""

    mate_score_Q: np.ndarray  # NaN without a mate
    mate_rank_Q: np.ndarray  # 0 without a mate
    best_score_Q: np.ndarray
    num_subjects: int
    impostor_K: np.ndarray  # the highest scores against subjects other than the probe's own, descending

    @property
    def mated_Q(self) -> np.ndarray:
        return self.mate_rank_Q > 0


def search(
    gallery_GD: np.ndarray,
    gallery_subject_G: np.ndarray,
    probe_QD: np.ndarray,
    probe_subject_Q: np.ndarray,
    num_impostors: int = 0,
) -> Search:
    """Compare every probe with every gallery template (unit vectors, dot product, float64), block by block.

    Raises:
        UserError: shapes do not fit, a side is empty, or a feature is not finite or far from unit length.
    """
    gallery_GD, probe_QD = np.asarray(gallery_GD, np.float64), np.asarray(probe_QD, np.float64)
    gallery_subject_G, probe_subject_Q = np.asarray(gallery_subject_G), np.asarray(probe_subject_Q)
    for what, feature, subject in (("gallery", gallery_GD, gallery_subject_G), ("probe", probe_QD, probe_subject_Q)):
        if feature.ndim != 2 or len(feature) == 0 or subject.shape != (len(feature),):
            raise UserError(f"{what}: features {feature.shape} and subjects {subject.shape}; [n, size] and [n], n > 0")
        if not np.isfinite(feature.sum()) and not np.isfinite(feature).all():
            raise UserError(f"{what}: row {int(np.flatnonzero(~np.isfinite(feature).all(1))[0])} holds NaN or infinity")
    if gallery_GD.shape[1] != probe_QD.shape[1]:
        raise UserError(f"gallery features have size {gallery_GD.shape[1]}, probe features {probe_QD.shape[1]}")
    # Columns are subjects in order of first appearance; the templates of one stand side by side.
    column_of = {subject: column for column, subject in enumerate(dict.fromkeys(gallery_subject_G.tolist()))}
    column_G = np.array([column_of[subject] for subject in gallery_subject_G.tolist()])
    mate_Q = np.array([column_of.get(subject, -1) for subject in probe_subject_Q.tolist()])
    gallery_GD = gallery_GD[np.argsort(column_G, kind="stable")]
    starts_S = np.append(0, np.cumsum(np.bincount(column_G))[:-1])
    exact = _Exact(gallery_GD, starts_S, probe_QD)
    error = _largest_error(gallery_GD, probe_QD)
    num_probes = len(probe_QD)
    mate_score_Q, best_score_Q = np.full(num_probes, np.nan), np.full(num_probes, -np.inf)
    mate_rank_Q = np.zeros(num_probes, np.int64)
    impostors = _Highest(num_impostors, error)
    height = max(1, _SCORES_PER_BLOCK // len(gallery_GD))
    dense = np.empty((min(height, num_probes), len(gallery_GD)), np.float32)
    narrow_GD = gallery_GD.astype(np.float32)

    def judge(scores: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
        """Fill in the probes from ``start`` on; returns the impostor cells that may be among the highest."""
        if len(starts_S) != len(gallery_GD):
            scores = np.maximum.reduceat(scores, starts_S, axis=1)
        mated = np.flatnonzero(mate_Q[start : start + len(scores)] >= 0)
        column = mate_Q[start + mated]
        mate = exact(start + mated, column)
        scores[mated, column] = -np.inf
        # One pass over the scores finds the few that can be a row's best other one.
        best = scores.max(1)
        row_K, column_K = _cells(scores >= np.maximum(best - 2 * error, _LOWEST)[:, None])
        best_other = np.full(len(scores), -np.inf)
        np.maximum.at(best_other, row_K, exact(start + row_K, column_K))
        best_score_Q[start : start + len(scores)] = best_other
        best_score_Q[start + mated] = np.maximum(best_other[mated], mate)
        mate_score_Q[start + mated] = mate
        mate_rank_Q[start + mated] = 1
        beaten = np.flatnonzero(best_other[mated] >= mate)
        row, mate, column = mated[beaten], mate[beaten], column[beaten]
        others = scores[row]
        better = others > (mate + error)[:, None]
        row_K, column_K = _cells((others >= (mate - error)[:, None]) & ~better)
        score_K = exact(start + row[row_K], column_K)
        ahead_K = (score_K > mate[row_K]) | ((score_K == mate[row_K]) & (column_K < column[row_K]))
        mate_rank_Q[start + row] += better.sum(1) + np.bincount(row_K[ahead_K], minlength=len(row))
        return impostors.candidates(scores, best, start)

    num_threads = threads_of_rank()
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, num_probes, height):
            rows = probe_QD[start : start + height].astype(np.float32)
            parts = np.array_split(np.matmul(rows, narrow_GD.T, out=dense[: len(rows)]), num_threads)
            firsts = start + np.cumsum([0, *(len(part) for part in parts[:-1])])
            for found in list(threads.map(judge, parts, firsts)):
                impostors.add(*found)
    return Search(mate_score_Q, mate_rank_Q, best_score_Q, len(column_of), impostors.exactly(exact))


class _Exact:
    """Scores of single cells in float64."""

    def __init__(self, gallery_GD: np.ndarray, starts_S: np.ndarray, probe_QD: np.ndarray) -> None:
        self.gallery_GD, self.probe_QD, self.starts_S = gallery_GD, probe_QD, starts_S
        self.sizes_S = np.diff(starts_S, append=len(gallery_GD))

    def __call__(self, probe_K: np.ndarray, column_K: np.ndarray) -> np.ndarray:
        """[K] float64: the best of the subject's templates for the probe."""
        score_K = np.empty(len(probe_K))
        for first in range(0, len(probe_K), _PAIRS_PER_GATHER):
            part = slice(first, first + _PAIRS_PER_GATHER)
            sizes = self.sizes_S[column_K[part]]
            begin = np.cumsum(sizes) - sizes  # the subject's templates stand side by side
            template = np.arange(sizes.sum()) + np.repeat(self.starts_S[column_K[part]] - begin, sizes)
            probe = np.repeat(probe_K[part], sizes)
            scores = np.einsum("ij,ij->i", self.probe_QD[probe], self.gallery_GD[template])
            score_K[part] = np.maximum.reduceat(scores, begin)
        return score_K


class _Highest:
    """The ``count`` highest scores of a stream of float32 ones, so many kept that the exact ones are among them."""

    def __init__(self, count: int, error: float) -> None:
        self.count, self.error, self.limit = count, error, -np.inf
        self.score_K, self.probe_K, self.column_K = np.empty(0, np.float32), np.empty(0, int), np.empty(0, int)

    def candidates(self, scores: np.ndarray, best: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
        """(score, probe, column) of the cells that may be among the highest; ``best`` is each row's highest."""
        if not self.count:
            return self.score_K, self.probe_K, self.column_K
        limit = self.limit
        if limit == -np.inf and scores.size > self.count:
            limit = np.partition(scores, scores.size - self.count, axis=None)[scores.size - self.count]
        limit = max(limit - 2 * self.error, _LOWEST)
        row = np.flatnonzero(best >= limit)
        row_K, column_K = _cells(scores[row] >= limit)
        return scores[row[row_K], column_K], start + row[row_K], column_K

    def add(self, score_K: np.ndarray, probe_K: np.ndarray, column_K: np.ndarray) -> None:
        score_K = np.concatenate([self.score_K, score_K])
        probe_K, column_K = np.concatenate([self.probe_K, probe_K]), np.concatenate([self.column_K, column_K])
        if 0 < self.count < len(score_K):
            self.limit = np.partition(score_K, len(score_K) - self.count)[len(score_K) - self.count]
            keep = np.flatnonzero(score_K >= self.limit - 2 * self.error)
            score_K, probe_K, column_K = score_K[keep], probe_K[keep], column_K[keep]
        self.score_K, self.probe_K, self.column_K = score_K, probe_K, column_K

    def exactly(self, exact: _Exact) -> np.ndarray:
        """The highest in float64, descending."""
        return np.sort(exact(self.probe_K, self.column_K))[::-1][: self.count]


def _cells(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where a [n, S] mask is set; ``np.nonzero`` takes five times as long in two dimensions."""
    return np.divmod(np.flatnonzero(chosen), chosen.shape[1])


def _largest_error(gallery_GD: np.ndarray, probe_QD: np.ndarray) -> float:
    """By how much a float32 score can be wrong; five units more than the bound, for the rounding of limits."""
    lengths = [float(np.sqrt(np.einsum("ij,ij->i", side, side).max())) for side in (gallery_GD, probe_QD)]
    product = lengths[0] * lengths[1]
    if product and not 1e-12 < product < 1e12:
        raise UserError(f"the longest features measure {lengths[0]:g} and {lengths[1]:g}; normalise them to 1")
    return (gallery_GD.shape[1] + 8) * 2.0**-24 * product
