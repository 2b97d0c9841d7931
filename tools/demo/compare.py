"""Network and baselines on the same unseen pairs: every pair of images, the ``.bin`` sets, the template pairs.

Used by ``tools/demo.py``. Shapes: N images, D features, P pairs, T templates.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from eval.bins import load_bin
from eval.metrics import tar_at_far, verification_metrics
from eval.protocols import read_ijb
from eval.templates import pool_templates, score_pairs
from tools.demo.baselines import all_pairs, balanced_accuracy, cosine_scores
from tools.demo.data import IJB_NAME, Faces
from utils.photos.align import align_face

Embed = Callable[[np.ndarray], np.ndarray]  # grey uint8 [N, H, W] -> features [N, D], summed over the mirror image
FARS = (1e-2, 1e-1)


@dataclass(frozen=True)
class Comparison:
    """One method's scores on every unseen pair, for the pictures, and its figures, for the tables."""

    score_P: np.ndarray
    embedding_ND: np.ndarray
    figures: dict


def compare(name: str, embed: Embed, unseen: Faces, data: Path) -> Comparison:
    """All figures of one method. ``data`` is the folder that ``tools/demo/data.py`` wrote."""
    embedding_ND = embed(unseen.image_NHW)
    left_P, right_P, same_P = all_pairs(unseen.person_N)
    score_P = cosine_scores(embedding_ND, left_P, right_P)
    balanced = balanced_accuracy(score_P, same_P)
    sets = {}
    for path in sorted(data.glob("*.bin")):
        image_NHWC, same_pair_P = load_bin(path)
        metrics = verification_metrics(embed(image_NHWC[..., 0]), same_pair_P)
        sets[path.stem] = {"accuracy": metrics.accuracy, "accuracy_std": metrics.accuracy_std, "auc": metrics.auc}
    figures = {
        "method": name,
        "balanced_accuracy": balanced.accuracy,
        "threshold": balanced.threshold,
        "sets": sets,
        "templates": template_figures(embed, data / "IJB"),
    }
    return Comparison(score_P, embedding_ND, figures)


def template_figures(embed: Embed, folder: Path) -> list[dict]:
    """TAR at the FARs that 720 impostor template pairs can resolve (norm kept, no detector score)."""
    protocol = read_ijb(folder, IJB_NAME)
    crops = [cv2.imread(str(folder / "loose_crop" / name), cv2.IMREAD_GRAYSCALE) for name in protocol.image_N]
    aligned = np.stack([align_face(crop, points) for crop, points in zip(crops, protocol.landmark_N52, strict=True)])
    template_T, feature_TD = pool_templates(embed(aligned), protocol.template_N, protocol.media_N)
    score_P = score_pairs(template_T, feature_TD, protocol.left_P, protocol.right_P)
    return [asdict(point) for point in tar_at_far(score_P, protocol.same_P, FARS)]
