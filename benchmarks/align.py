"""How well faces are aligned, and what the rest of the error is made of: ORL's 400 pictures, and photos of your own.

    python benchmarks/align.py                                              # ORL (fetched once), a minute
    python benchmarks/align.py data/photos/t1.jpg data/photos/astronaut.png # what the tests fetched, every face of them

All figures are pixels of the 112 x 112 crop, of eyes and mouth corners (the nose counts in the fit alone), once for
landmarks as O-Net's first pass puts them (``rounds 0``) and once for what ``--detector mtcnn`` gives:

- ``fit``: how far the fitted similarity leaves the landmarks from the template. Four numbers fit ten; the rest is the
  shape of the face, its expression and its pose. ``no similarity``: faces of which NO rotation, scale and shift would
  bring all four within 4 pixels (the smallest largest distance, by convex optimisation).
- ``again``: the landmarks detected again in the crop, off the template and off where the fit left them. The second is
  the noise of detecting, of the photo and of the crop together; ``other`` is the same, judged by the other pass.
- ``turned``: each photo is turned by up to 15 degrees and scaled by 0.8 to 1.25, four times; root mean square of the
  distance between the crops of one face (of the template's points, put back into the photo), which no error can hide
  from.
- ``ms``: of the whole detection, one photo after another, the best of five.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
from prettytable import PrettyTable
from scipy.optimize import minimize

from benchmarks.common import build_parser, case, orl_photos, run, timed
from utils.photos.align import ARCFACE_TEMPLATE, align_face, similarity_transform
from utils.photos.mtcnn import ROUNDS, Mtcnn
from utils.photos.photo import read_photo

TEMPLATE_52 = np.array(ARCFACE_TEMPLATE)
JUDGED = [0, 1, 3, 4]
BAR = 4.0  # pixels
TRIALS = 4


def moved(point_K2: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
    return point_K2 @ matrix_23[:, :2].T + matrix_23[:, 2]


def distances(point_F52: np.ndarray, other_F52: np.ndarray) -> np.ndarray:
    """[F, 4] of the judged points."""
    return np.linalg.norm(point_F52 - other_F52, axis=-1)[:, JUDGED]


def least_largest_distance(landmark_52: np.ndarray) -> float:
    """The largest of the four distances to the template under the similarity that makes it smallest."""
    matrix_23 = similarity_transform(landmark_52[JUDGED], TEMPLATE_52[JUDGED])
    start_52 = moved(landmark_52, matrix_23)[JUDGED] - TEMPLATE_52[JUDGED].mean(axis=0)
    target_52 = TEMPLATE_52[JUDGED] - TEMPLATE_52[JUDGED].mean(axis=0)

    def slack(v_5):  # v: cosine and sine times scale, shift, the largest distance
        x, y = start_52.T
        off = np.stack([v_5[0] * x - v_5[1] * y + v_5[2], v_5[1] * x + v_5[0] * y + v_5[3]], 1) - target_52
        return v_5[4] ** 2 - (off**2).sum(axis=1)

    largest = np.sqrt(((start_52 - target_52) ** 2).sum(axis=1).max())
    within = {"type": "ineq", "fun": slack}
    done = minimize(lambda v_5: v_5[4], [1, 0, 0, 0, largest], method="SLSQP", constraints=within)
    return float(min(done.x[4], largest)) if done.success else float(largest)


def turned(photo: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The photo turned, scaled and shifted, and the matrix of it."""
    rng = np.random.default_rng(seed)
    height, width = photo.shape[:2]
    angle, scale = rng.uniform(-15, 15), rng.uniform(0.8, 1.25)
    matrix_23 = cv2.getRotationMatrix2D((width / 2, height / 2), -angle, scale)
    matrix_23[:, 2] += np.array([width, height]) * (0.6 * scale - 0.5) + rng.uniform(-2, 2, 2)
    side = (int(width * scale * 1.2), int(height * scale * 1.2))
    return cv2.warpAffine(photo, matrix_23, side, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE), matrix_23


def spread_when_turned(find: Mtcnn, photo: np.ndarray, known_F52: np.ndarray, seed: int) -> list[float]:
    """Mean squared distance between the crops of one face, of each face."""
    template_FT52 = []
    for trial in range(TRIALS):
        image, matrix_23 = turned(photo, seed * TRIALS + trial)
        found_N52 = find(image)[1]
        back_N52 = np.array([moved(face, cv2.invertAffineTransform(matrix_23)) for face in found_N52])
        nearest = [int(np.linalg.norm((back_N52 - face).mean(axis=1), axis=1).argmin()) for face in known_F52]
        crops = [cv2.invertAffineTransform(similarity_transform(back_N52[i], TEMPLATE_52)) for i in nearest]
        template_FT52.append([moved(TEMPLATE_52, crop) for crop in crops])
    spreads = []
    for face_52, trial_T52 in zip(known_F52, np.swapaxes(template_FT52, 0, 1), strict=True):
        crop_T52 = np.array([moved(points, similarity_transform(face_52, TEMPLATE_52)) for points in trial_T52])
        spreads.append(float(((crop_T52 - crop_T52.mean(axis=0)) ** 2).sum(axis=-1).mean() * TRIALS / (TRIALS - 1)))
    return spreads


def largest(faces: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Landmarks of the largest of (boxes, landmarks, scores)."""
    box_N4, landmark_N52, _ = faces
    return landmark_N52[np.prod(box_N4[:, 2:] - box_N4[:, :2], axis=1).argmax()]


def measure(name: str, photos: list[np.ndarray], every: bool, turn: int) -> list[dict]:
    """Both passes on one group of photos; of each photo every face or the largest, every ``turn``-th photo turned."""
    passes = {rounds: Mtcnn(rounds=rounds) for rounds in (0, ROUNDS)}
    seconds = {rounds: [] for rounds in passes}
    for _ in range(5):  # in turn, since others may use the machine
        for rounds, find in passes.items():
            seconds[rounds].append(timed(lambda find=find: [find(photo) for photo in photos])[1])
    rows = []
    for rounds, find in passes.items():
        other = passes[ROUNDS - rounds]
        found = []  # (photo, landmarks of its faces)
        for photo in photos:
            faces = find(photo)
            found.append((photo, faces[1] if every else largest(faces)[None]))
        face_F52 = np.concatenate([faces for _, faces in found])
        fitted_F52 = np.array([moved(face, similarity_transform(face, TEMPLATE_52)) for face in face_F52])
        crops = [align_face(photo, face) for photo, faces in found for face in faces]
        again_F52, other_F52 = (np.array([largest(judge(crop)) for crop in crops]) for judge in (find, other))
        least_F = np.array([least_largest_distance(face) for face in face_F52])
        spreads = [
            spread
            for number in range(0, len(found), turn)
            for spread in spread_when_turned(find, *found[number], number)
        ]
        row = {
            **off_template("fit", distances(fitted_F52, TEMPLATE_52)),
            "no_similarity": (least_F >= BAR).mean(),
            "no_similarity_worst": least_F.max(),
            **off_template("again", distances(again_F52, TEMPLATE_52)),
        }
        for what, judged_F52 in (("again_off_fit", again_F52), ("other_off_fit", other_F52)):
            off_F4 = distances(judged_F52, fitted_F52)
            row |= {what: off_F4.mean(), f"{what}_worst": off_F4.max()}
        row |= {"turned_rms": np.sqrt(np.mean(spreads)), "ms": min(seconds[rounds]) / len(photos) * 1e3}
        about = {"photos": name, "rounds": rounds, "faces": len(face_F52)}
        rows.append(about | {what: float(value) for what, value in row.items()})
    return rows


def off_template(what: str, off_F4: np.ndarray) -> dict[str, float]:
    """Columns of a distance to the template."""
    means = {f"{what}_eyes": off_F4[:, :2].mean(), f"{what}_mouth": off_F4[:, 2:].mean()}
    return means | {f"{what}_all_within": (off_F4.max(axis=1) < BAR).mean(), f"{what}_worst": off_F4.max()}


def measure_all(args) -> list[dict]:
    """All groups of photos; prints their table."""
    rows = []
    for path in args.photos:
        rows += measure(path.name, [read_photo(path)], every=True, turn=1)
    if not args.photos:
        rows = measure("ORL", [photo for *_, photo in orl_photos()[:: args.every]], every=False, turn=4)
    table = PrettyTable([name.replace("_", " ") for name in rows[0]], float_format=".2")
    table.add_rows([list(row.values()) for row in rows])
    print(table.get_string(fields=table.field_names[:9]))
    print(table.get_string(fields=table.field_names[:2] + table.field_names[9:]))
    return [
        case(f"align/{ours['photos']}", metric, [ours[metric]], [first[metric]], "first pass of O-Net", smaller=True)
        for first, ours in zip(rows[::2], rows[1::2], strict=True)
        for metric in ("turned_rms", "again_off_fit", "ms")
    ]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("photos", type=Path, nargs="*", help="photos instead of ORL's pictures; every face of each")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth picture of ORL")
    run(parser, argv, measure_all, "one thread", ("numpy", "opencv-python-headless", "onnxruntime"))


if __name__ == "__main__":
    main()
