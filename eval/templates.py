"""Template pooling and pair scores, float64, as the IJB-B/C protocol defines them.

Legend: N images, D embedding size, T templates, P pairs. A template is a set of images of one person; images of one
template that share a media id (frames of one video) are averaged first, then the media are summed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import sparse

_ROWS_PER_BLOCK = 1024
_SCORES_PER_BLOCK = 1 << 22
_NUM_THREADS = 2


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
        template_N: integer template id of each image; ids may be sparse and unordered.
        media_N: integer media id of each image; the same id in two templates means two media.
        transform: ``(rows, index of the rows) -> [n, D] float64``: what turns stored rows into features.

    Returns:
        ``(template_T, feature_TD)``: the distinct ids in ascending order, and their unit vectors, float64. A template
        whose sum is zero stays zero.

    Raises:
        ValueError: lengths differ, there is no image, or a template is not finite (its id is named).
    """
    template_N, media_N = np.asarray(template_N), np.asarray(media_N)
    num_images = len(feature_ND)
    if not num_images or template_N.shape != (num_images,) or media_N.shape != (num_images,):
        raise ValueError(
            f"{num_images} features, {template_N.shape} template ids and {media_N.shape} media ids; "
            "there must be at least one image, and one id of each kind an image"
        )
    order_N = np.lexsort((media_N, template_N))
    template_sorted, media_sorted = template_N[order_N], media_N[order_N]
    new_template = np.append(True, template_sorted[1:] != template_sorted[:-1])
    new_media = new_template | np.append(True, media_sorted[1:] != media_sorted[:-1])
    media_start = np.append(np.flatnonzero(new_media), num_images)
    template_start = np.append(np.flatnonzero(new_template), num_images)
    template_T = template_sorted[new_template]
    to_float64 = transform or (lambda rows, _: rows.astype(np.float64))
    size = to_float64(np.asarray(feature_ND[:1]), np.zeros(1, np.int64)).shape[1]
    feature_TD = np.empty((len(template_T), size))

    def pool(first: int, stop: int) -> None:
        start, end = template_start[first], template_start[stop]
        rows = to_float64(feature_ND[order_N[start:end]], order_N[start:end])
        bounds = media_start[np.searchsorted(media_start, start) : np.searchsorted(media_start, end) + 1]
        media = _sum_runs(rows, bounds - start)
        media /= np.diff(bounds)[:, None]
        sums = _sum_runs(media, np.searchsorted(bounds, template_start[first : stop + 1]))
        norm = np.sqrt(np.einsum("ij,ij->i", sums, sums))
        norm[norm == 0] = 1
        np.divide(sums, norm[:, None], out=feature_TD[first:stop])

    bounds = _blocks(template_start, _ROWS_PER_BLOCK)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        list(threads.map(pool, bounds[:-1], bounds[1:]))
    finite_T = np.isfinite(feature_TD.sum(1))
    if not finite_T.all():
        bad = template_T[~finite_T]
        raise ValueError(
            f"template {bad[0]} ({len(bad)} of {len(template_T)}) holds NaN or infinity; check its embeddings"
        )
    return template_T, feature_TD


def score_pairs(template_T: np.ndarray, feature_TD: np.ndarray, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Dot product of the two templates of each pair: [P] float64 (cosine for unit vectors).

    Where the pairs fill a good part of a left x right rectangle (gallery x probe: every IJB list), a blocked matrix
    product computes the rectangle and the pairs are picked from it; otherwise the rows are gathered block by block.

    Raises:
        ValueError: lengths differ, ids are not unique, or a pair names a template that is not there.
    """
    left_P, right_P = np.asarray(left_P), np.asarray(right_P)
    if left_P.shape != right_P.shape or left_P.ndim != 1:
        raise ValueError(f"{left_P.shape} left and {right_P.shape} right template ids; each pair needs one of both")
    feature_TD = np.asarray(feature_TD, np.float64)
    find = _RowFinder(template_T)
    left_P, right_P = find(left_P), find(right_P)
    left_rows, left_P = _compact(left_P, len(feature_TD))
    right_rows, right_P = _compact(right_P, len(feature_TD))
    if len(left_P) < 100_000 or len(left_rows) * len(right_rows) > 16 * len(left_P):
        return _score_gathered(feature_TD, left_rows, right_rows, left_P, right_P)
    return _score_rectangle(feature_TD[left_rows], feature_TD[right_rows], left_P, right_P)


def _sum_runs(rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sums of consecutive rows, run i being ``bounds[i]:bounds[i + 1]``; rows are added in order."""
    num_rows = len(rows)
    ones = np.ones(num_rows)
    return sparse.csr_matrix((ones, np.arange(num_rows), bounds), shape=(len(bounds) - 1, num_rows)) @ rows


def _blocks(start: np.ndarray, size: int) -> np.ndarray:
    """Cut runs into blocks of whole runs that hold about ``size`` items: indices of the runs where blocks begin."""
    cuts = np.searchsorted(start, np.arange(0, start[-1], size))
    return np.unique(np.append(cuts, len(start) - 1))


class _RowFinder:
    """Template ids -> rows. A table where ids are small enough (IJB: below 190,000), else binary search."""

    def __init__(self, template_T: np.ndarray):
        template_T = np.asarray(template_T)
        self.order_T = np.argsort(template_T, kind="stable")
        self.sorted_T = template_T[self.order_T]
        if len(template_T) == 0 or (self.sorted_T[1:] == self.sorted_T[:-1]).any():
            raise ValueError(f"{len(template_T)} template ids are empty or not unique; pool the templates first")
        self.table = None
        if (
            template_T.dtype.kind in "iu"
            and self.sorted_T[0] >= 0
            and self.sorted_T[-1] < 8 * len(template_T) + (1 << 22)
        ):
            self.table = np.full(int(self.sorted_T[-1]) + 2, -1, np.int32)
            self.table[template_T] = np.arange(len(template_T))

    def __call__(self, id_P: np.ndarray) -> np.ndarray:
        if self.table is not None and id_P.dtype.kind in "iu":
            inside = len(id_P) == 0 or (id_P.min() >= 0 and id_P.max() < len(self.table))
            clipped_P = id_P if inside else np.where((id_P < 0) | (id_P >= len(self.table)), len(self.table) - 1, id_P)
            row_P = self.table[clipped_P]
            missing = row_P.min(initial=0) < 0
        else:
            place_P = np.minimum(np.searchsorted(self.sorted_T, id_P), len(self.sorted_T) - 1)
            row_P = np.where(self.sorted_T[place_P] == id_P, self.order_T[place_P], -1).astype(np.int32)
            missing = row_P.min(initial=0) < 0
        if missing:
            pair = int(np.flatnonzero(row_P < 0)[0])
            raise ValueError(f"pair {pair} names template {id_P[pair]}, which has no image")
        return row_P


def _compact(row_P: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows in use, ascending, and each pair's index into them (int32)."""
    used = np.zeros(num_rows, bool)
    used[row_P] = True
    rows = np.flatnonzero(used)
    index = np.zeros(num_rows, np.int32)
    index[rows] = np.arange(len(rows))
    return rows, index[row_P]


def _score_gathered(feature_TD, left_rows, right_rows, left_P, right_P):
    score_P = np.empty(len(left_P))
    step = 4096
    for start in range(0, len(left_P), step):
        part = slice(start, start + step)
        product = feature_TD[left_rows[left_P[part]]] * feature_TD[right_rows[right_P[part]]]
        score_P[part] = product.sum(1)
    return score_P


def _score_rectangle(left_LD, right_RD, left_P, right_P):
    """Blocks of left rows times all right rows; the pairs of a block are brought together by one radix sort."""
    num_left, num_right = len(left_LD), len(right_RD)
    height = max(1, min(num_left, _SCORES_PER_BLOCK // num_right), -(-num_left // 65535))
    block_P = (left_P // height).astype(np.uint16)
    in_order = bool((block_P[1:] >= block_P[:-1]).all())
    order_P = None if in_order else np.argsort(block_P, kind="stable")
    stops = np.cumsum(np.bincount(block_P, minlength=-(-num_left // height)))
    score_P = np.empty(len(left_P))
    dense = np.empty((height, num_right))
    start = 0
    for block, stop in enumerate(stops):
        first = block * height
        rows = left_LD[first : first + height]
        scores = np.matmul(rows, right_RD.T, out=dense[: len(rows)]).reshape(-1)
        part = slice(start, stop) if in_order else order_P[start:stop]
        place = (left_P[part] - first).astype(np.int64) * num_right + right_P[part]
        score_P[part] = scores.take(place)
        start = stop
    return score_P
