"""How close two sets of faces are, whatever their sizes, and thresholds that the data itself tells.

Images of one person scatter about a direction of their own. Their *agreement* is the mean cosine of two different
images; the mean cosine between two people's images, divided by the root of both agreements, estimates the cosine of the
two directions (Spearman's correction for attenuation, 1904). That *closeness* is about 1 for two halves of one person
whether they hold three images or three hundred, where the cosine of two centres grows with their sizes.

A threshold lies halfway between what different people reach and what one person falls to, both measured on the data set
itself; where the two overlap it is the second.

Legend: n images, K parts (an identity, or one of the people in it), D embedding size. Embeddings have unit length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage

SIZES = (1, 2, 4, 8, 16, 32)  # closeness of fewer images is noisier: thresholds are measured at each of these
_PRIOR_PAIRS = 1.0  # the typical agreement counts as much as so many pairs of images
_LOWEST_SHARE = 0.3  # of the typical agreement


def agreement(sum_KD: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    """Mean cosine of two different images of each part, float64 [K]; 0 where there are fewer than two.

    Of unit vectors with the sum s it is (|s|^2 - n) / (n (n - 1)).
    """
    count_K = np.asarray(count_K, np.float64)
    square_K = np.einsum("kd,kd->k", sum_KD, sum_KD, dtype=np.float64)
    return np.where(count_K > 1, (square_K - count_K) / np.maximum(count_K * (count_K - 1), 1), 0.0)


def steady_agreement(agreement_K: np.ndarray, count_K: np.ndarray, typical: float) -> np.ndarray:
    """``agreement`` drawn towards the typical one, the more the fewer pairs it rests on; never near zero."""
    pairs_K = np.asarray(count_K, np.float64) * (np.asarray(count_K) - 1) / 2
    steady_K = (agreement_K * pairs_K + typical * _PRIOR_PAIRS) / (pairs_K + _PRIOR_PAIRS)
    return np.maximum(steady_K, _LOWEST_SHARE * typical)


def directions(sum_KD: np.ndarray, count_K: np.ndarray, typical: float) -> np.ndarray:
    """What to multiply with, so that products are closenesses: mean / sqrt(agreement), in the dtype of the sums."""
    steady_K = steady_agreement(agreement(sum_KD, count_K), count_K, typical)
    scale_K = np.where(count_K > 0, 1 / (np.maximum(count_K, 1) * np.sqrt(steady_K)), 0.0)
    return sum_KD * scale_K[:, None].astype(sum_KD.dtype)


@dataclass(frozen=True)
class Rule:
    """How thresholds are read off measured values.

    ``deviations``: where what is unlike the bulk begins, in robust standard deviations from the median (1.4826 times
    the median absolute deviation, the standard deviation of normal values).
    """

    deviations: float = 2.5
    share: float = 0.05  # of one person's own values that may lie on the wrong side
    others_share: float = 0.05  # of other people's

    def fence(self, values: np.ndarray, side: int) -> float:
        """Where what is unlike the bulk begins, above it (``side`` 1) or below (-1)."""
        median = np.median(values)
        return float(median + side * self.deviations * 1.4826 * np.median(np.abs(values - median)))

    def own_falls_to(self, values: np.ndarray) -> float:
        """What one person's values seldom fall below."""
        return float(np.quantile(values, self.share))

    def others_reach(self, values: np.ndarray) -> float:
        """What other people's values seldom exceed."""
        return float(np.quantile(values, 1 - self.others_share))


DEFAULT_RULE = Rule()


def halfway(others_reach: float, own_falls_to: float) -> float:
    """The threshold between two kinds that were measured apart; ``own_falls_to`` where they overlap."""
    return (own_falls_to + min(others_reach, own_falls_to)) / 2


def halves(units: Iterable[np.ndarray], draws: int, typical: float, rng: np.random.Generator) -> dict[int, list[float]]:
    """Size -> closenesses of so many random images of one person to the rest, of all who have twice as many.

    ``units``: the unit rows of each person, [n, D].
    """
    values: dict[int, list[float]] = {size: [] for size in SIZES}
    for unit_nD in units:
        for size in (size for size in SIZES if len(unit_nD) >= 2 * size):
            for _ in range(draws):
                order = rng.permutation(len(unit_nD))
                sum_2D = np.stack([unit_nD[order[:size]].sum(0), unit_nD[order[size:]].sum(0)])
                first, second = directions(sum_2D, np.array([size, len(order) - size]), typical)
                values[size].append(float(first @ second))
    return values


class Tree:
    """Images of one identity joined step by step, the closest two groups first (average linkage).

    The height of a join is one minus the mean cosine between its two groups, so that their closeness follows from the
    tree alone. ``weakest`` is the least closeness of a join between groups of at least ``smallest``, the least images
    that can be a person; inf if there is none. Two images or more are needed.
    """

    def __init__(self, unit_nD: np.ndarray, smallest: int, typical: float):
        self.num_images, self.smallest = len(unit_nD), smallest
        distance = 1.0 - (unit_nD @ unit_nD.T)[np.triu_indices(len(unit_nD), 1)].astype(np.float64)
        joins = linkage(np.maximum(distance, 0.0), "average")
        self._children = joins[:, :2].astype(np.int64)
        num_nodes = 2 * self.num_images - 1
        self._size = np.ones(num_nodes, np.int64)
        inside, self._closeness = np.zeros(num_nodes), np.full(num_nodes, np.inf)
        floor = _LOWEST_SHARE * typical
        for join, (left, right) in enumerate(self._children.tolist()):
            node, mean_cosine = self.num_images + join, 1.0 - joins[join, 2]
            sizes = self._size[[left, right]]
            self._size[node] = sizes.sum()
            inside[node] = inside[left] + inside[right] + mean_cosine * sizes.prod()  # sum over pairs
            if sizes.min() >= max(smallest, 2):
                agreements = np.maximum(inside[[left, right]] / (sizes * (sizes - 1) / 2), floor)
                self._closeness[node] = mean_cosine / np.sqrt(agreements.prod())
        self.weakest = float(self._closeness.min())

    def people(self, threshold: float) -> list[list[int]]:
        """Images of each person: cut at joins weaker than ``threshold``, largest first; loose images are left out."""
        groups, todo = [], [2 * self.num_images - 2]
        while todo:
            top = todo.pop()
            weak = next((node for node in self._below(top) if self._closeness[node] < threshold), None)
            if weak is None:
                groups.append([node for node in self._below(top) if node < self.num_images])
            else:
                todo += self._children[weak - self.num_images].tolist()
        return sorted((group for group in groups if len(group) >= self.smallest), key=len, reverse=True)

    def _below(self, top: int) -> Iterator[int]:
        """Nodes from ``top`` down, parents first."""
        todo = [top]
        while todo:
            node = todo.pop()
            yield node
            if node >= self.num_images:
                todo += self._children[node - self.num_images].tolist()
