"""The page of ``tools/clean.py``: contact sheets of what was found, to decide by eye."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from eval.pages import Page

TILE, GAP = 80, 4  # pixels
Get = Callable[[int], np.ndarray]


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


def add_sheets(
    page: Page, title: str, text: str, cases: Sequence[tuple[str, Sequence[Sequence[tuple[Get, int]]]]], total: int
) -> None:
    """A section: how many were found, what is shown, one sheet a case.

    Args:
        page: the page so far.
        title: heading.
        text: what the rows of a sheet are.
        cases: (caption, rows of (reader, image number)) of the cases shown.
        total: how many there are in all.
    """
    page.heading(f"{title}: {total}")
    if not total:
        return
    page.text(text + (f" The first {len(cases)} of {total}." if len(cases) < total else ""))
    for caption, rows in cases:
        page.picture(contact_sheet([[get(i) for get, i in row] for row in rows]), caption)
