"""All that was found in a data set: the rows of the CSV files, and which images are kept."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dataset import Source
from tools.clean.against import Overlap, TestSet
from tools.clean.analysis import Findings
from tools.clean.duplicates import pair_cosines, surplus
from tools.clean.rows import Rows

COLUMNS = {
    "outliers": ("key", "label", "nearest", "cos_own", "cos_nearest"),
    "same_person": ("label_a", "label_b", "cos"),
    "several_people": ("label", "parts", "cos"),
    "parts": ("key", "label", "part"),
    "duplicates": ("key_a", "key_b", "cos"),
    "overlap": ("label", "set", "image", "cos"),
}
DROPS = tuple(name for name in COLUMNS if name != "parts")


@dataclass(frozen=True)
class Results:
    """What was found, and in what."""

    source: Source
    rows: Rows
    findings: Findings
    duplicate_P2: np.ndarray  # image numbers
    overlaps: list[tuple[TestSet, Overlap]]  # test set after test set

    @property
    def in_test_sets(self) -> set[int]:
        """Identities that are in a test set."""
        return {overlap.identity for _, overlap in self.overlaps}


def tables_of(found: Results) -> dict[str, list[tuple]]:
    """The rows of every CSV file by its name without suffix, in the order of its columns."""
    rows, findings = found.rows, found.findings
    key_N, label_L, label_N = np.asarray(found.source.keys), rows.label_L, rows.label_L[rows.identity_N]

    def texts(cosines: Iterable[float]) -> list[str]:
        return [f"{cosine:.4f}" for cosine in cosines]

    cos_own, cos_nearest = texts(findings.cos_own_F), texts(findings.cos_nearest_F)
    outlier_F, several, pair_P2 = findings.outlier_F, findings.several, found.duplicate_P2
    columns = {
        "outliers": (key_N[outlier_F], label_N[outlier_F], label_L[findings.nearest_F], cos_own, cos_nearest),
        "same_person": (*label_L[findings.same_P2].T, texts(findings.same_cos_P)),
        "several_people": (label_L[list(several)], map(len, several.values()), texts(findings.several_cos.values())),
        "duplicates": (*key_N[pair_P2].T, texts(pair_cosines(rows, pair_P2))),
    }
    return {name: list(zip(*of, strict=True)) for name, of in columns.items()} | {
        "parts": [
            (key_N[i], label_L[identity], number)
            for identity, people in several.items()
            for number, images in enumerate(people, 1)
            for i in images
        ],
        "overlap": [
            (label_L[overlap.identity], test.name, name, cosine)
            for test, overlap in found.overlaps
            for i, cosine in zip(overlap.number_F, texts(overlap.cos_F), strict=True)
            for name in test.names_M[i]
        ],
    }


def kept_images(found: Results, drop: tuple[str, ...]) -> np.ndarray:
    """Images that nothing in ``drop`` speaks against, bool [N].

    Of several people under one label the first stays, of several labels of one person the largest, of duplicates one.
    """
    rows, findings, pair_P2 = found.rows, found.findings, found.duplicate_P2
    keep_N = np.ones(len(rows), bool)
    if "outliers" in drop:
        keep_N[findings.outlier_F] = False
    if "several_people" in drop:
        for people in findings.several.values():
            keep_N[np.concatenate(people[1:])] = False
    if "overlap" in drop:
        for identity in found.in_test_sets:
            keep_N[rows.images_of(identity)] = False
    if "same_person" in drop:
        # The smaller label of a pair goes, the smallest first, so that of a chain of labels one is left.
        left_L = np.bincount(rows.identity_N[keep_N], minlength=rows.num_identities)
        gone = left_L == 0
        for pair in sorted(findings.same_P2.tolist(), key=lambda pair: min(left_L[pair])):
            if not gone[pair].any():
                smaller = pair[0] if left_L[pair[0]] < left_L[pair[1]] else pair[1]
                gone[smaller] = True
                keep_N[rows.images_of(smaller)] = False
    if "duplicates" in drop:
        keep_N &= ~surplus(pair_P2[keep_N[pair_P2].all(1)], len(rows))
    return keep_N
