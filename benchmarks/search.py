"""The index of large galleries beside the exact search, on real faces: does it find the same people, and how fast?

    python benchmarks/search.py --model work_dirs/mine --json search.json     # 40 people, 320 x 125 rows; a minute

ORL's pictures 1 to 8 of each of the 40 people, aligned by ``--detector mtcnn``, are enrolled many times each, every
time turned, scaled, shifted and lit a little differently (``--each``). Pictures 9 and 10, which the gallery does not
hold, are asked about: ``nearest found`` is the share of them whose nearest row (exact, float32 products) is among the
candidates of the index, ``same answer`` the share whose first name and cosine are those of the exact search.
The model may be any that ``tools/search.py`` takes; that of docs/tutorials/photos.md knows people 1 to 30.
"""

import sys
import tempfile
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
from prettytable import PrettyTable

from benchmarks.common import build_parser, case, orl_photos, run, timed
from eval.approximate import ApproximateSearch, build_index, load_faiss
from eval.embed import load_embedder
from eval.gallery import About, unit_float32, write_gallery
from utils.photos.align import align_face
from utils.photos.detect import build_detector, choose_faces

REPEATS = 5


def varied(crop_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop turned by up to 6 degrees, scaled and shifted by up to 5 %, its contrast and brightness changed."""
    matrix_23 = cv2.getRotationMatrix2D((55.5, 55.5), -rng.uniform(-6, 6), rng.uniform(0.95, 1.05))
    matrix_23[:, 2] += rng.uniform(-5.6, 5.6, 2)
    warped = cv2.warpAffine(crop_HWC, matrix_23, (112, 112), borderMode=cv2.BORDER_REFLECT)
    return np.clip((warped - 127.5) * rng.uniform(0.8, 1.2) + 127.5 + rng.uniform(-20, 20), 0, 255).astype(np.uint8)


def aligned_pictures() -> list[tuple[int, int, np.ndarray]]:
    """(person, number, crop) of ORL."""
    detect = build_detector("mtcnn")
    crops = []
    for person, number, photo in orl_photos():
        (face,) = choose_faces(detect(photo), "largest", photo.shape)
        crops.append((person, number, align_face(photo, face.landmark_52)))
    return crops


def answers_of(search, query_QD: np.ndarray) -> tuple[list, list[float]]:
    """(answers, milliseconds a query of each of several runs)."""
    runs = [timed(search.search, query_QD, 1) for _ in range(REPEATS)]
    return runs[-1][0], [1e3 * seconds / len(query_QD) for _, seconds in runs]


def measure(args) -> list[dict]:
    """Enrol, ask both searches; prints a table."""
    load_faiss()
    embedder = load_embedder(args.model, batch_size=64)
    side = embedder.input_size

    def rows_of(images: list[np.ndarray]) -> np.ndarray:
        small = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images]
        parts = [np.stack(small[first : first + 64]) for first in range(0, len(small), 64)]
        raw_ND = np.concatenate([embedder(part) + embedder(part, flip=True) for part in parts])
        return unit_float32(raw_ND, lambda i: f"crop {i}")

    pictures = aligned_pictures()
    rng = np.random.default_rng(0)
    known = [(person, crop) for person, number, crop in pictures if number <= 8 for _ in range(args.each)]
    embedding_RD = rows_of([varied(crop, rng) for _, crop in known])
    person_R = np.array([person - 1 for person, _ in known])
    query_QD = rows_of([crop for _, number, crop in pictures if number > 8])
    asked_Q = np.array([person - 1 for person, number, _ in pictures if number > 8])
    with tempfile.TemporaryDirectory() as folder:
        gallery = write_gallery(
            Path(folder) / "g.safetensors",
            About(str(args.model), embedder.identity),
            [f"person {person + 1}" for person in range(40)],
            person_R,
            np.arange(len(known), dtype=np.uint64),
            lambda position_n: embedding_RD[position_n],
            np.empty((0, embedding_RD.shape[1]), np.float32),
            show_progress=False,
        )
        about, building = timed(lambda: build_index(gallery, show_progress=False))
        search = ApproximateSearch(gallery)
        exact, exact_ms = answers_of(gallery, query_QD)
        near, near_ms = answers_of(search, query_QD)
        nearest_Q = np.argmax(query_QD @ np.asarray(gallery.embedding_RD).T, axis=1)
        _, candidate_QK = search.index.search(query_QD, 128)
    found = float(np.mean([row in candidates for row, candidates in zip(nearest_Q, candidate_QK, strict=True)]))
    same = float(np.mean([a[0] == b[0] for a, b in zip(exact, near, strict=True)]))
    right = float(np.mean([a[0].name == f"person {p + 1}" for a, p in zip(exact, asked_Q, strict=True)]))
    row = {key: about[key] for key in ("rows", "lists")} | {"searched": about["probed"], "recall kept": about["recall"]}
    row |= {"nearest found": found, "same answer": same, "person right (exact)": right, "build s": round(building, 1)}
    row |= {"exact ms": round(min(exact_ms), 2), "index ms": round(min(near_ms), 2)}
    table = PrettyTable(list(row))
    table.add_row(list(row.values()))
    print(table)
    return [
        case(f"search/{about['rows']}", "query_ms", near_ms, exact_ms, "exact search", smaller=True),
        case(f"search/{about['rows']}", "nearest_found", [found], None, ""),
        case(f"search/{about['rows']}", "same_answer", [same], None, ""),
    ]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--each", type=int, default=125, help="rows of each of the 320 pictures (default: %(default)s)")
    run(parser, argv, measure, "all threads", ("numpy", "faiss-cpu"))


if __name__ == "__main__":
    main()
