"""The CASIA, CelebA and LFW layouts in small, with real faces, to try the workflows of docs/tutorials on.

Launch::

    python tools/demo/miniature.py casia --output data/mini
    python tools/demo/miniature.py celeba --output data/mini
    python tools/demo/miniature.py photos --output data/mini

The faces are ORL's (40 people, 10 grey images each; see tools/demo/data.py): people 1-30 train, 31-40 are in the LFW
part only. ``casia`` writes ``CASIA-maxpy-clean/<number>/<image>.jpg``, ``lfw-align-128/<name>/<name>_0001.jpg`` and
``lfw_test_pair.txt``; ``celeba`` writes ``train/Anno/identity_CelebA.txt``, ``train/Img/img_align_celeba``,
``val/images`` and ``val/lfw_test_pair.txt``. ``photos`` writes pictures that are not aligned, enlarged 2.5 times to
230x280: ``photos/train/<person>`` (30 people), ``photos/friends/<person>`` (five pictures each of people 31-35) and
``photos/visitors`` (the other pictures of people 31-35, and those of people 36-40, who are nobody's friends).
"""

import shutil
import sys
from pathlib import Path

import cv2
import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tools.demo.data import Faces, encode_jpeg, load_faces, original_pictures, verification_pairs
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors

FRIENDS, NUM_ENROLLED, ENLARGED = range(31, 36), 5, 2.5
TRAIN, UNSEEN = list(range(1, 31)), list(range(31, 41))
CELEBA_SIZE = (178, 218)  # width, height of CelebA's aligned pictures
CASIA_STEP, CASIA_FIRST = 37, 45  # folder numbers with gaps, as the real ones have
CELEBA_FIRST = 2880  # identities do not begin at 1 in the first lines of the real file either


def write_lfw(faces: Faces, folder: Path, pair_list: Path, size: tuple[int, int], seed: int) -> int:
    """People as ``Name_Surname/Name_Surname_0001.jpg`` and a pair list; the number of pairs."""
    numbers = dict.fromkeys(faces.person_N.tolist(), 0)
    names = []
    for image_HW, person in zip(faces.image_NHW, faces.person_N.tolist(), strict=True):
        numbers[person] += 1
        name = f"Orl_Person{person:02d}"
        names.append(f"{name}/{name}_{numbers[person]:04d}.jpg")
        write_image(folder / names[-1], image_HW, size)
    pairs = verification_pairs(faces, seed)["orl"]
    pair_list.write_text("".join(f"{names[left]} {names[right]} {int(same)}\n" for left, right, same in pairs))
    return len(pairs)


def write_casia(faces: Faces, folder: Path) -> int:
    """A folder a person; the number of images."""
    for index, (image_HW, person) in enumerate(zip(faces.image_NHW, faces.person_N.tolist(), strict=True)):
        identity = CASIA_FIRST + CASIA_STEP * TRAIN.index(person)
        write_image(folder / f"{identity:07d}" / f"{index % 10 + 1:03d}.jpg", image_HW, (112, 112))
    return len(faces.person_N)


def write_celeba(faces: Faces, folder: Path, seed: int) -> int:
    """``Anno/identity_CelebA.txt`` and a flat folder of pictures in no order of people; the number of images."""
    order = np.random.default_rng(seed).permutation(len(faces.person_N))
    lines = []
    for number, index in enumerate(order, start=1):
        name, person = f"{number:06d}.jpg", int(faces.person_N[index])
        write_image(folder / "Img" / "img_align_celeba" / name, faces.image_NHW[index], CELEBA_SIZE)
        lines.append(f"{name} {CELEBA_FIRST + person * 3}\n")
    (folder / "Anno").mkdir()
    (folder / "Anno" / "identity_CelebA.txt").write_text("".join(lines))
    return len(lines)


def write_photos(cache: Path, folder: Path) -> int:
    """Pictures as the camera took them, in their own proportions; the number of those to train on."""
    for person, number, image_HW in original_pictures(cache):
        name = f"person_{person:02d}/{number}.jpg"
        if person in TRAIN:
            target = folder / "train" / name
        elif person in FRIENDS and number <= NUM_ENROLLED:
            target = folder / "friends" / name
        else:
            target = folder / "visitors" / name.replace("/", "_")
        size = tuple(round(ENLARGED * side) for side in image_HW.shape[::-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode_jpeg(cv2.resize(image_HW, size, interpolation=cv2.INTER_CUBIC)))
    return len(TRAIN) * 10


def write_image(path: Path, image_HW: np.ndarray, size: tuple[int, int]) -> None:
    """JPEG of the given (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_jpeg(cv2.resize(image_HW, size, interpolation=cv2.INTER_LINEAR)))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = CommandLine(__doc__)
    parser.add_argument("layout", choices=("casia", "celeba", "photos"))
    parser.add_argument("--output", type=Path, required=True, help="folder to write into; its parts must not exist yet")
    parser.add_argument("--cache", type=Path, default=None, help="where the package with the faces is kept")
    parser.add_argument("--seed", type=int, default=2048, help="order of the pictures and choice of the pairs")
    args = parser.parse_args(argv)
    check_ranges(args, seed=COUNT)
    parts = {"casia": ["CASIA-maxpy-clean", "lfw-align-128"], "celeba": ["train", "val"]}.get(args.layout, ["photos"])
    for part in parts:
        if (args.output / part).exists():
            raise UserError(f"{args.output / part}: exists already; delete it or choose another --output")
    cache = args.cache or default_cache()
    faces = load_faces(cache)
    aside = args.output / f".{args.layout}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if args.layout == "casia":
        num_images = write_casia(faces.of(TRAIN), aside / parts[0])
        num_pairs = write_lfw(faces.of(UNSEEN), aside / parts[1], aside / "lfw_test_pair.txt", (128, 128), args.seed)
        parts = [*parts, "lfw_test_pair.txt"]
    elif args.layout == "photos":
        num_images, num_pairs = write_photos(cache, aside / "photos"), 0
    else:
        num_images = write_celeba(faces.of(TRAIN), aside / "train", args.seed)
        (aside / "val").mkdir()
        pair_list = aside / "val" / "lfw_test_pair.txt"
        num_pairs = write_lfw(faces.of(UNSEEN), aside / "val" / "images", pair_list, (250, 250), args.seed)
    for part in parts:
        (aside / part).replace(args.output / part)
    aside.rmdir()
    others = f"{num_pairs} pairs of others" if num_pairs else f"pictures of {len(UNSEEN)} others"
    print(f"{args.output}: {num_images} images of {len(TRAIN)} people to train on, {others}")


def default_cache() -> Path:
    """The demo's, in the checkout."""
    return Path(__file__).resolve().parent.parent.parent / "data" / "orl"


if __name__ == "__main__":
    main()
