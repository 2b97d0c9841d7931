"""From embeddings and labels to what is wrong with the labels, at memory that does not grow with the images.

1. People within an identity (``people.py``): its tree of images is cut where two groups are less alike than one
   person's are.
2. Directions of the parts (``parts.py``): images that are unlike their own part are left out of it, so that a wrong
   label does not pull it along.
3. Parts against parts, block by block: identities as close as two halves of one person.
4. Images against parts, block by block (here): images closer to another identity than to their own, an image never
   counted in its own centre and a person's second identity never counted as another.

What decides is closeness (``tools/clean/statistics.py``); what is written are cosines to unit centres.

Legend: N images, L identities, K parts (people within identities), M nearest parts of a part, D embedding size, B one
block, S sampled identities, F found images, P found pairs.
"""

import functools
from dataclasses import dataclass

import numpy as np

from tools.clean.parts import (
    Parts,
    clean_sums,
    halves_fall_to,
    linked_parts,
    nearest_parts,
    number_parts,
    others_reach,
    same_pairs,
    several_cosines,
)
from tools.clean.people import find_people, typical_agreement
from tools.clean.rows import BLOCK_BYTES, Rows
from tools.clean.statistics import DEFAULT_RULE, Rule, halfway
from utils.progress import progress_bar

_SAMPLED = 2000  # identities that thresholds are measured on


@dataclass(frozen=True)
class Thresholds:
    """Closenesses at which the answers change; NaN where the data set has too little to measure one."""

    person: float  # groups of an identity less close than this are two people
    same: dict[int, float]  # parts (the smaller has so many images) closer than this are one person
    outlier: float  # by how much an image is closer to another identity than to its own


@dataclass(frozen=True)
class Findings:
    """What ``analyse`` found. Pairs and images in order of descending certainty."""

    outlier_F: np.ndarray  # images closer to another identity than to their own
    nearest_F: np.ndarray  # that identity
    cos_own_F: np.ndarray
    cos_nearest_F: np.ndarray
    same_P2: np.ndarray  # identities that are one person
    same_cos_P: np.ndarray  # of their centres
    several: dict[int, list[np.ndarray]]  # identity -> image numbers of each of its people, largest first
    several_cos: dict[int, float]  # identity -> the lowest cosine between centres of its people
    close_N: np.ndarray  # by how much the nearest other identity is closer than the image's own; NaN: no telling
    nearest_N: np.ndarray  # the nearest other identity (-1: none)
    falls_to: dict[int, float]  # size -> what the closeness of so many of a person to the rest seldom falls below
    parts: Parts
    thresholds: Thresholds

    @property
    def notes(self) -> list[str]:
        """What could not be judged."""
        return ["no identity has images enough to hold two people (3 each)"] if np.isnan(self.thresholds.person) else []


def analyse(rows: Rows, rule: Rule = DEFAULT_RULE, seed: int = 0, show_progress: bool | None = None) -> Findings:
    """All findings about labels. Memory: blocks, three tables of K x D float32, about 60 bytes an image.

    Raises:
        UserError: an embedding is zero or not finite.
    """
    rng = np.random.default_rng(seed)
    sample_S = np.sort(rng.permutation(rows.num_identities)[:_SAMPLED])
    typical = typical_agreement(rows, sample_S)
    shared = {"rule": rule, "typical": typical, "show_progress": show_progress}
    several, person = find_people(rows, sample_S=sample_S, seed=int(rng.integers(2**31)), **shared)
    parts = clean_sums(rows, *number_parts(rows, several), rng=rng, **shared)
    falls_to = halves_fall_to(rows, parts, rule=rule, sample_S=sample_S, rng=rng)
    near_KM, close_KM = nearest_parts(parts.direction_KD, parts.identity_K, parts.count_K, show_progress)
    reach = others_reach(rule, close_KM[:, 0])
    same = {size: halfway(reach, low) for size, low in falls_to.items()}  # size of the smaller part
    linked_KM = linked_parts(near_KM, close_KM, parts.count_K, parts.count_K, same)
    compared = _compare_images(rows, parts, near_KM=near_KM, linked_KM=linked_KM, rng=rng, show_progress=show_progress)
    threshold = _outlier_threshold(rule, compared)
    flagged = _flag(rows, parts, compared, threshold)
    keep = (compared.nearest_N[flagged] >= 0) & ~(compared.cos_nearest_N[flagged] <= compared.cos_own_N[flagged])
    flagged = flagged[keep]
    flagged = flagged[np.argsort(-compared.close_N[flagged], kind="stable")]
    pair_P2, same_cos_P = same_pairs(parts, near_KM, linked_KM, close_KM)
    return Findings(
        outlier_F=flagged,
        nearest_F=compared.nearest_N[flagged],
        cos_own_F=compared.cos_own_N[flagged],
        cos_nearest_F=compared.cos_nearest_N[flagged],
        same_P2=pair_P2,
        same_cos_P=same_cos_P,
        several=several,
        several_cos=several_cosines(parts, several),
        close_N=compared.close_N,
        nearest_N=compared.nearest_N,
        falls_to=falls_to,
        parts=parts,
        thresholds=Thresholds(person, same, threshold),
    )


@dataclass(frozen=True)
class _Compared:
    """``close_N``: closeness to the nearest other identity less that to the own; ``wrong``: that of random labels."""

    close_N: np.ndarray
    nearest_close_N: np.ndarray
    nearest_N: np.ndarray
    cos_own_N: np.ndarray
    cos_nearest_N: np.ndarray
    wrong: np.ndarray


def _compare_images(
    rows: Rows, parts: Parts, *, near_KM: np.ndarray, linked_KM: np.ndarray, rng, show_progress=None
) -> _Compared:
    part_N, identity_K, count_K, direction_KD = parts.part_N, parts.identity_K, parts.count_K, parts.direction_KD
    num_images, num_parts = len(rows), len(identity_K)
    length_K = np.sqrt(np.einsum("kd,kd->k", parts.sum_KD, parts.sum_KD, dtype=np.float64))
    direction_length_K = np.sqrt(np.einsum("kd,kd->k", direction_KD, direction_KD, dtype=np.float64))
    empty = np.flatnonzero(count_K == 0)
    close_N, near_close_N, cos_own_N, cos_near_N = (np.full(num_images, np.nan, np.float32) for _ in range(4))
    nearest_N = np.full(num_images, -1, np.int32)
    wrong, share = [], 1 + num_images // 4_000_000  # a sample is enough for a quantile
    height = max(1, BLOCK_BYTES // (4 * num_parts))
    score_BK = np.empty((height, num_parts), np.float32)

    @functools.lru_cache(1024)
    def excluded_of(part: int) -> np.ndarray:
        """Parts that are the same person."""
        return np.array([*parts.of_same_identity(part), *near_KM[part][linked_KM[part]]])

    with progress_bar("images x identities", num_images, enabled=show_progress) as advance:
        for image_B, unit_BD in rows.blocks(height):
            part_B, counted_B = part_N[image_B], parts.counted_N[image_B].astype(np.float32)
            own_B = parts.own_closeness(image_B, unit_BD)
            score = np.matmul(unit_BD, direction_KD.T, out=score_BK[: len(image_B)])
            random_B = rng.integers(0, num_parts, len(image_B))
            random_close_B = score[np.arange(len(image_B)), random_B].copy()
            random_other_B = (identity_K[random_B] != identity_K[part_B]) & (count_K[random_B] > 0)
            score[:, empty] = -np.inf
            for row, part in enumerate(part_B.tolist()):
                score[row, excluded_of(part)] = -np.inf
                random_other_B[row] &= random_B[row] not in excluded_of(part)
            best_B = score.argmax(1)
            best_close_B = score[np.arange(len(image_B)), best_B]
            known = np.isfinite(best_close_B)
            nearest_N[image_B[known]] = identity_K[best_B[known]]
            near_close_N[image_B[known]] = best_close_B[known]
            close_N[image_B[known]] = (best_close_B - own_B)[known]
            cos_near_N[image_B[known]] = (best_close_B / direction_length_K[best_B].clip(1e-12))[known]
            rest = np.einsum("bd,bd->b", unit_BD, parts.sum_KD[part_B])
            rest_length = np.sqrt((length_K[part_B] ** 2 - counted_B * (2 * rest - 1)).clip(1e-12))
            cos_own_N[image_B] = np.where(np.isfinite(own_B), (rest - counted_B) / rest_length, np.nan)
            chosen = random_other_B & known
            wrong.append((np.fmax(own_B, best_close_B) - random_close_B)[chosen][::share])
            advance(len(image_B))
    return _Compared(close_N, near_close_N, nearest_N, cos_own_N, cos_near_N, np.concatenate(wrong))


def _outlier_threshold(rule: Rule, found: _Compared) -> float:
    """Between the bulk of the images and the same images under random labels; at least 0."""
    judged = found.close_N[np.isfinite(found.close_N)]
    if not len(judged) or not len(found.wrong):
        return np.nan
    right_reaches = rule.fence(judged, 1)
    wrong_falls_to = rule.own_falls_to(found.wrong)
    return max(0.0, (right_reaches + max(wrong_falls_to, right_reaches)) / 2)


def _flag(rows: Rows, parts: Parts, found: _Compared, threshold: float) -> np.ndarray:
    """Images above the threshold, the worst of a part first; the rest of the part is judged again without it.

    Of two images that disagree, the one that belongs elsewhere goes; nobody is left then to speak against the other.
    """
    if not np.isfinite(threshold):
        return np.empty(0, np.int64)
    suspects = np.flatnonzero(found.close_N > threshold)
    part_F, flagged = parts.part_N[suspects], []
    for part in np.unique(part_F).tolist():
        mine = suspects[part_F == part]
        unit_nD = rows.unit(mine)
        sum_D, count = parts.sum_KD[part].astype(np.float64), int(parts.count_K[part])
        alive = np.ones(len(mine), bool)
        counted = parts.counted_N[mine].astype(np.float64)
        while alive.any():
            others = count - counted
            with np.errstate(divide="ignore", invalid="ignore"):
                own = (unit_nD @ sum_D - counted) / (others * np.sqrt(parts.steady_K[part]))
            excess = np.where(alive & (others > 0), found.nearest_close_N[mine] - own, -np.inf)
            worst = int(np.argmax(excess))
            if excess[worst] <= threshold:
                break
            flagged.append(mine[worst])
            alive[worst] = False
            if counted[worst]:
                sum_D, count = sum_D - unit_nD[worst], count - 1
                counted[worst] = 0
    return np.array(sorted(flagged), np.int64)
