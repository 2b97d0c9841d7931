"""MegaFace-style identification among distractors: the figures, and the files that features come in.

Legend: N probes, M distractors, D embedding size, G genuine pairs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.progress import progress_bar
from utils.text import read_text_lines
from utils.vectors import unit_rows

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
FARS = (1e-6, 1e-5, 1e-4, 1e-3)
_SCORES_PER_BLOCK = 1 << 22
_FLOAT32_MATRIX = 5  # OpenCV's type number of a one-channel float32 matrix


@dataclass(frozen=True)
class DistractorResult:
    """Rank-1 and rank-10 at each number of distractors, TAR at each FAR that the number of impostor pairs resolves."""

    sizes: tuple[int, ...]
    rank_1: tuple[float, ...]
    rank_10: tuple[float, ...]
    fars: tuple[float, ...]
    tar: tuple[float, ...]
    threshold: tuple[float, ...]
    num_genuine: int
    num_impostor: int
    score_range: tuple[float, float]  # of all genuine and impostor pairs


def identify_among_distractors(
    probe_ND: np.ndarray,
    subject_N: np.ndarray,
    distractor_MD: np.ndarray,
    sizes: tuple[int, ...] = SIZES,
    fars: tuple[float, ...] = FARS,
    show_progress: bool = False,
) -> DistractorResult:
    """The figures for features that need not be normalised; cosine in float64, distractors block by block.

    ``sizes`` beyond M become M (once). Memory: one block of scores, and the best ``max(fars)`` of all impostor scores.

    Raises:
        UserError: shapes do not fit, values are not finite, or nobody has two images.
    """
    probe_ND, subject_N = unit_rows(probe_ND, "probes"), np.asarray(subject_N)
    if subject_N.shape != (len(probe_ND),):
        raise UserError(f"{subject_N.size} subjects for {len(probe_ND)} probes; each needs one")
    if distractor_MD.ndim != 2 or distractor_MD.shape[1:] != probe_ND.shape[1:] or not len(distractor_MD):
        shapes = f"distractors {distractor_MD.shape} for probes {probe_ND.shape}"
        raise UserError(f"{shapes}; [n, same size], n > 0, is needed")
    _, inverse_N = np.unique(subject_N, return_inverse=True)
    same_NN = inverse_N[:, None] == inverse_N[None, :]
    np.fill_diagonal(same_NN, False)
    left_G, right_G = np.nonzero(same_NN)
    if not len(left_G):
        raise UserError(f"none of {len(probe_ND)} probes shares its subject with another; genuine pairs are needed")
    genuine_G = np.einsum("gd,gd->g", probe_ND[left_G], probe_ND[right_G])
    num_distractors = len(distractor_MD)
    sizes = tuple(dict.fromkeys(min(size, num_distractors) for size in sorted(sizes)))
    num_impostor = len(probe_ND) * num_distractors
    fars = tuple(far for far in fars if far * num_impostor >= 1)
    highest, lowest = np.empty(0), genuine_G.min()
    # One more than may be accepted: the threshold lies above that one.
    num_kept = min(num_impostor, math.floor(max(fars, default=0) * num_impostor * (1 + 1e-12)) + 1)
    limit = -np.inf
    better_G, found = np.zeros(len(left_G), np.int64), {}
    height = max(1, _SCORES_PER_BLOCK // len(probe_ND))
    cuts = sorted({*range(0, num_distractors, height), *sizes, num_distractors} - {0})
    start = 0
    with progress_bar("distractors", num_distractors, enabled=show_progress) as advance:
        for stop in cuts:
            scores_NB = probe_ND @ unit_rows(distractor_MD[start:stop], f"distractors from row {start}").T
            scores_NB.sort(axis=1)
            lowest = min(lowest, scores_NB[:, 0].min())
            for probe in range(len(probe_ND)):
                mine = slice(*np.searchsorted(left_G, [probe, probe + 1]))
                better_G[mine] += scores_NB.shape[1] - np.searchsorted(scores_NB[probe], genuine_G[mine], side="left")
            highest = np.concatenate([highest, scores_NB[scores_NB > limit]])
            if len(highest) > num_kept:
                highest = np.partition(highest, len(highest) - num_kept)[-num_kept:]
                limit = highest.min()
            if stop in sizes:
                found[stop] = (float(np.mean(better_G < 1)), float(np.mean(better_G < 10)))
            advance(stop - start)
            start = stop
    highest = np.sort(highest)[::-1]
    once_G = genuine_G[left_G < right_G]
    allowed = [math.floor(far * num_impostor * (1 + 1e-12)) for far in fars]
    limits = tuple(float(highest[count]) if count < num_impostor else -math.inf for count in allowed)
    rank_1, rank_10 = zip(*(found[size] for size in sizes), strict=True)
    return DistractorResult(
        sizes=sizes,
        rank_1=rank_1,
        rank_10=rank_10,
        fars=fars,
        tar=tuple(float(np.mean(once_G > limit)) for limit in limits),
        threshold=limits,
        num_genuine=len(once_G),
        num_impostor=num_impostor,
        score_range=(float(lowest), float(max(genuine_G.max(), highest[0]))),
    )


def load_features(path: Path) -> np.ndarray:
    """``.npy`` [N, D] (memory-mapped), or a text list of MegaFace ``.bin`` files, relative to the list's folder."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a .npy of features or a list of .bin files is needed")
    if path.suffix.lower() == ".npy":
        try:
            feature_ND = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: not a .npy file of features ({error})") from None
        if feature_ND.ndim != 2 or feature_ND.dtype.kind != "f":
            raise UserError(f"{path}: {feature_ND.dtype} {feature_ND.shape}; float [images, size] is needed")
        return feature_ND
    rows = [read_megaface_vector(path.parent / line.strip()) for line in read_text_lines(path) if line.strip()]
    if not rows or len({row.shape for row in rows}) != 1:
        sizes = sorted({len(row) for row in rows})
        raise UserError(f"{path}: {len(rows)} features of sizes {sizes}; one size is needed")
    return np.stack(rows)


def read_megaface_vector(path: Path) -> np.ndarray:
    """One feature: int32 rows, columns, stride in bytes, OpenCV type 5, then float32 values -> [D] float32."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; it is on the list of features")
    data = path.read_bytes()
    header = np.frombuffer(data[:16], "<i4") if len(data) >= 16 else np.zeros(4, "<i4")
    rows, columns, _, kind = header.tolist()
    if kind != _FLOAT32_MATRIX or rows < 1 or columns < 1 or len(data) != 16 + 4 * rows * columns:
        found = f"{len(data)} bytes, header {header.tolist()}"
        raise UserError(f"{path}: {found}; not a float32 matrix of the MegaFace tools")
    return np.frombuffer(data[16:], "<f4").astype(np.float32)
