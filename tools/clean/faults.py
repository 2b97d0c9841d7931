"""Planted faults: how many are found, how many findings are false, beside a plain nearest-centre rule.

Used by ``benchmarks/clean.py`` and the tests. Legend: N images, M test images, L labels, D embedding size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tools.clean.against import find_overlap
from tools.clean.analysis import analyse
from tools.clean.rows import Rows
from tools.clean.statistics import Rule
from utils.vectors import scale_to_unit

KINDS = ("outliers", "same_person", "several_people", "overlap")


@dataclass(frozen=True)
class Planted:
    """A data set with faults, as row numbers of a clean one."""

    row_N: np.ndarray  # its images
    label_N: np.ndarray
    row_M: np.ndarray  # images of the test set
    person_M: np.ndarray  # whom they show
    truth: dict[str, set]  # kind -> what is to be found: image numbers, pairs of labels, labels, labels


@dataclass(frozen=True)
class Score:
    """Counts over several data sets."""

    found: int = 0
    false: int = 0
    planted: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.found + other.found, self.false + other.false, self.planted + other.planted)

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.false) if self.found + self.false else 1.0

    @property
    def recall(self) -> float:
        return self.found / self.planted

    @property
    def f1(self) -> float:
        return 2 * self.found / (self.found + self.false + self.planted)


def plant(person_N: np.ndarray, seed: int, num_test: int = 5, wrong: float = 0.05) -> Planted:
    """Five of a hundred labels wrong, two labels that hold two people, two people under two labels, three test people.

    ``person_N``: who is in each image; ten images or so of each of twenty people or so. Half of the images of three of
    the ``num_test`` people of the test set get a label in the data set.
    """
    rng = np.random.default_rng(seed)
    people = rng.permutation(np.unique(person_N)).tolist()
    test, rest = people[:num_test], people[num_test:]
    labels: list[list[np.ndarray]] = []
    rows_M = []
    truth: dict[str, set] = {kind: set() for kind in KINDS}

    def of(person: int) -> np.ndarray:
        return rng.permutation(np.flatnonzero(person_N == person))

    for number, person in enumerate(test):
        images = of(person)
        if number < 3:
            truth["overlap"].add(len(labels))
            labels.append([images[: len(images) // 2]])
            images = images[len(images) // 2 :]
        rows_M.append(images)
    for _ in range(2):
        truth["several_people"].add(len(labels))
        labels.append([of(rest.pop()), of(rest.pop())])
    for _ in range(2):
        images = of(rest.pop())
        truth["same_person"].add((len(labels), len(labels) + 1))
        labels += [[images[: len(images) // 2]], [images[len(images) // 2 :]]]
    labels += [[of(person)] for person in rest]
    row_N = np.concatenate([images for groups in labels for images in groups])
    label_N = np.repeat(np.arange(len(labels)), [sum(map(len, groups)) for groups in labels])
    people_of = [set(person_N[row_N[label_N == label]].tolist()) for label in range(len(labels))]
    for image in rng.permutation(len(row_N))[: round(wrong * len(row_N))].tolist():
        others = [label for label, held in enumerate(people_of) if int(person_N[row_N[image]]) not in held]
        label_N[image] = rng.choice(others)
        truth["outliers"].add(image)
    row_M = np.concatenate(rows_M)
    return Planted(row_N, label_N, row_M, person_N[row_M], truth)


def findings_of(unit_ND: np.ndarray, planted: Planted, rule: Rule) -> dict[str, set]:
    """What ``analyse`` and ``find_overlap`` find, in the terms of ``Planted.truth``."""
    rows = Rows.of(unit_ND[planted.row_N], planted.label_N)
    test_rows = Rows.of(unit_ND[planted.row_M], planted.person_M)
    found = analyse(rows, rule, show_progress=False)
    no_pixels = np.arange(len(rows), dtype=np.uint64)
    overlaps = find_overlap(test_rows, np.full(len(test_rows), 2**63, np.uint64), rows, found, no_pixels, rule)
    label_L = rows.label_L
    return {
        "outliers": set(found.outlier_F.tolist()),
        "same_person": {tuple(label_L[pair].tolist()) for pair in found.same_P2},
        "several_people": {int(label_L[identity]) for identity in found.several},
        "overlap": {int(label_L[overlap.identity]) for overlap in overlaps},
    }


def nearest_centre_scores(unit_ND: np.ndarray, planted: Planted) -> dict[str, dict]:
    """The plain rule's score of every candidate: cosines to the labels' mean directions and nothing else.

    An image is wrong where another centre is nearer (no threshold); two labels are one person above a cosine of their
    centres; a label holds several people below a mean cosine to its centre (negated here, so that high means found); a
    label is in the test set above a cosine of its centre to the nearest test image.
    """
    unit_nD, label_N = unit_ND[planted.row_N], planted.label_N
    num_labels = int(label_N.max()) + 1
    centre_LD = scale_to_unit(np.stack([unit_nD[label_N == label].mean(0) for label in range(num_labels)]))
    own_NL = unit_nD @ centre_LD.T
    between_LL = centre_LD @ centre_LD.T
    test_ML = unit_ND[planted.row_M] @ centre_LD.T
    left, right = np.triu_indices(num_labels, 1)
    tightness = [own_NL[label_N == label, label].mean() for label in range(num_labels)]
    return {
        "outliers": dict.fromkeys(np.flatnonzero(own_NL.argmax(1) != label_N).tolist(), 1.0),
        "same_person": dict(zip(zip(left.tolist(), right.tolist(), strict=True), between_LL[left, right], strict=True)),
        "several_people": {label: -value for label, value in enumerate(tightness)},
        "overlap": dict(enumerate(test_ML.max(0).tolist())),
    }


def judge(found: set, truth: set) -> Score:
    """Counts of one kind of finding."""
    return Score(len(found & truth), len(found - truth), len(truth))


def best_threshold(scores: Iterable[tuple[dict, set]]) -> float:
    """The threshold with the highest F1 over several data sets: findings are the candidates above it."""
    pairs = [(value, candidate in truth) for given, truth in scores for candidate, value in given.items()]
    value, true = np.array(pairs).T
    order = np.argsort(-value, kind="stable")
    hits = np.cumsum(true[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + true.sum())
    best = int(np.argmax(f1))
    below = value[order[best + 1]] if best + 1 < len(order) else value[order[best]] - 1
    return float((value[order[best]] + below) / 2)
