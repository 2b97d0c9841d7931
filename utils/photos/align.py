"""Align a face crop by its five landmarks: closed-form similarity transform, then one warp.

The best rotation, scale and shift in the plane is a complex linear least-squares fit: with points as complex numbers,
``target = a * source + b`` has ``a = sum(conj(s) t) / sum(|s|^2)`` over centred points (Umeyama 1991 gives the same by
an SVD; in two dimensions none is needed, and a reflection cannot come out).
"""

import cv2
import numpy as np

from utils.decode import fit_image

# Eyes, nose tip, mouth corners (x, y) in a 112 x 112 face crop.
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)

FARTHEST = 100_000.0  # pixels: no photo reaches farther
COINCIDE = 1e-6  # square pixels: the sum of squares of distances to the mean


def similarity_transform(source_K2: np.ndarray, target_K2: np.ndarray) -> np.ndarray:
    """The 2x3 matrix of the least-squares similarity that takes the source points to the target points, float64.

    Raises:
        ValueError: shapes differ, a value is not finite or lies farther out than any photo reaches, or all source
            points coincide.
    """
    source_K2, target_K2 = np.asarray(source_K2, np.float64), np.asarray(target_K2, np.float64)
    if source_K2.shape != target_K2.shape or source_K2.ndim != 2 or source_K2.shape[1] != 2:
        raise ValueError(f"landmarks of shapes {source_K2.shape} and {target_K2.shape}; both must be [points, 2]")
    source, target = (points[:, 0] + 1j * points[:, 1] for points in (source_K2, target_K2))
    source_mean, target_mean = source.mean(), target.mean()
    centred = source - source_mean
    spread = float(np.sum(np.abs(centred) ** 2)) if (np.abs(source_K2) < FARTHEST).all() else np.nan
    if not spread > COINCIDE or not np.isfinite(target).all():
        raise ValueError(
            f"landmarks {source_K2.tolist()} coincide, are not finite or lie {FARTHEST:g} pixels off; they define no "
            "alignment"
        )
    a = np.sum(centred.conj() * (target - target_mean)) / spread
    b = target_mean - a * source_mean
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(image: np.ndarray, landmark_52: np.ndarray, size: int = 112, antialias: bool = True) -> np.ndarray:
    """Warp a photo (uint8, [H, W] or [H, W, C]) onto the 112x112 template, then resize to ``size`` x ``size``.

    Bilinear, black outside the photo. Where the face is more than twice as large as in the template, blocks of pixels
    are averaged first: bilinear sampling alone would skip most of them (aliasing). ``antialias=False`` leaves this out,
    as published protocols do. Warping straight to a smaller size would skip pixels too, and training resizes its
    aligned 112x112 images in the same way.
    """
    matrix_23 = similarity_transform(landmark_52, np.asarray(ARCFACE_TEMPLATE))
    return fit_image(warp(image, matrix_23, 112, antialias), (size, size), "stretch")


def warp(image: np.ndarray, matrix_23: np.ndarray, side: int, antialias: bool = True) -> np.ndarray:
    """The square of ``side`` pixels that a similarity maps a photo onto; black and averaged as ``align_face`` says."""
    block = int(1 / np.hypot(matrix_23[0, 0], matrix_23[1, 0])) if antialias else 1
    if block > 1:
        image, matrix_23 = _averaged(image, matrix_23, side, block)
    return cv2.warpAffine(image, matrix_23, (side, side), borderValue=0)


def lies_outside(landmark_52: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether one of the landmarks lies outside of an image of this shape [H, W, ...]; pixel centres are whole."""
    landmark_52 = np.asarray(landmark_52)
    return bool((landmark_52 < -0.5).any() or (landmark_52 > (shape[1] - 0.5, shape[0] - 0.5)).any())


def _averaged(image: np.ndarray, matrix_23: np.ndarray, side: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the image that the warp reads, ``block`` x ``block`` pixels averaged into one, and its warp."""
    corner_42 = np.array([[-1, -1], [side, -1], [side, side], [-1, side]], np.float64)
    source_42 = (corner_42 - matrix_23[:, 2]) @ np.linalg.inv(matrix_23[:, :2]).T
    first_2 = np.maximum(np.floor(source_42.min(axis=0)) - block, 0).astype(int)
    last_2 = np.minimum(np.ceil(source_42.max(axis=0)) + block, image.shape[1::-1]).astype(int)
    part = image[first_2[1] : max(last_2[1], first_2[1] + 1), first_2[0] : max(last_2[0], first_2[0] + 1)]
    if part.size == 0:  # the face lies outside the photo
        return image[:1, :1], matrix_23
    below, right = -part.shape[0] % block, -part.shape[1] % block
    part = cv2.copyMakeBorder(part, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    small = cv2.resize(part, (part.shape[1] // block, part.shape[0] // block), interpolation=cv2.INTER_AREA)
    # x = first + block x' + (block - 1) / 2 for the centre of the pixel x' of the small image.
    turn_22 = matrix_23[:, :2]
    shift_2 = matrix_23[:, 2] + turn_22 @ (first_2 + (block - 1) / 2)
    return small, np.hstack([block * turn_22, shift_2[:, None]])
