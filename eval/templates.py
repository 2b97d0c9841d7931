"""Template pooling and pair scores, float64, as the IJB-B/C protocol defines them.

Legend: N images, D embedding size, T templates, P pairs. A template is a set of images of one person; images of one
template that share a media id (frames of one video) are averaged first, then the media are summed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import sparse

from utils.errors import UserError
from utils.system import threads_of_rank
from utils.vectors import scale_to_unit

_ROWS_PER_BLOCK = 1024
_SCORES_PER_BLOCK = 72 << 20  # 600 MB: all of IJB-C at once
_ROWS_PER_PRODUCT = 4096
_PAIRS_PER_CHUNK = 1 << 18
_PAIRS_PER_GATHER = 1 << 11
_RECTANGLE_PAIRS = 100_000


def pool_templates(
    feature_ND: np.ndarray,
    template_N: np.ndarray,
    media_N: np.ndarray,
    transform: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the images of each (template, media), sum over the media of a template, L2-normalise.

    Args:
        feature_ND: embeddings, any float dtype (a memory map is read block by block), in any order. With a
            ``transform`` any array whose first axis is the image.
        template_N: integers or text, sparse and unordered as they come.
        media_N: the same id in two templates means two media.
        transform: ``(rows, index of the rows) -> [n, D] float64``: what turns stored rows into features.

    Returns:
        ``(template_T, feature_TD)``: the distinct ids in ascending order, and their unit vectors, float64. A template
        whose sum is zero stays zero.

    Raises:
        UserError: lengths differ, there is no image, or a template is not finite (its id is named).
    """
    feature_ND, template_N, media_N = np.asanyarray(feature_ND), np.asarray(template_N), np.asarray(media_N)
    num_images = len(feature_ND)
    if not num_images or template_N.shape != (num_images,) or media_N.shape != (num_images,):
        found = f"{num_images} features, {template_N.shape} template ids and {media_N.shape} media ids"
        raise UserError(f"{found}; there must be at least one image, and one id of each kind an image")
    order_N = _order(template_N, media_N)
    template_sorted, media_sorted = template_N[order_N], media_N[order_N]
    new_template = np.append(True, template_sorted[1:] != template_sorted[:-1])
    new_media = new_template | np.append(True, media_sorted[1:] != media_sorted[:-1])
    media_start = np.append(np.flatnonzero(new_media), num_images)
    template_start = np.append(np.flatnonzero(new_template), num_images)
    template_T = template_sorted[new_template]
    weight_N = np.repeat(1 / np.diff(media_start), np.diff(media_start))
    to_float64 = transform or (lambda rows, _: rows.astype(np.float64))
    size = to_float64(np.asarray(feature_ND[:1]), np.zeros(1, np.int64)).shape[1]
    feature_TD = np.empty((len(template_T), size))

    def pool(first: int, stop: int) -> None:
        start, end = template_start[first], template_start[stop]
        rows = to_float64(feature_ND[order_N[start:end]], order_N[start:end])
        # Row i of this sparse matrix holds 1 / (images of the medium) for each image of template i.
        matrix = (weight_N[start:end], np.arange(end - start), template_start[first : stop + 1] - start)
        sums = sparse.csr_matrix(matrix, shape=(stop - first, end - start)) @ rows
        scale_to_unit(sums, out=feature_TD[first:stop])

    # Blocks of whole templates that hold about so many images.
    cuts = np.searchsorted(template_start, np.arange(0, num_images, _ROWS_PER_BLOCK))
    bounds = np.unique(np.append(cuts, len(template_T)))
    _in_threads(pool, bounds[:-1], bounds[1:])
    finite_T = np.isfinite(feature_TD.sum(1))
    if not finite_T.all():
        bad = template_T[~finite_T]
        which = f"template {bad[0]} ({len(bad)} of {len(template_T)})"
        raise UserError(f"{which} holds NaN or infinity; check its embeddings")
    return template_T, feature_TD


def score_pairs(template_T: np.ndarray, feature_TD: np.ndarray, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Dot product of the two templates of each pair: [P] float64 (cosine for unit vectors).

    Where the pairs fill a good part of a left x right rectangle (gallery x probe: every IJB list), a blocked matrix
    product computes the rectangle and the pairs are picked from it; otherwise the rows are gathered block by block.

    Raises:
        UserError: lengths differ, ids are not unique, or a pair names a template that is not there.
    """
    left_P, right_P = np.asarray(left_P), np.asarray(right_P)
    if left_P.shape != right_P.shape or left_P.ndim != 1:
        raise UserError(f"{left_P.shape} left and {right_P.shape} right template ids; each pair needs one of both")
    feature_TD = np.asarray(feature_TD, np.float64)
    if feature_TD.ndim != 2 or len(feature_TD) != len(template_T):
        raise UserError(f"{len(template_T)} template ids for features of shape {feature_TD.shape}")
    find = _RowFinder(template_T)
    (left_P, left_T), (right_P, right_T) = find(left_P), find(right_P)
    if len(left_P) >= _RECTANGLE_PAIRS and left_T.sum() * right_T.sum() <= 16 * len(left_P):
        if left_T.sum() > right_T.sum():
            left_T, right_T, left_P, right_P = right_T, left_T, right_P, left_P
        cell_P = _cells(left_T, right_T, left_P, right_P)
        del left_P, right_P  # memory: what follows is the peak
        return _score_rectangle(feature_TD, left_T, right_T, cell_P)
    score_P = np.empty(len(left_P))
    for start in range(0, len(left_P), _PAIRS_PER_GATHER):
        part = slice(start, start + _PAIRS_PER_GATHER)
        score_P[part] = (feature_TD[left_P[part]] * feature_TD[right_P[part]]).sum(1)
    return score_P


def _order(template_N: np.ndarray, media_N: np.ndarray) -> np.ndarray:
    """Indices by template, then media, then position: one fast sort of a combined number where it fits in 63 bits."""
    num_images = len(template_N)
    if template_N.dtype.kind in "iu" and media_N.dtype.kind in "iu":
        low, high = (int(template_N.min()), int(media_N.min())), (int(template_N.max()), int(media_N.max()))
        num_media = high[1] - low[1] + 1
        if (high[0] - low[0] + 1) * num_media * num_images < 2**63:
            key_N = (template_N.astype(np.int64) - low[0]) * num_media + (media_N.astype(np.int64) - low[1])
            return np.sort(key_N * num_images + np.arange(num_images)) % num_images
    return np.lexsort((media_N, template_N))


class _RowFinder:
    """Template ids -> rows. A table where ids are small enough (IJB: below 190,000), else binary search."""

    def __init__(self, template_T: np.ndarray):
        template_T = np.asarray(template_T)
        self.order_T = np.argsort(template_T, kind="stable").astype(np.int32)
        self.sorted_T = template_T[self.order_T]
        if len(template_T) == 0 or (self.sorted_T[1:] == self.sorted_T[:-1]).any():
            raise UserError(f"{len(template_T)} template ids are empty or not unique; pool the templates first")
        self.table = None
        largest = self.sorted_T[-1]
        if template_T.dtype.kind in "iu" and self.sorted_T[0] >= 0 and largest < 8 * len(template_T) + (1 << 22):
            self.table = np.full(int(largest) + 2, -1, np.int32)
            self.table[template_T] = np.arange(len(template_T))

    def __call__(self, id_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the ids, int32 [P], and which rows occur, bool [T]."""
        row_P, used_T = np.empty(len(id_P), np.int32), np.zeros(len(self.sorted_T), bool)

        def look_up(start: int) -> None:
            part = slice(start, start + _PAIRS_PER_CHUNK)
            rows = row_P[part] = self._rows(id_P[part], start)
            if not used_T.take(rows).all():  # seldom after the first chunks, and reading is five times as fast
                used_T[rows] = True  # threads only ever write True

        _in_threads(look_up, range(0, len(id_P), _PAIRS_PER_CHUNK))
        return row_P, used_T

    def _rows(self, id_P: np.ndarray, first: int) -> np.ndarray:
        asked_P = id_P
        if self.table is not None and id_P.dtype.kind in "iu":
            outside = len(self.table) - 1  # holds -1
            if id_P.min() < 0 or id_P.max() > outside:
                id_P = np.where((id_P < 0) | (id_P > outside), outside, id_P)
            row_P = self.table.take(id_P, mode="clip")  # none is outside; this mode does not look again
        else:
            place_P = np.minimum(np.searchsorted(self.sorted_T, id_P), len(self.sorted_T) - 1)
            row_P = np.where(self.sorted_T[place_P] == id_P, self.order_T[place_P], np.int32(-1))
        if row_P.min() < 0:
            pair = int(np.flatnonzero(row_P < 0)[0])
            raise UserError(f"pair {first + pair} names template {asked_P[pair]}, which has no image")
        return row_P


def _score_rectangle(feature_TD, left_T, right_T, cell_P):
    """All of the narrower (left) side times as much of the wider as memory allows; then the pairs are picked from it.

    ``left_T``, ``right_T`` say which rows occur on a side, ``cell_P`` where a pair lies in the right x left rectangle.
    """
    narrow_LD, wide_R = feature_TD[left_T], np.flatnonzero(right_T)
    num_left, num_right = len(narrow_LD), len(wide_R)
    starts = range(0, len(cell_P), _PAIRS_PER_CHUNK)
    score_P = np.empty(len(cell_P))
    height = -(-num_right // -(-num_left * num_right // _SCORES_PER_BLOCK))  # blocks of about the same height
    dense = np.empty((height, num_left))
    unsigned = np.uint32 if cell_P.dtype == np.int32 else np.uint64
    for first in range(0, num_right, height):
        rows_H = wide_R[first : first + height]
        for begin in range(0, len(rows_H), _ROWS_PER_PRODUCT):
            part = slice(begin, min(begin + _ROWS_PER_PRODUCT, len(rows_H)))
            np.matmul(feature_TD[rows_H[part]], narrow_LD.T, out=dense[part])
        scores = dense[: len(rows_H)].reshape(-1)

        def pick(start: int, low: int = first * num_left, scores: np.ndarray = scores) -> None:
            part = slice(start, start + _PAIRS_PER_CHUNK)
            if low == 0:  # all pairs: those of later blocks are overwritten then
                scores.take(cell_P[part], out=score_P[part], mode="clip")
                return
            cell = cell_P[part] - cell_P.dtype.type(low)
            inside = np.flatnonzero(cell.view(unsigned) < len(scores))  # a negative cell wraps to a large number
            score_P[start + inside] = scores.take(cell.take(inside))

        _in_threads(pick, starts)
    return score_P


def _cells(left_T, right_T, left_P, right_P):
    """Each pair's cell in the right x left rectangle of the rows in use; written over ``left_P`` if it fits."""
    num_left = int(np.count_nonzero(left_T))
    kind = np.int32 if num_left * np.count_nonzero(right_T) < 2**31 else np.int64
    left_cell_T, right_cell_T = np.cumsum(left_T, dtype=kind) - 1, (np.cumsum(right_T, dtype=kind) - 1) * kind(num_left)
    cell_P = left_P if kind is np.int32 else np.empty(len(left_P), kind)

    def place(start: int) -> None:
        part = slice(start, start + _PAIRS_PER_CHUNK)
        np.add(right_cell_T.take(right_P[part]), left_cell_T.take(left_P[part]), out=cell_P[part])

    _in_threads(place, range(0, len(left_P), _PAIRS_PER_CHUNK))
    return cell_P


def _in_threads(work: Callable[..., None], *arguments: Sequence[int]) -> None:
    with ThreadPoolExecutor(threads_of_rank()) as threads:
        list(threads.map(work, *arguments))
