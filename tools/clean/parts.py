"""Parts: the people within identities, their centres without what is unlike them, and which parts are one person.

Legend: N images, L identities, K parts (an identity's first has its own number, further ones stand at the end),
M nearest parts of a part, D embedding size, B one block, S sampled identities.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from tools.clean.people import LARGEST_TREE
from tools.clean.rows import BLOCK_BYTES, Rows
from tools.clean.statistics import Rule, agreement, directions, halfway, halves, steady_agreement
from utils.progress import progress_bar

NEIGHBOURS = 8  # parts kept as candidates for being the same person
_DRAWS = 8000  # random halves in all, for each size


@dataclass(frozen=True)
class Parts:
    """Who is in the data set, as far as is known."""

    part_N: np.ndarray  # part of each image
    identity_K: np.ndarray  # identity of each part
    counted_N: np.ndarray  # images that count in the sum of their part (what is unlike its part does not)
    sum_KD: np.ndarray  # of the unit rows that count, float32
    count_K: np.ndarray  # how many these are
    typical: float  # the data set's typical agreement

    @cached_property
    def steady_K(self) -> np.ndarray:
        """Agreement of each part, drawn towards the typical one."""
        return steady_agreement(agreement(self.sum_KD, self.count_K), self.count_K, self.typical)

    @cached_property
    def direction_KD(self) -> np.ndarray:
        """What to multiply with, so that products are closenesses."""
        return directions(self.sum_KD, self.count_K, self.typical)

    @cached_property
    def of_same_identity(self) -> Callable[[int], list[int]]:
        """Part -> all parts of its identity."""
        return parts_of_same_identity(self.identity_K)

    def own_closeness(self, image_B: np.ndarray, unit_BD: np.ndarray) -> np.ndarray:
        """[B] closeness of an image to the other images of its part (itself taken out); NaN where there is none."""
        part_B, counted_B = self.part_N[image_B], self.counted_N[image_B].astype(np.float32)
        others_B = self.count_K[part_B] - counted_B
        product_B = np.einsum("bd,bd->b", unit_BD, self.sum_KD[part_B]) - counted_B
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(others_B > 0, product_B / (others_B * np.sqrt(self.steady_K[part_B])), np.nan)

    def centre_cosine(self, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
        """Cosines between centres of parts, float64 [P]."""
        left, right = self.sum_KD[left_P].astype(np.float64), self.sum_KD[right_P].astype(np.float64)
        length = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return np.einsum("pd,pd->p", left, right) / np.where(length == 0, 1, length)


def number_parts(rows: Rows, several: dict[int, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(part of each image, identity of each part): an identity's first part has its own number."""
    part_N = rows.identity_N.copy()
    identity_K = list(range(rows.num_identities))
    for identity, people in several.items():
        for images in people[1:]:
            part_N[images] = len(identity_K)
            identity_K.append(identity)
    return part_N, np.array(identity_K)


def parts_of_same_identity(identity_K: np.ndarray) -> Callable[[int], list[int]]:
    """Part -> all parts of its identity."""
    more = defaultdict(list)
    for part in range(int(identity_K.max(initial=-1)) + 1, len(identity_K)):
        more[int(identity_K[part])].append(part)
    return lambda part: [int(identity_K[part]), *more.get(int(identity_K[part]), ())]


def add_to_sums(sum_KD: np.ndarray, part_B: np.ndarray, unit_BD: np.ndarray, weight: float = 1) -> None:
    """Add a block's rows to the sums of their parts."""
    part, inverse = np.unique(part_B, return_inverse=True)
    weight_B = np.full(len(part_B), weight, np.float32)
    matrix = sparse.csr_matrix((weight_B, (inverse, np.arange(len(part_B)))), shape=(len(part), len(part_B)))
    sum_KD[part] += matrix @ unit_BD


def sums_of(rows: Rows, part_N: np.ndarray, num_parts: int, advance=lambda count: None) -> np.ndarray:
    """Sums of the unit rows of each part, float32 [K, D]; ``advance`` is called with images done."""
    sum_KD = np.zeros((num_parts, rows.embedding_size), np.float32)
    for image_B, unit_BD in rows.blocks():
        add_to_sums(sum_KD, part_N[image_B], unit_BD)
        advance(len(image_B))
    return sum_KD


def clean_sums(
    rows: Rows, part_N: np.ndarray, identity_K: np.ndarray, *, rule: Rule, typical: float, rng, show_progress=None
) -> Parts:
    """The parts without what is unlike them; ``rng`` draws the other parts that images are compared with."""
    num_parts = len(identity_K)
    with progress_bar("centres", 2 * len(rows), enabled=show_progress) as advance:
        sum_KD = sums_of(rows, part_N, num_parts, advance)
        count_K = np.bincount(part_N, minlength=num_parts)
        every = Parts(part_N, identity_K, np.ones(len(rows), bool), sum_KD, count_K, typical)
        own_N, others = np.full(len(rows), np.nan, np.float32), []
        for image_B, unit_BD in rows.blocks():
            own_N[image_B] = every.own_closeness(image_B, unit_BD)
            if num_parts > 1:
                step = max(1, len(image_B) * rows.embedding_size // (1 << 22))
                some = np.arange(0, len(image_B), step)
                other = (part_N[image_B[some]] + rng.integers(1, num_parts, len(some))) % num_parts
                others.append(np.einsum("bd,bd->b", unit_BD[some], every.direction_KD[other]))
            advance(len(image_B))
    judged = own_N[np.isfinite(own_N)]
    if not len(judged):
        return every
    own_falls_to = rule.fence(judged, -1)
    reach = rule.others_reach(np.concatenate(others)) if others else own_falls_to
    threshold = halfway(reach, own_falls_to)
    counted_N = ~(own_N < threshold)
    left_K = np.bincount(part_N[counted_N], minlength=num_parts)
    counted_N |= (left_K < count_K / 2)[part_N]  # most of a part unlike the rest: nobody knows which is right
    del every  # and its directions
    dropped = np.flatnonzero(~counted_N)
    for first in range(0, len(dropped), 1024):
        image_B = dropped[first : first + 1024]
        add_to_sums(sum_KD, part_N[image_B], rows.unit(image_B), -1)
    count_K = np.bincount(part_N[counted_N], minlength=num_parts)
    return Parts(part_N, identity_K, counted_N, sum_KD, count_K, typical)


def halves_fall_to(rows: Rows, parts: Parts, *, rule: Rule, sample_S: np.ndarray, rng) -> dict[int, float]:
    """Size -> what the closeness of so many images of a part to the rest of it seldom falls below."""

    def units() -> Iterator[np.ndarray]:
        for identity in sample_S.tolist():
            image_n = rows.images_of(identity)[:LARGEST_TREE]
            image_n = image_n[(parts.part_N[image_n] == identity) & parts.counted_N[image_n]]
            if len(image_n) > 1:
                yield rows.unit(image_n)

    draws = max(1, min(20, _DRAWS // max(1, len(sample_S))))
    values = halves(units(), draws, parts.typical, rng)
    return {size: rule.own_falls_to(np.array(found)) for size, found in values.items() if found}


def closest_parts(
    query_QD: np.ndarray,
    direction_KD: np.ndarray,
    count_K: np.ndarray,
    excluded_of=lambda query: [],
    show_progress=None,
) -> tuple[np.ndarray, np.ndarray]:
    """The closest parts of each query: (parts int32 [Q, M], closenesses [Q, M]), descending; -1 fills up.

    ``excluded_of``: query -> the parts that do not count for it.
    """
    num_parts = len(direction_KD)
    most = min(NEIGHBOURS, num_parts)
    near_QM = np.empty((len(query_QD), most), np.int32)
    close_QM = np.empty((len(query_QD), most), np.float32)
    empty = np.flatnonzero(count_K == 0)
    height = max(1, BLOCK_BYTES // (4 * num_parts))
    with progress_bar("identities x identities", len(query_QD), enabled=show_progress) as advance:
        for first in range(0, len(query_QD), height):
            part = slice(first, first + height)
            score = query_QD[part] @ direction_KD.T
            score[:, empty] = -np.inf
            for row in range(len(score)):
                score[row, excluded_of(first + row)] = -np.inf
            best = np.argpartition(score, num_parts - most, axis=1)[:, num_parts - most :]
            value = np.take_along_axis(score, best, 1)
            order = np.argsort(-value, axis=1, kind="stable")
            near_QM[part] = np.take_along_axis(best, order, 1)
            close_QM[part] = np.take_along_axis(value, order, 1)
            advance(len(score))
    near_QM[~np.isfinite(close_QM)] = -1
    return near_QM, close_QM


def nearest_parts(direction_KD, identity_K, count_K, show_progress=None) -> tuple[np.ndarray, np.ndarray]:
    """``closest_parts`` of every part among those of other identities; an empty one has none."""
    own, every = parts_of_same_identity(identity_K), slice(None)
    return closest_parts(
        direction_KD, direction_KD, count_K, lambda part: own(part) if count_K[part] else every, show_progress
    )


def others_reach(rule: Rule, close: np.ndarray) -> float:
    """How close other people come, from the closeness of everybody's nearest; inf where there is nobody."""
    known = close[np.isfinite(close)]
    return rule.fence(known, 1) if len(known) else np.inf


def linked_parts(near_QM, close_QM, count_Q, count_K, thresholds: dict[int, float]) -> np.ndarray:
    """Which near parts are the same person, bool [Q, M].

    What decides is the threshold of the largest size that the smaller of the two reaches; without one nothing does.
    """
    smaller_QM = np.minimum(count_Q[:, None], count_K[near_QM])
    sizes = sorted(thresholds)
    threshold = np.array([np.inf, *(thresholds[size] for size in sizes)])
    return close_QM > threshold[np.searchsorted(sizes, smaller_QM, side="right")]


def same_pairs(parts: Parts, near_KM: np.ndarray, linked_KM: np.ndarray, close_KM: np.ndarray) -> tuple:
    """(pairs of identities, smaller number first, cosines), the closest first; each pair once."""
    part_P, column_P = np.nonzero(linked_KM)
    order = np.argsort(-close_KM[part_P, column_P], kind="stable")
    part_P2 = np.stack([part_P, near_KM[part_P, column_P]], 1)[order]
    pair_P2 = np.sort(parts.identity_K[part_P2], axis=1)
    first = np.sort(np.unique(pair_P2, axis=0, return_index=True)[1])
    return pair_P2[first], parts.centre_cosine(*part_P2[first].T)


def several_cosines(parts: Parts, several: dict[int, list[np.ndarray]]) -> dict[int, float]:
    """Identity -> the lowest cosine between centres of its people."""
    cosines = {}
    for identity in several:
        own = np.array(parts.of_same_identity(identity))
        left, right = np.triu_indices(len(own), 1)
        cosines[identity] = float(parts.centre_cosine(own[left], own[right]).min())
    return cosines
