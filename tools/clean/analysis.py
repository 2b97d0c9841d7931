"""From embeddings and labels to what is wrong with the labels, at memory that does not grow with the images.

1. People within an identity: its tree of images is cut where two groups are less alike than one person's are.
2. Directions of the parts: images that are unlike their own part are left out of it, so that a wrong label does not
   pull it along.
3. Parts against parts, block by block: identities as close as two halves of one person.
4. Images against parts, block by block: images closer to another identity than to their own, an image never counted in
   its own centre and a person's second identity never counted as another.

What decides is closeness (``tools/clean/statistics.py``); what is written are cosines to unit centres.

Legend: N images, L identities, K parts (people within identities), D embedding size, B one block, S sampled parts.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from tools.clean.rows import BLOCK_BYTES, Rows
from tools.clean.statistics import (
    DEFAULT_RULE,
    SIZES,
    Rule,
    Tree,
    agreement,
    directions,
    halfway,
    halves,
    steady_agreement,
)
from utils.progress import progress_bar

NEIGHBOURS = 8  # parts kept as candidates for being the same person
_SAMPLED = 2000  # identities that thresholds are measured on
_DRAWS = 8000  # random halves in all, for each size
_LARGEST_TREE = 2048  # an identity with more images: its people are found on a sample
_SMALLEST_PERSON, _SMALLEST_SHARE = 3, 0.1  # fewer images under one label are wrong labels, not a second person


@dataclass(frozen=True)
class Thresholds:
    """Closenesses at which the answers change; NaN where the data set has too little to measure one."""

    person: float  # groups of an identity less close than this are two people
    member: float  # an image less close than this to the rest of its part is left out of the part
    same: dict[int, float]  # parts (the smaller has so many images) closer than this are one person
    outlier: float  # by how much an image is closer to another identity than to its own


@dataclass(frozen=True)
class Findings:
    """What ``analyse`` found. Pairs and images in order of descending certainty.

    Attributes:
        outlier_F: images closer to another identity than to their own.
        nearest_F, cos_own_F, cos_nearest_F: that identity, and the cosines to both.
        same_P2: pairs of identities that are one person; ``same_cos_P``: cosine of their centres.
        several: identity -> image numbers of each of its people, largest first.
        several_cos: identity -> the lowest cosine between centres of its people.
        part_N: part of each image; identity of each part in ``identity_K``.
        centre_sum_KD, count_K: sums of the unit rows counted in each part, and how many.
        close_N: by how much the nearest other identity is closer than the image's own (NaN: nothing to judge by).
        nearest_N: the nearest other identity (-1: none).
        typical: the data set's typical agreement.
        falls_to: size -> what the closeness of so many images of a person to the rest seldom falls below.
        counted_N: images that count in the sum of their part (what is unlike its part does not).
    """

    outlier_F: np.ndarray
    nearest_F: np.ndarray
    cos_own_F: np.ndarray
    cos_nearest_F: np.ndarray
    same_P2: np.ndarray
    same_cos_P: np.ndarray
    several: dict[int, list[np.ndarray]]
    several_cos: dict[int, float]
    part_N: np.ndarray
    identity_K: np.ndarray
    centre_sum_KD: np.ndarray
    count_K: np.ndarray
    close_N: np.ndarray
    nearest_N: np.ndarray
    typical: float
    falls_to: dict[int, float]
    counted_N: np.ndarray
    thresholds: Thresholds
    notes: list[str] = field(default_factory=list)


def analyse(rows: Rows, rule: Rule = DEFAULT_RULE, seed: int = 0, show_progress: bool | None = None) -> Findings:
    """All findings about labels. Memory: blocks, three tables of K x D float32, about 60 bytes an image.

    Raises:
        UserError: an embedding is zero or not finite.
    """
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    sample_S = np.sort(rng.permutation(rows.num_identities)[:_SAMPLED])
    typical = _typical_agreement(rows, sample_S)
    several, person = _find_people(rows, rule, typical, sample_S, rng, show_progress, notes)
    part_N, identity_K = _number_parts(rows, several)
    sum_KD, count_K, member = _clean_sums(rows, rule, part_N, identity_K, typical, rng, show_progress)
    counted_N = member.counted_N
    direction_KD = directions(sum_KD, count_K, typical)
    falls_to = _halves_fall_to(rows, rule, part_N, counted_N, sample_S, typical, rng)
    near_KM, close_KM = nearest_parts(direction_KD, identity_K, count_K, show_progress)
    same = _same_thresholds(rule, close_KM[:, 0], falls_to)
    linked_KM = _linked(near_KM, close_KM, count_K, same)
    found = _compare_images(
        rows, part_N, counted_N, identity_K, sum_KD, count_K, direction_KD, near_KM, linked_KM, typical, rng,
        show_progress,
    )  # fmt: skip
    threshold = _outlier_threshold(rule, found)
    flagged = _flag(rows, part_N, counted_N, sum_KD, count_K, found, threshold, typical)
    near = found.nearest_N[flagged]
    cos_own = found.cos_own_N[flagged]
    keep = (near >= 0) & ~(found.cos_nearest_N[flagged] <= cos_own)
    flagged = flagged[keep]
    flagged = flagged[np.argsort(-found.close_N[flagged], kind="stable")]
    pairs, cosines = _same_pairs(near_KM, linked_KM, close_KM, identity_K, sum_KD)
    return Findings(
        outlier_F=flagged,
        nearest_F=found.nearest_N[flagged],
        cos_own_F=found.cos_own_N[flagged],
        cos_nearest_F=found.cos_nearest_N[flagged],
        same_P2=pairs,
        same_cos_P=cosines,
        several=several,
        several_cos=_several_cosines(several, identity_K, sum_KD),
        part_N=part_N,
        identity_K=identity_K,
        centre_sum_KD=sum_KD,
        count_K=count_K,
        close_N=found.close_N,
        nearest_N=found.nearest_N,
        typical=typical,
        falls_to=falls_to,
        counted_N=counted_N,
        thresholds=Thresholds(person, member.threshold, same, threshold),
        notes=notes,
    )


def _typical_agreement(rows: Rows, sample_S: np.ndarray) -> float:
    """Median agreement of sampled identities with four images or more (two, where none has four)."""
    for least in (4, 2):
        values = []
        for identity in sample_S[rows.count_L[sample_S] >= least].tolist():
            unit = rows.unit(rows.images_of(identity)[:_LARGEST_TREE])
            values.append(agreement(unit.sum(0, keepdims=True), np.array([len(unit)]))[0])
        if values:
            return max(float(np.median(values)), 1e-3)
    return 0.5  # single images only: nothing measures it, and nothing but closeness between images depends on it


# --- 1. people within an identity


def _smallest_person(num_images: int) -> int:
    return max(_SMALLEST_PERSON, int(np.ceil(_SMALLEST_SHARE * num_images)))


def _tree_images(rows: Rows, identity: int, rng_seed: int) -> np.ndarray:
    """The images that an identity's tree is made of: all, or a sample that is the same in every call."""
    image_n = rows.images_of(identity)
    if len(image_n) <= _LARGEST_TREE:
        return image_n
    chosen = np.random.default_rng((rng_seed, identity)).permutation(len(image_n))[:_LARGEST_TREE]
    return image_n[np.sort(chosen)]


def _find_people(rows, rule, typical, sample_S, rng, show_progress, notes):
    """(identity -> images of each of its people, the threshold)."""
    seed = int(rng.integers(2**31))
    large_L = rows.count_L >= 2 * _SMALLEST_PERSON
    weakest_L = np.full(rows.num_identities, np.inf)
    with progress_bar("identities", int(large_L.sum()), enabled=show_progress) as advance:
        for identity, unit_nD in _trees_rows(rows, large_L, seed):
            weakest_L[identity] = Tree(unit_nD, _smallest_person(len(unit_nD)), typical).weakest
            advance(1)
    measured = weakest_L[np.isfinite(weakest_L)]
    if not len(measured):
        notes.append("no identity has images enough to hold two people (3 each)")
        return {}, np.nan
    others = _between_identities(rows, sample_S, typical)
    own_falls_to = rule.fence(measured, -1)
    reach = rule.others_reach(others) if len(others) else own_falls_to
    threshold = halfway(reach, own_falls_to)
    several = {}
    for identity in np.flatnonzero(weakest_L < threshold).tolist():
        image_n = _tree_images(rows, identity, seed)
        unit_nD = rows.unit(image_n)
        people = Tree(unit_nD, _smallest_person(len(image_n)), typical).people(threshold)
        if len(people) > 1:
            several[identity] = _assign(rows, identity, [unit_nD[members].mean(0) for members in people])
    return several, threshold


def _trees_rows(rows: Rows, wanted_L: np.ndarray, seed: int):
    """(identity, unit rows of its tree) of wanted identities; those of a sample are gathered by themselves."""
    done = -1
    for identity, _, unit_nD in rows.identity_blocks():
        if not wanted_L[identity] or identity == done:
            continue
        done = identity
        if not len(unit_nD) == rows.count_L[identity] <= _LARGEST_TREE:
            unit_nD = rows.unit(_tree_images(rows, identity, seed))
        yield identity, unit_nD


def _between_identities(rows: Rows, sample_S: np.ndarray, typical: float) -> np.ndarray:
    """Closenesses of every two sampled identities."""
    count_S = rows.count_L[sample_S]
    sum_SD = np.stack([rows.unit(rows.images_of(i)[:_LARGEST_TREE]).sum(0) for i in sample_S.tolist()])
    direction_SD = directions(sum_SD, np.minimum(count_S, _LARGEST_TREE), typical)
    return (direction_SD @ direction_SD.T)[np.triu_indices(len(sample_S), 1)]


def _assign(rows: Rows, identity: int, centres: list[np.ndarray]) -> list[np.ndarray]:
    """Every image of an identity to the person whose images are closest on average."""
    centre_PD = np.stack(centres)
    image_n = rows.images_of(identity)
    chosen = [np.argmax(rows.unit(image_n[first : first + 8192]) @ centre_PD.T, axis=1)
              for first in range(0, len(image_n), 8192)]  # fmt: skip
    chosen = np.concatenate(chosen)
    groups = [image_n[chosen == person] for person in range(len(centres))]
    return sorted((group for group in groups if len(group)), key=len, reverse=True)


def _number_parts(rows: Rows, several: dict[int, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(part of each image, identity of each part): an identity's first part has its own number."""
    part_N = rows.identity_N.copy()
    identity_K = list(range(rows.num_identities))
    for identity, people in several.items():
        for images in people[1:]:
            part_N[images] = len(identity_K)
            identity_K.append(identity)
    return part_N, np.array(identity_K)


# --- 2. directions of the parts


@dataclass(frozen=True)
class _Members:
    threshold: float
    counted_N: np.ndarray


def add_to_sums(part_B: np.ndarray, unit_BD: np.ndarray, weight_B: np.ndarray, sum_KD: np.ndarray) -> None:
    """Add a block's rows to the sums of their parts."""
    part, inverse = np.unique(part_B, return_inverse=True)
    matrix = sparse.csr_matrix((weight_B, (inverse, np.arange(len(part_B)))), shape=(len(part), len(part_B)))
    sum_KD[part] += matrix @ unit_BD


def _own_closeness(unit_BD, part_B, counted_B, sum_KD, count_K, steady_K):
    """[B] closeness of an image to the other images of its part (itself taken out); NaN where there is none."""
    others_B = count_K[part_B] - counted_B
    product_B = np.einsum("bd,bd->b", unit_BD, sum_KD[part_B]) - counted_B
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(others_B > 0, product_B / (others_B * np.sqrt(steady_K[part_B])), np.nan)


def _clean_sums(rows, rule, part_N, identity_K, typical, rng, show_progress):
    """(sums [K, D] float32, images counted [K], which images are counted): parts without what is unlike them."""
    num_parts = len(identity_K)
    sum_KD = np.zeros((num_parts, rows.embedding_size), np.float32)
    with progress_bar("centres", 2 * len(rows), enabled=show_progress) as advance:
        for image_B, unit_BD in rows.blocks():
            add_to_sums(part_N[image_B], unit_BD, np.ones(len(image_B), np.float32), sum_KD)
            advance(len(image_B))
        count_K = np.bincount(part_N, minlength=num_parts)
        direction_KD = directions(sum_KD, count_K, typical)
        steady_K = steady_agreement(agreement(sum_KD, count_K), count_K, typical)
        own_N, others = np.full(len(rows), np.nan, np.float32), []
        for image_B, unit_BD in rows.blocks():
            own_N[image_B] = _own_closeness(unit_BD, part_N[image_B], 1, sum_KD, count_K, steady_K)
            if num_parts > 1:
                step = max(1, len(image_B) * rows.embedding_size // (1 << 22))
                some = np.arange(0, len(image_B), step)
                other = (part_N[image_B[some]] + rng.integers(1, num_parts, len(some))) % num_parts
                others.append(np.einsum("bd,bd->b", unit_BD[some], direction_KD[other]))
            advance(len(image_B))
    del direction_KD
    judged = own_N[np.isfinite(own_N)]
    if not len(judged):
        return sum_KD, count_K, _Members(np.nan, np.ones(len(rows), bool))
    own_falls_to = rule.fence(judged, -1)
    reach = rule.others_reach(np.concatenate(others)) if others else own_falls_to
    threshold = halfway(reach, own_falls_to)
    counted_N = ~(own_N < threshold)
    left_K = np.bincount(part_N[counted_N], minlength=num_parts)
    counted_N |= (left_K < count_K / 2)[part_N]  # most of a part unlike the rest: nobody knows which is right
    dropped = np.flatnonzero(~counted_N)
    for first in range(0, len(dropped), 1024):
        image_B = dropped[first : first + 1024]
        add_to_sums(part_N[image_B], rows.unit(image_B), np.full(len(image_B), -1, np.float32), sum_KD)
    return sum_KD, np.bincount(part_N[counted_N], minlength=num_parts), _Members(threshold, counted_N)


# --- 3. parts against parts


def _halves_fall_to(rows, rule, part_N, counted_N, sample_S, typical, rng) -> dict[int, float]:
    """Size -> what the closeness of so many images of a part to the rest of it seldom falls below."""
    values: dict[int, list[float]] = {size: [] for size in SIZES}
    draws = max(1, min(20, _DRAWS // max(1, len(sample_S))))
    for identity in sample_S.tolist():
        image_n = rows.images_of(identity)[:_LARGEST_TREE]
        image_n = image_n[(part_N[image_n] == identity) & counted_N[image_n]]
        if len(image_n) < 2:
            continue
        unit_nD = rows.unit(image_n)
        for size in (size for size in SIZES if len(image_n) >= 2 * size):
            values[size] += [halves(unit_nD, size, typical, rng) for _ in range(draws)]
    return {size: rule.own_falls_to(np.array(found)) for size, found in values.items() if found}


def nearest_parts(direction_KD, identity_K, count_K, show_progress=None) -> tuple[np.ndarray, np.ndarray]:
    """The closest parts of other identities: (parts [K, M] int32, closenesses [K, M]), descending; -1 fills up."""
    num_parts = len(direction_KD)
    most = min(NEIGHBOURS, max(num_parts - 1, 1))
    near_KM = np.full((num_parts, most), -1, np.int32)
    close_KM = np.full((num_parts, most), -np.inf, np.float32)
    own_parts = _parts_by_identity(identity_K)
    empty = np.flatnonzero(count_K == 0)
    height = max(1, BLOCK_BYTES // (4 * num_parts))
    with progress_bar("identities x identities", num_parts, enabled=show_progress) as advance:
        for first in range(0, num_parts, height):
            score = direction_KD[first : first + height] @ direction_KD.T
            score[:, empty] = -np.inf
            for row in range(len(score)):
                score[row, own_parts(first + row)] = -np.inf
            score[count_K[first : first + height] == 0] = -np.inf
            best = np.argpartition(score, num_parts - most, axis=1)[:, num_parts - most :]
            value = np.take_along_axis(score, best, 1)
            order = np.argsort(-value, axis=1, kind="stable")
            part = slice(first, first + len(score))
            near_KM[part] = np.take_along_axis(best, order, 1)
            close_KM[part] = np.take_along_axis(value, order, 1)
            advance(len(score))
    near_KM[~np.isfinite(close_KM)] = -1
    return near_KM, close_KM


def _parts_by_identity(identity_K: np.ndarray):
    """part -> all parts of its identity. Parts beyond the first of each identity stand at the end."""
    more: dict[int, list[int]] = {}
    num_identities = int(identity_K.max()) + 1 if len(identity_K) else 0
    for part in range(num_identities, len(identity_K)):
        more.setdefault(int(identity_K[part]), []).append(part)

    def parts(part: int) -> list[int]:
        identity = int(identity_K[part])
        return [identity, *more.get(identity, ())]

    return parts


def _same_thresholds(rule: Rule, nearest_K: np.ndarray, falls_to: dict[int, float]) -> dict[int, float]:
    """Size of the smaller part -> closeness above which two parts are one person."""
    known = nearest_K[np.isfinite(nearest_K)]
    reach = rule.fence(known, 1) if len(known) else np.inf
    return {size: halfway(reach, low) for size, low in falls_to.items()}


def threshold_at(thresholds: dict[int, float], count: np.ndarray) -> np.ndarray:
    """The threshold of each count: that of the largest measured size which it reaches; inf where none is measured."""
    if not thresholds:
        return np.full(np.shape(count), np.inf)
    sizes = np.array(sorted(thresholds))
    table = np.array([thresholds[size] for size in sizes.tolist()])
    place = np.searchsorted(sizes, count, side="right") - 1
    return np.where(place >= 0, table[np.maximum(place, 0)], np.inf)


def _linked(near_KM, close_KM, count_K, same: dict[int, float]) -> np.ndarray:
    """Which neighbours are the same person, bool [K, M]."""
    smaller_KM = np.minimum(count_K[:, None], count_K[np.maximum(near_KM, 0)])
    return (near_KM >= 0) & (close_KM > threshold_at(same, smaller_KM))


def _centre_cosine(sum_KD: np.ndarray, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    left, right = sum_KD[left_P].astype(np.float64), sum_KD[right_P].astype(np.float64)
    length = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.einsum("pd,pd->p", left, right) / np.where(length == 0, 1, length)


def _same_pairs(near_KM, linked_KM, close_KM, identity_K, sum_KD) -> tuple[np.ndarray, np.ndarray]:
    """(pairs of identities, smaller number first, cosines), the closest first; each pair once."""
    part_P, column_P = np.nonzero(linked_KM)
    other_P = near_KM[part_P, column_P]
    order = np.argsort(-close_KM[part_P, column_P], kind="stable")
    part_P, other_P = part_P[order], other_P[order]
    pair_P2 = np.sort(np.stack([identity_K[part_P], identity_K[other_P]], 1), axis=1).reshape(-1, 2)
    _, first = np.unique(pair_P2, axis=0, return_index=True)
    first = np.sort(first)
    return pair_P2[first], _centre_cosine(sum_KD, part_P[first], other_P[first])


def _several_cosines(several, identity_K, sum_KD) -> dict[int, float]:
    own_parts = _parts_by_identity(identity_K)
    cosines = {}
    for identity in several:
        parts = np.array(own_parts(identity))
        left, right = np.triu_indices(len(parts), 1)
        cosines[identity] = float(_centre_cosine(sum_KD, parts[left], parts[right]).min())
    return cosines


# --- 4. images against parts


@dataclass(frozen=True)
class _Compared:
    """``close_N``: closeness to the nearest other identity less that to the own; ``wrong``: that of random labels."""

    close_N: np.ndarray
    nearest_close_N: np.ndarray
    nearest_N: np.ndarray
    cos_own_N: np.ndarray
    cos_nearest_N: np.ndarray
    wrong: np.ndarray


def _compare_images(rows, part_N, counted_N, identity_K, sum_KD, count_K, direction_KD, near_KM, linked_KM, typical,
                    rng, show_progress):  # fmt: skip
    num_images, num_parts = len(rows), len(identity_K)
    own_parts = _parts_by_identity(identity_K)
    steady_K = steady_agreement(agreement(sum_KD, count_K), count_K, typical)
    length_K = np.sqrt(np.einsum("kd,kd->k", sum_KD, sum_KD, dtype=np.float64))
    direction_length_K = np.sqrt(np.einsum("kd,kd->k", direction_KD, direction_KD, dtype=np.float64))
    empty = np.flatnonzero(count_K == 0)
    close_N, near_close_N, cos_own_N, cos_near_N = (np.full(num_images, np.nan, np.float32) for _ in range(4))
    nearest_N = np.full(num_images, -1, np.int32)
    wrong, share = [], 1 + num_images // 4_000_000  # a sample is enough for a quantile
    height = max(1, BLOCK_BYTES // (4 * num_parts))
    score_BK = np.empty((height, num_parts), np.float32)
    excluded_of: dict[int, np.ndarray] = {}
    with progress_bar("images x identities", num_images, enabled=show_progress) as advance:
        for image_B, unit_BD in rows.blocks(height):
            part_B, counted_B = part_N[image_B], counted_N[image_B].astype(np.float32)
            own_B = _own_closeness(unit_BD, part_B, counted_B, sum_KD, count_K, steady_K)
            score = np.matmul(unit_BD, direction_KD.T, out=score_BK[: len(image_B)])
            random_B = rng.integers(0, num_parts, len(image_B))
            random_close_B = score[np.arange(len(image_B)), random_B].copy()
            random_other_B = (identity_K[random_B] != identity_K[part_B]) & (count_K[random_B] > 0)
            score[:, empty] = -np.inf
            excluded_of = {part: excluded_of.get(part) for part in np.unique(part_B).tolist()}
            for row, part in enumerate(part_B.tolist()):
                excluded = excluded_of[part]
                if excluded is None:
                    excluded = excluded_of[part] = np.array([*own_parts(part), *near_KM[part][linked_KM[part]]])
                score[row, excluded] = -np.inf
                random_other_B[row] &= random_B[row] not in excluded
            best_B = score.argmax(1)
            best_close_B = score[np.arange(len(image_B)), best_B]
            known = np.isfinite(best_close_B)
            nearest_N[image_B[known]] = identity_K[best_B[known]]
            near_close_N[image_B[known]] = best_close_B[known]
            close_N[image_B[known]] = (best_close_B - own_B)[known]
            cos_near_N[image_B[known]] = (best_close_B / direction_length_K[best_B].clip(1e-12))[known]
            rest = np.einsum("bd,bd->b", unit_BD, sum_KD[part_B])
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


def _flag(rows, part_N, counted_N, sum_KD, count_K, found, threshold, typical) -> np.ndarray:
    """Images above the threshold, the worst of a part first; the rest of the part is judged again without it.

    Of two images that disagree, the one that belongs elsewhere goes; nobody is left then to speak against the other.
    """
    if not np.isfinite(threshold):
        return np.empty(0, np.int64)
    steady_K = steady_agreement(agreement(sum_KD, count_K), count_K, typical)
    suspects = np.flatnonzero(found.close_N > threshold)
    flagged = []
    for part in np.unique(part_N[suspects]).tolist():
        mine = suspects[part_N[suspects] == part]
        unit_nD = rows.unit(mine)
        sum_D, count = sum_KD[part].astype(np.float64), int(count_K[part])
        alive = np.ones(len(mine), bool)
        counted = counted_N[mine].astype(np.float64)
        while alive.any():
            others = count - counted
            with np.errstate(divide="ignore", invalid="ignore"):
                own = (unit_nD @ sum_D - counted) / (others * np.sqrt(steady_K[part]))
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
