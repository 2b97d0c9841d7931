"""1:N identification: closed-set CMC, open-set TPIR at FPIR, and the common IJB script's own numbers.

Legend: G gallery templates, S gallery subjects, Q probes, D embedding size. A subject's score is the best of its
gallery templates. Definitions (ISO/IEC 19795-1, IJB-C): a probe is mated if its subject is in the gallery. Closed set,
over mated probes: rank-k rate is the share whose subject is among the k best. Open set: FPIR is the share of non-mated
probes whose best score is accepted; TPIR the share of mated probes whose subject is accepted AND among the ``rank``
best. Equal scores rank in gallery order.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from utils.cores import threads_of_rank

_SCORES_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class ClosedSet:
    """CMC: ``rates[i]`` is the share of ``num_probes`` mated probes found within the best ``ranks[i]`` subjects."""

    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    num_probes: int
    num_subjects: int


@dataclass(frozen=True)
class OpenSet:
    """One operating point: the lowest threshold whose FPIR does not exceed ``fpir`` (accepted: score > threshold)."""

    fpir: float
    tpir: float
    actual_fpir: float
    threshold: float


@dataclass(frozen=True)
class Search:
    """All a probe's search leaves behind, [Q]: its mate's score and rank (NaN and 0 without a mate), the best score.

    ``impostor_K``: the highest scores of a probe against subjects other than its own, descending, as many as asked for.
    """

    mate_score_Q: np.ndarray
    mate_rank_Q: np.ndarray
    best_score_Q: np.ndarray
    num_subjects: int
    impostor_K: np.ndarray

    @property
    def mated_Q(self) -> np.ndarray:
        return self.mate_rank_Q > 0


@dataclass(frozen=True)
class PairRecall:
    """The reference 1:N script's figure: share of mated probes whose mate scores above the ``top``-th best impostor."""

    far: float
    recall: float
    threshold: float


def search(
    gallery_GD: np.ndarray,
    gallery_subject_G: np.ndarray,
    probe_QD: np.ndarray,
    probe_subject_Q: np.ndarray,
    num_impostors: int = 0,
) -> Search:
    """Compare every probe with every gallery template (unit vectors, dot product, float64), block by block.

    Raises:
        ValueError: shapes do not fit, a side is empty, or a feature is not finite.
    """
    gallery_GD, probe_QD = np.asarray(gallery_GD, np.float64), np.asarray(probe_QD, np.float64)
    gallery_subject_G, probe_subject_Q = np.asarray(gallery_subject_G), np.asarray(probe_subject_Q)
    for what, feature, subject in (("gallery", gallery_GD, gallery_subject_G), ("probe", probe_QD, probe_subject_Q)):
        if feature.ndim != 2 or len(feature) == 0 or subject.shape != (len(feature),):
            raise ValueError(f"{what}: features {feature.shape} and subjects {subject.shape}; [n, size] and [n], n > 0")
        if not np.isfinite(feature.sum()) and not np.isfinite(feature).all():
            raise ValueError(
                f"{what}: row {int(np.flatnonzero(~np.isfinite(feature).all(1))[0])} holds NaN or infinity"
            )
    if gallery_GD.shape[1] != probe_QD.shape[1]:
        raise ValueError(f"gallery features have size {gallery_GD.shape[1]}, probe features {probe_QD.shape[1]}")
    gallery_GD, subject_S, starts_S = _group_by_subject(gallery_GD, gallery_subject_G)
    mate_Q = _columns(subject_S, probe_subject_Q)
    num_probes = len(probe_QD)
    mate_score_Q, best_score_Q = np.full(num_probes, np.nan), np.empty(num_probes)
    mate_rank_Q = np.zeros(num_probes, np.int64)
    impostors = _Highest(num_impostors)
    height = max(1, _SCORES_PER_BLOCK // len(gallery_GD))
    dense = np.empty((min(height, num_probes), len(gallery_GD)))

    def judge(scores: np.ndarray, start: int, limit: float) -> np.ndarray:
        """Fill in the probes from ``start`` on; returns the impostor scores above ``limit``."""
        if len(starts_S) != len(gallery_GD):
            scores = np.maximum.reduceat(scores, starts_S, axis=1)
        part = slice(start, start + len(scores))
        mated = np.flatnonzero(mate_Q[part] >= 0)
        column = mate_Q[part][mated]
        mate = scores[mated, column]
        scores[mated, column] = -np.inf
        # One pass over the scores; the rows whose best other score beats nothing need no second one.
        best_other = scores.max(1)
        best_score_Q[part] = best_other
        best_score_Q[start + mated] = np.maximum(best_other[mated], mate)
        mate_score_Q[start + mated] = mate
        mate_rank_Q[start + mated] = 1
        beaten = np.flatnonzero(best_other[mated] >= mate)
        mate_rank_Q[start + mated[beaten]] = _ranks(scores[mated[beaten]], mate[beaten], column[beaten])
        if not num_impostors:
            return np.empty(0)
        above = scores[best_other > limit]
        return above[above > limit]

    num_threads = threads_of_rank()
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, num_probes, height):
            rows = probe_QD[start : start + height]
            scores = np.matmul(rows, gallery_GD.T, out=dense[: len(rows)])
            parts = np.array_split(scores, num_threads)
            firsts = start + np.cumsum([0, *(len(part) for part in parts[:-1])])
            impostors.add(threads.map(judge, parts, firsts, [impostors.limit] * num_threads))
    return Search(mate_score_Q, mate_rank_Q, best_score_Q, len(subject_S), impostors.sorted())


def closed_set(
    gallery_GD: np.ndarray,
    gallery_subject_G: np.ndarray,
    probe_QD: np.ndarray,
    probe_subject_Q: np.ndarray,
    ranks: Sequence[int] = (1, 5, 10),
) -> ClosedSet:
    """CMC rates over the mated probes. See ``search`` for arguments and errors."""
    return cmc(search(gallery_GD, gallery_subject_G, probe_QD, probe_subject_Q), ranks)


def open_set(
    gallery_GD: np.ndarray,
    gallery_subject_G: np.ndarray,
    probe_QD: np.ndarray,
    probe_subject_Q: np.ndarray,
    fpirs: Sequence[float] = (0.01, 0.1),
    rank: int = 1,
) -> list[OpenSet]:
    """TPIR at each FPIR. See ``search`` for arguments and errors."""
    return tpir_at_fpir(search(gallery_GD, gallery_subject_G, probe_QD, probe_subject_Q), fpirs, rank)


def cmc(found: Search, ranks: Sequence[int] = (1, 5, 10)) -> ClosedSet:
    """``closed_set`` of a search already made."""
    rank_Q = found.mate_rank_Q[found.mated_Q]
    if not len(rank_Q):
        raise ValueError(f"none of {len(found.mated_Q)} probes has its subject in the gallery; CMC needs mated probes")
    rates = tuple(float(np.count_nonzero(rank_Q <= rank) / len(rank_Q)) for rank in ranks)
    return ClosedSet(tuple(ranks), rates, len(rank_Q), found.num_subjects)


def tpir_at_fpir(found: Search, fpirs: Sequence[float] = (0.01, 0.1), rank: int = 1) -> list[OpenSet]:
    """``open_set`` of a search already made."""
    mated_Q = found.mated_Q
    others = np.sort(found.best_score_Q[~mated_Q])[::-1]
    if not len(others) or not mated_Q.any():
        raise ValueError(
            f"{len(others)} non-mated and {int(mated_Q.sum())} mated probes; open-set identification needs both"
        )
    within = found.mate_score_Q[mated_Q][found.mate_rank_Q[mated_Q] <= rank]
    points = []
    for fpir in fpirs:
        allowed = math.floor(fpir * len(others) + 1e-9)
        limit = others[allowed] if allowed < len(others) else -np.inf
        points.append(
            OpenSet(
                fpir=fpir,
                tpir=float(np.count_nonzero(within > limit) / mated_Q.sum()),
                actual_fpir=float(np.count_nonzero(others > limit) / len(others)),
                threshold=float(limit),
            )
        )
    return points


def pair_recall(found: Search, fars: Sequence[float] = (0.01, 0.1)) -> list[PairRecall]:
    """What the reference 1:N script calls FAR: ceil(probes * far) impostor PAIRS, of all, score above the threshold.

    Not a rate of impostor pairs, nor FPIR; for comparison only. The search must have kept that many impostors.
    """
    mate_score = found.mate_score_Q[found.mated_Q]
    points = []
    for far in fars:
        top = math.ceil(len(mate_score) * far)
        if not 0 < top <= len(found.impostor_K):
            raise ValueError(f"far {far} needs {top} impostor scores; the search kept {len(found.impostor_K)}")
        limit = found.impostor_K[top - 1]
        points.append(PairRecall(far, float(np.count_nonzero(mate_score > limit) / len(mate_score)), float(limit)))
    return points


def _group_by_subject(gallery_GD, gallery_subject_G):
    """Gallery rows with each subject's together, subjects in order of first appearance; first row of each."""
    subject_S, first_S, inverse_G = np.unique(gallery_subject_G, return_index=True, return_inverse=True)
    place_S = np.empty(len(subject_S), np.int64)
    appearance = np.argsort(first_S)
    place_S[appearance] = np.arange(len(subject_S))
    order_G = np.argsort(place_S[inverse_G], kind="stable")
    starts_S = np.append(0, np.cumsum(np.bincount(place_S[inverse_G]))[:-1])
    return gallery_GD[order_G], subject_S[appearance], starts_S


def _columns(subject_S, probe_subject_Q):
    """Column of each probe's subject, -1 where the gallery lacks it."""
    order = np.argsort(subject_S)
    place = np.minimum(np.searchsorted(subject_S[order], probe_subject_Q), len(subject_S) - 1)
    return np.where(subject_S[order][place] == probe_subject_Q, order[place], -1)


def _ranks(others_QS, mate_Q, column_Q):
    """1-based rank of each row's mate (left out of the scores): after better scores and equal ones before it."""
    rank_Q = 1 + np.count_nonzero(others_QS > mate_Q[:, None], axis=1)
    equal_QS = others_QS == mate_Q[:, None]
    # Usually nothing equals the mate; only the rows where something does need the order of the gallery.
    for row in np.flatnonzero(equal_QS.any(1)):
        rank_Q[row] += np.count_nonzero(equal_QS[row, : column_Q[row]])
    return rank_Q


class _Highest:
    """The k highest of a stream of scores."""

    def __init__(self, count: int):
        self.count = count
        self.values = np.empty(0)
        self.limit = -np.inf

    def add(self, parts: Iterable[np.ndarray]) -> None:
        self.values = np.concatenate([self.values, *parts])
        if len(self.values) > self.count:
            self.values = np.partition(self.values, len(self.values) - self.count)[-self.count :]
            self.limit = self.values.min()

    def sorted(self) -> np.ndarray:
        return np.sort(self.values)[::-1]
