"""Exact duplicates (equal pixels, anywhere) and near ones (close embeddings and thumbnails that agree).

Near duplicates are sought within identities, between identities that are one person, and between an image that is
closer to another identity and that identity: a copy of a face is close to whoever the face is.

Legend: N images, M candidate pairs.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from tools.clean.reading import THUMBNAIL
from tools.clean.rows import Rows, joined

NEAR_COSINE = 0.9
NEAR_PIXELS = 0.995  # correlation of the thumbnails, or of one with the other's mirror image
_BLOCK = 2048
_MOST_EXTRA = 1 << 22


def exact_pairs(pixels_N: np.ndarray) -> np.ndarray:
    """[P, 2] images with equal digests: the first of each group with every other."""
    order = np.argsort(pixels_N, kind="stable")
    value = pixels_N[order]
    new = np.concatenate([[True], value[1:] != value[:-1]])
    first = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return np.stack([first, order], 1)[~new]


def thumbnails_agree(left_MP: np.ndarray, right_MP: np.ndarray) -> np.ndarray:
    """Which pairs of thumbnails show the same picture, mirrored or not; brightness and contrast do not count."""
    left, right = _standardised(left_MP), _standardised(right_MP)
    mirrored = right.reshape(-1, THUMBNAIL, THUMBNAIL)[:, :, ::-1].reshape(right.shape)
    correlation = np.maximum((left * right).sum(1), (left * mirrored).sum(1))
    return correlation >= NEAR_PIXELS


def _standardised(thumbnail_MP: np.ndarray) -> np.ndarray:
    value = thumbnail_MP.astype(np.float32)
    value -= value.mean(1, keepdims=True)
    return value / np.maximum(np.linalg.norm(value, axis=1, keepdims=True), 1e-6)


def _close_pairs(rows: Rows, left_n: np.ndarray, right_n: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Pairs of images with a cosine of ``NEAR_COSINE`` or more, [M, 2]; of one set against itself, each pair once."""
    for first in range(0, len(left_n), _BLOCK):
        left = rows.unit(left_n[first : first + _BLOCK])
        others = left_n[first:] if right_n is None else right_n
        for begin in range(0, len(others), _BLOCK):
            right_numbers = others[begin : begin + _BLOCK]
            close = left @ rows.unit(right_numbers).T >= NEAR_COSINE
            if right_n is None and begin == 0:
                close = np.triu(close, 1)
            row, column = np.nonzero(close)
            yield np.stack([left_n[first + row], right_numbers[column]], 1)


def near_pairs(
    rows: Rows,
    thumbnail_NP: np.ndarray,
    same_P2: np.ndarray,
    close_F: np.ndarray,
    nearest_F: np.ndarray,
    advance=lambda count: None,
) -> np.ndarray:
    """[P, 2] near duplicates.

    Args:
        same_P2: identities that are one person.
        close_F, nearest_F: images that are closer to another identity, and that identity.
        advance: called with images done.
    """

    def candidates() -> Iterable[np.ndarray]:
        for _, image_n, unit_nD in rows.identities(_BLOCK):
            if unit_nD is None:
                yield from _close_pairs(rows, image_n)
            else:
                yield image_n[np.argwhere(np.triu(unit_nD @ unit_nD.T >= NEAR_COSINE, 1))]
            advance(len(image_n))
        for left, right in same_P2.tolist():
            yield from _close_pairs(rows, rows.images_of(left), rows.images_of(right))
        order = np.argsort(nearest_F, kind="stable")
        bounds = np.flatnonzero(np.diff(nearest_F[order], prepend=-1, append=-1))
        for begin, end in itertools.pairwise(bounds):
            identity = int(nearest_F[order[begin]])
            yield from _close_pairs(rows, close_F[order[begin:end]], rows.images_of(identity))

    found = [np.empty((0, 2), np.int64)]
    for pair_M2 in candidates():
        for first in range(0, len(pair_M2), _MOST_EXTRA // THUMBNAIL**2):
            part = pair_M2[first : first + _MOST_EXTRA // THUMBNAIL**2]
            agree = thumbnails_agree(thumbnail_NP[part[:, 0]], thumbnail_NP[part[:, 1]])
            if agree.any():
                found.append(part[agree])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def pair_cosines(rows: Rows, pair_P2: np.ndarray) -> np.ndarray:
    """[P] cosines of pairs of images."""
    parts = np.array_split(pair_P2, max(1, len(pair_P2) // 4096))
    return np.concatenate([np.einsum("pd,pd->p", rows.unit(part[:, 0]), rows.unit(part[:, 1])) for part in parts])


def surplus(pair_P2: np.ndarray, num_images: int) -> np.ndarray:
    """Images to leave out so that one of each group of duplicates stays: all but the first of a group, bool [N]."""
    _, first = np.unique(joined(num_images, *pair_P2.T), return_index=True)
    return ~np.isin(np.arange(num_images), first)
