"""The page of ``tools/clean.py``: contact sheets of what was found, to decide by eye."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from eval.pages import Page
from tools.clean.results import COLUMNS, Results

TILE, GAP = 80, 4  # pixels
_IN_A_ROW = 8  # images


def contact_sheet(groups: Sequence[Sequence[np.ndarray]]) -> bytes:
    """JPEG bytes: a row of uint8 RGB images each group, scaled to tiles; empty groups leave an empty row."""
    width = max(1, *(len(group) for group in groups))
    sheet = np.full((len(groups) * (TILE + GAP) - GAP, width * (TILE + GAP) - GAP, 3), 255, np.uint8)
    for row, group in enumerate(groups):
        for column, image in enumerate(group):
            scale = TILE / max(image.shape[:2])
            size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
            top, left = row * (TILE + GAP), column * (TILE + GAP)
            sheet[top : top + size[1], left : left + size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", sheet[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def sections_of(found: Results, tables: dict[str, list[tuple]]) -> list[tuple]:
    """(title, what the rows of a sheet are, how many cases there are, the cases) of each kind of finding.

    A case is a caption and rows of images, which are read when its turn comes.
    """
    source, rows, findings = found.source, found.rows, found.findings

    def row(numbers: Sequence[int], get=lambda i: source[i][0]) -> list[np.ndarray]:
        return [get(int(i)) for i in numbers[:_IN_A_ROW]]

    def right_ones(identity: int) -> list[np.ndarray]:
        images = rows.images_of(identity)
        return row(images[~np.isin(images, findings.outlier_F)])

    outliers = zip(findings.outlier_F.tolist(), findings.nearest_F, tables["outliers"], strict=True)
    outlier_cases = (
        (
            f"{source.describe(i)}: label {label} ({cos_own}), nearest {label_nearest} ({cos_nearest})",
            [row([i]), right_ones(rows.identity_N[i]), right_ones(nearest)],
        )
        for i, nearest, (_, label, label_nearest, cos_own, cos_nearest) in outliers
    )
    same_cases = (
        (f"labels {a} and {b}: cosine {cos}", [row(rows.images_of(identity)) for identity in pair])
        for pair, (a, b, cos) in zip(findings.same_P2, tables["same_person"], strict=True)
    )
    several_cases = (
        (f"label {label}: {', '.join(str(len(images)) for images in people)} images", list(map(row, people)))
        for people, (label, *_) in zip(findings.several.values(), tables["several_people"], strict=True)
    )
    duplicate_cases = (
        (f"keys {a} and {b}: cosine {cos}", [row(pair)])
        for pair, (a, b, cos) in zip(found.duplicate_P2, tables["duplicates"], strict=True)
    )
    overlap_cases = (
        (
            f"label {rows.label_L[overlap.identity]} and {test.name}: cosine {overlap.cos_F[0]:.4f}",
            [row(rows.images_of(overlap.identity)), row(overlap.number_F, lambda i, test=test: test.get(i, 112))],
        )
        for test, overlap in found.overlaps
    )
    of_outliers = "First row: the image. Second: others of its label. Third: the identity that it is closer to."
    of_overlaps = "First row: the data set's. Second: the test set's."
    return [
        ("Images closer to another identity", of_outliers, len(tables["outliers"]), outlier_cases),
        ("Identities that are one person", "A row a label.", len(tables["same_person"]), same_cases),
        ("Identities that are several people", "A row a person.", len(tables["several_people"]), several_cases),
        ("Duplicates", "A pair a sheet.", len(tables["duplicates"]), duplicate_cases),
        ("Identities that are in a test set", of_overlaps, len(found.overlaps), overlap_cases),
    ]


def write_page(path: Path, root: Path, found: Results, tables: dict[str, list[tuple]], most: int) -> None:
    """Counts, contact sheets of the first ``most`` cases of each kind, and the thresholds."""
    page = Page(f"Labels of {root}")
    page.table(("what", "found"), [(f"{name}.csv", len(tables[name])) for name in COLUMNS])
    for title, text, total, cases in sections_of(found, tables):
        page.heading(f"{title}: {total}")
        if total:
            page.text(text + (f" The first {most} of {total}." if most < total else ""))
        for caption, groups in itertools.islice(cases, most):
            page.picture(contact_sheet(groups), caption)
    page.heading("Thresholds")
    page.text("Closenesses measured on this data set (see docs/tutorials/clean.md).")
    limits = found.findings.thresholds
    measured = [
        ("groups of one label are two people below", limits.person),
        *((f"labels are one person above, from {size} images on", same) for size, same in limits.same.items()),
        ("an image is closer to another identity by more than", limits.outlier),
        ("mean cosine of two images of one identity (median)", found.findings.parts.typical),
    ]
    page.table(("what", "value"), [(what, f"{value:.3f}") for what, value in measured])
    page.write(path)
