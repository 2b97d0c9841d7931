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
    meta = folder / "meta"
    rows = [line.split() for line in (meta / f"{IJB_NAME}_face_tid_mid.txt").read_text().splitlines()]
    landmark_of = {
        parts[0]: np.array(parts[1:11], dtype=np.float64).reshape(5, 2)
        for parts in map(str.split, (meta / f"{IJB_NAME}_name_5pts_score.txt").read_text().splitlines())
    }
    crops = [cv2.imread(str(folder / "loose_crop" / name), cv2.IMREAD_GRAYSCALE) for name, _, _ in rows]
    aligned = np.stack([align_face(crop, landmark_of[name]) for crop, (name, _, _) in zip(crops, rows, strict=True)])
    template_N, media_N = (np.array([int(row[column]) for row in rows]) for column in (1, 2))
    template_T, feature_TD = pool_templates(embed(aligned), template_N, media_N)
    pairs = np.loadtxt(meta / f"{IJB_NAME}_template_pair_label.txt", dtype=np.int64)
    score_P = score_pairs(template_T, feature_TD, pairs[:, 0], pairs[:, 1])
    return [asdict(point) for point in tar_at_far(score_P, pairs[:, 2].astype(bool), FARS)]
