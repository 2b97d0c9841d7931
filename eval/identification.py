"""1:N identification: closed-set CMC, open-set TPIR at FPIR, and the common IJB script's own numbers.

Legend: G gallery templates, S gallery subjects, Q probes, D embedding size. A subject's score is the best of its
gallery templates. Definitions (ISO/IEC 19795-1, IJB-C): a probe is mated if its subject is in the gallery. Closed set,
over mated probes: rank-k rate is the share whose subject is among the k best. Open set: FPIR is the share of non-mated
probes whose best score is accepted; TPIR the share of mated probes whose subject is accepted AND among the ``rank``
best. Equal scores rank in gallery order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.search import Search, search
from utils.errors import UserError


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
class PairRecall:
    """The reference 1:N script's figure: share of mated probes whose mate scores above the ``top``-th best impostor."""

    far: float
    recall: float
    threshold: float


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
        raise UserError(f"none of {len(found.mated_Q)} probes has its subject in the gallery; CMC needs mated probes")
    rates = tuple(float(np.count_nonzero(rank_Q <= rank) / len(rank_Q)) for rank in ranks)
    return ClosedSet(tuple(ranks), rates, len(rank_Q), found.num_subjects)


def tpir_at_fpir(found: Search, fpirs: Sequence[float] = (0.01, 0.1), rank: int = 1) -> list[OpenSet]:
    """``open_set`` of a search already made."""
    mated_Q = found.mated_Q
    others = np.sort(found.best_score_Q[~mated_Q])[::-1]
    if not len(others) or not mated_Q.any():
        found = f"{len(others)} non-mated and {int(mated_Q.sum())} mated probes"
        raise UserError(f"{found}; open-set identification needs both")
    within = found.mate_score_Q[mated_Q][found.mate_rank_Q[mated_Q] <= rank]
    points = []
    for fpir in fpirs:
        allowed = math.floor(fpir * len(others) + 1e-9)
        limit = others[allowed] if allowed < len(others) else -np.inf
        tpir = np.count_nonzero(within > limit) / mated_Q.sum()
        actual_fpir = np.count_nonzero(others > limit) / len(others)
        points.append(OpenSet(fpir, float(tpir), float(actual_fpir), float(limit)))
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
            raise UserError(f"far {far} needs {top} impostor scores; the search kept {len(found.impostor_K)}")
        limit = found.impostor_K[top - 1]
        points.append(PairRecall(far, float(np.count_nonzero(mate_score > limit) / len(mate_score)), float(limit)))
    return points
