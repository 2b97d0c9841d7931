"""Small inputs and a stand-in network for the evaluation tests."""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from utils.photos.align import ARCFACE_TEMPLATE


class ProjectionEmbedder:
    """Looks like ``eval.embed.Embedder``: pixels of a 12 x 12 thumbnail times a fixed random matrix."""

    input_size, embedding_size, engine = 112, 24, "projection"
    precision = "fp32"

    def __init__(self, fail_after: int | None = None):
        self.matrix = np.random.default_rng(5).normal(size=(144 * 3, self.embedding_size))
        self.calls, self.fail_after = 0, fail_after

    @property
    def identity(self) -> str:
        suffix = "" if self.precision == "fp32" else f"-{self.precision}"
        return hashlib.sha256(self.matrix.tobytes()).hexdigest() + suffix

    def stay(self) -> None:
        """Nothing here is undecided."""

    def __call__(self, images_NHWC, flip=False):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise KeyboardInterrupt
        if flip:
            images_NHWC = images_NHWC[:, :, ::-1]
        small = [cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA).reshape(-1) for image in images_NHWC]
        return ((np.array(small, np.float64).reshape(len(small), -1) - 127.5) @ self.matrix).astype(np.float32)


def faces(num_people: int, each: int, size: int = 112, seed: int = 0, noise: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Blurry colour patterns: images uint8 [people * each, size, size, 3] and the person of each."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_people):
        pattern = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        for _ in range(each):
            varied = np.clip(pattern.astype(int) + rng.integers(-noise, noise + 1, pattern.shape), 0, 255)
            images.append(cv2.resize(varied.astype(np.uint8), (size, size), interpolation=cv2.INTER_CUBIC))
    return np.stack(images), np.repeat(np.arange(num_people), each)


def pairs_of(person_N: np.ndarray, num_pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices [2P] and labels [P]: half genuine, half impostor, mixed."""
    rng = np.random.default_rng(seed)
    index, same = [], []
    for pair in range(num_pairs):
        while True:
            a, b = rng.choice(len(person_N), 2, replace=False)
            if (person_N[a] == person_N[b]) == (pair % 2 == 0):
                break
        index += [a, b]
        same.append(pair % 2 == 0)
    return np.array(index), np.array(same)


def write_ijb(root: Path, target: str = "MINI", num_people: int = 6, seed: int = 0) -> dict:
    """An IJB-shaped folder with sparse template ids, shuffled rows, and one media id used by two templates."""
    rng = np.random.default_rng(seed)
    images, person_N = faces(num_people, 6, seed=seed, noise=110)
    meta, crops, prefix = root / "meta", root / "loose_crop", target.lower()
    meta.mkdir(parents=True)
    crops.mkdir()
    template_N = person_N * 1000 + np.tile([7, 7, 7, 11, 11, 500], num_people)
    media_N = np.tile([1, 1, 2, 2, 3, 3], num_people)
    order = rng.permutation(len(images))
    template_N, media_N, names = template_N[order], media_N[order], [f"{k + 1}.png" for k in order]
    template_lines, landmark_lines, scores = [], [], rng.uniform(0.5, 1, len(images)).round(6)
    for row, index in enumerate(order):
        shift = rng.integers(0, 20, 2)
        crop = np.zeros((140, 150, 3), np.uint8)
        crop[shift[1] : shift[1] + 112, shift[0] : shift[0] + 112] = images[index]
        cv2.imwrite(str(crops / names[row]), crop[..., ::-1])
        points = " ".join(f"{value:.4f}" for value in (np.array(ARCFACE_TEMPLATE) + shift).reshape(-1))
        template_lines.append(f"{names[row]} {template_N[row]} {media_N[row]}")
        landmark_lines.append(f"{names[row]} {points} {scores[row]:.6f}")
    ids = np.unique(template_N)
    pairs = [(a, b, int(a // 1000 == b // 1000)) for k, a in enumerate(ids) for b in ids[k + 1 :]]
    pairs = [pairs[k] for k in rng.permutation(len(pairs))]
    first = [person * 1000 + 7 for person in range(num_people)]
    files = {
        "face_tid_mid.txt": template_lines,
        "name_5pts_score.txt": landmark_lines,
        "template_pair_label.txt": [f"{a} {b} {same}" for a, b, same in pairs],
        "1N_gallery_G1.csv": ["TEMPLATE_ID,SUBJECT_ID", *(f"{t},{t // 1000}" for t in first[::2])],
        "1N_gallery_G2.csv": ["TEMPLATE_ID,SUBJECT_ID", *(f"{t},{t // 1000}" for t in first[1::2])],
        "1N_probe_mixed.csv": ["TEMPLATE_ID,SUBJECT_ID", *(f"{t},{t // 1000}" for t in ids if t not in first)],
    }
    for name, lines in files.items():
        (meta / f"{prefix}_{name}").write_text("\n".join(lines) + "\n")
    return {
        "images": images[order],
        "template": template_N,
        "media": media_N,
        "score": scores,
        "pairs": np.array(pairs),
    }
