"""What simple, well-known methods reach on the demo's unseen people: the bar that the network has to clear.

Pixel cosine, PCA ("eigenfaces", Turk and Pentland 1991) and Fisherfaces (Belhumeur et al. 1997), all from scikit-learn,
fitted on the people that the network is trained on and judged on the same pairs.
Shapes: N images, H x W pixels, D features, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_curve

from utils.vectors import unit_rows

PIXELS = 56


@dataclass(frozen=True)
class BalancedAccuracy:
    """``accuracy``: mean of true-accept and true-reject rate at ``threshold`` (cosine), the best one on these pairs."""

    accuracy: float
    threshold: float


def all_pairs(person_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every unordered pair of images: ``left_P``, ``right_P`` (indices) and ``same_P``."""
    left_P, right_P = np.triu_indices(len(person_N), 1)
    return left_P, right_P, person_N[left_P] == person_N[right_P]


def cosine_scores(embedding_ND: np.ndarray, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Cosine similarity of the pairs, float64 [P]."""
    unit_ND = unit_rows(embedding_ND)
    return np.einsum("pd,pd->p", unit_ND[left_P], unit_ND[right_P])


def balanced_accuracy(score_P: np.ndarray, same_P: np.ndarray) -> BalancedAccuracy:
    """Best mean of true-accept and true-reject rate over all thresholds (chance is 0.5 whatever the class balance)."""
    false_accept, true_accept, threshold = roc_curve(same_P, score_P, drop_intermediate=False)
    accuracy = (true_accept + 1 - false_accept) / 2
    best = int(np.argmax(accuracy))
    return BalancedAccuracy(float(accuracy[best]), float(threshold[best]))


def _pixels(image_NHW: np.ndarray) -> np.ndarray:
    small = [cv2.resize(image, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA) for image in image_NHW]
    return np.stack(small).reshape(len(small), -1) / 255.0


def fit_baselines(image_NHW: np.ndarray, person_N: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Fit each baseline on grey uint8 training images; returns name -> (images uint8 [N, H, W] -> features [N, D])."""
    pixel_ND = _pixels(image_NHW)
    mean_D = pixel_ND.mean(axis=0)
    most = min(len(pixel_ND) - 1, pixel_ND.shape[1])
    whitened = PCA(min(100, most), whiten=True, random_state=0).fit(pixel_ND)
    reduced = PCA(min(60, most), random_state=0).fit(pixel_ND)
    fisher = LinearDiscriminantAnalysis().fit(reduced.transform(pixel_ND), person_N)
    return {
        "pixel cosine": lambda images: _pixels(images) - mean_D,
        "PCA-100": lambda images: whitened.transform(_pixels(images)),
        "Fisherfaces": lambda images: fisher.transform(reduced.transform(_pixels(images))),
    }
