"""Who is in a photo? Enrol people into a gallery file, then ask; nobody is an answer.

    python tools/search.py enrol people/ gallery.safetensors --model work_dirs/run             # a folder a person
    python tools/search.py enrol anna.jpg gallery.safetensors --model work_dirs/run --name Anna
    python tools/search.py find photo.jpg gallery.safetensors --top 5 --json answer.json
    python tools/search.py info gallery.safetensors

``enrol`` takes a folder (the first folder below it names the person, photos at its top are named by themselves), a
photo, a record set or a list of ``path label`` lines (the label is the name, or line ``label + 1`` of ``--names``),
and adds to a gallery that is there. Photos are aligned crops unless ``--detector`` finds the faces: the largest of
each photo is enrolled, every one is looked up. ``find`` uses the gallery's model and detector unless others are
named.

Whoever scores above the threshold is known. The threshold is measured when people are enrolled: each of up to 5,000
photos is searched as if its person were not in the gallery, or photos of ``--impostors`` are; its false-accept rate
is the share of such strangers who get a name. ``find --far`` picks another rate without measuring again.

Up to a million photos are searched exactly; larger galleries by an index (``pip install -c constraints.txt
'.[search]'``), whose recall is measured when it is built.
"""

import argparse
import sys
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dataset import recognise
from eval.approximate import ApproximateSearch, build_index, index_path
from eval.embed import Embedder, load_embedder, precision_of
from eval.gallery import About, Gallery, Match, Threshold, unit_float32, write_gallery
from eval.options import add_device_option, add_engine_options
from eval.stream import digest, embed_to_file
from tools.sources import NetworkImages, open_source, pixel_digest
from utils import distributed
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import check_replaceable, write_json
from utils.images import find_image_files, is_image_name
from utils.photos.detect import DetectedFace, build_detector
from utils.photos.faces import AlignedFaces, Face, detect_faces
from utils.photos.photo import read_photo
from utils.text import read_text_lines

EXACT_ROWS = 1_000_000


@dataclass(frozen=True)
class Photos:
    """Faces to embed, read when asked for, and whose they are.

    ``images[i]`` is uint8 RGB of the network's size; ``stamp`` tells whether the files are those of last time.
    """

    images: Sequence[np.ndarray]
    name_N: list[str]
    described: Callable[[int], str]
    stamp: str


def open_photos(source: Path, size: int, detector: str | None, args: argparse.Namespace) -> Photos:
    """The photos at ``source``: an image, a folder of them, or a data set.

    Raises:
        UserError: nothing there that can be enrolled.
    """
    kind = None if is_image_name(source) else recognise(source, args.prefix)
    if kind in ("rec", "wds", "list"):
        return _open_data_set(source, size, args)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    root = source if source.is_dir() else source.parent
    names = find_image_files(source).names if source.is_dir() else [source.name]
    if not names:
        raise UserError(f"{source}: no images in it; a folder a person was expected, or photos named by the person")
    paths = [root / name for name in names]
    person_of = {path: args.name or _person(name) for path, name in zip(paths, names, strict=True)}
    if detector is None:
        faces = [Face(path) for path in paths]
    else:
        faces, empty = detect_faces(paths, build_detector(detector, args.min_score), every=False)
        if empty:
            listed = ", ".join(map(str, empty))
            print(f"no face found in {len(empty)} of {len(paths)} photos: {listed}", file=sys.stderr)
        if not faces:
            raise UserError(f"{source}: no face found in {len(paths)} photos; lower --min-score?")
    stamp = digest([(face.path, face.path.stat().st_mtime_ns, face.landmark_52) for face in faces])
    images = AlignedFaces(faces, size, resize=args.resize)
    return Photos(images, [person_of[face.path] for face in faces], lambda i: str(faces[i].path), stamp)


def _person(name: str) -> str:
    """First folder of a relative path, or the stem of a photo that lies in none."""
    folder, slash, _ = name.partition("/")
    return folder if slash else Path(name).stem


def _open_data_set(path: Path, size: int, args: argparse.Namespace) -> Photos:
    source = open_source(path, args.prefix)
    if not len(source):
        raise UserError(f"{path}: no images in it")
    labels = [int(label) for label in source.read_labels()]
    names = read_text_lines(args.names) if args.names is not None else source.identities
    if names is not None and not 0 <= min(labels) <= max(labels) < len(names):
        problem = f"{len(names)} names, but {path} has labels {min(labels)} to {max(labels)}"
        raise UserError(f"{args.names or path}: {problem}; one name a line, label 0 first, was expected")
    images = NetworkImages(lambda i: source[i][0], len(source), size, source.describe, args.resize)
    person = [args.name or str(label if names is None else names[label]) for label in labels]
    stat = path.stat()
    return Photos(images, person, source.describe, digest([path.resolve(), stat.st_mtime_ns, len(labels), labels]))


def embed_photos(photos: Photos, embedder: Embedder, gallery: Path, what: str) -> tuple[np.ndarray, np.ndarray, Path]:
    """(raw embeddings [N, D], digests of the crops [N], their file); an interrupted run goes on."""
    raw = gallery.with_name(f".{gallery.name}.{what}.npy")
    pixels_N = np.zeros(len(photos.images), np.uint64)

    class Digested:
        def __len__(self) -> int:
            return len(photos.images)

        def __getitem__(self, i: int) -> np.ndarray:
            image = photos.images[i]
            pixels_N[i] = pixel_digest(image)
            return image

    images = Digested()
    feature_ND = embed_to_file(embedder, images, raw, flip="add", key=photos.stamp, name_of=photos.described)
    for i in np.flatnonzero(pixels_N == 0).tolist():  # embedded by an earlier run
        images[i]
    return feature_ND, pixels_N, raw


def enrol(args: argparse.Namespace) -> None:
    """Add the people of a folder, photo or data set to a gallery, which is made if it is not there."""
    check_replaceable(args.gallery)  # now, not after the embedding
    before = Gallery(args.gallery) if args.gallery.exists() else None
    model = args.model or (before.about.model if before else None)
    if model is None:
        raise UserError(f"{args.gallery}: a new gallery needs --model")
    precision = chosen_precision(args.precision, before)
    embedder = load_embedder(model, args.network, args.engine, args.batch_size, precision=precision)
    detector = args.detector if before is None or args.detector is not None else before.about.detector
    if before is not None:
        check_model(before, embedder, model)
    photos = open_photos(args.source, embedder.input_size, detector, args)
    args.gallery.parent.mkdir(parents=True, exist_ok=True)
    raw_ND, pixels_N, raw = embed_photos(photos, embedder, args.gallery, "people")
    embedder.stay()
    about = About(str(Path(model).resolve()), embedder.identity, detector=detector)
    try:
        stranger_ID = before.stranger_ID if before is not None else np.empty((0, embedder.embedding_size), np.float32)
        about = replace(about, strangers=before.about.strangers if before is not None and len(stranger_ID) else "")
        if args.impostors is not None:
            stranger_ID = embed_strangers(args, embedder, detector)
            about = replace(about, strangers=f"{len(stranger_ID)} photos of {args.impostors.name}")
        gallery, added = add_people(before, photos, raw_ND, pixels_N, about, stranger_ID, args.gallery)
    finally:
        raw.unlink(missing_ok=True)
    known = len(before.names) if before is not None else 0
    change = f"{added} photos added, {len(photos.name_N) - added} were there"
    people = f"{len(gallery.names)} people ({len(gallery.names) - known} new)"
    print(f"{args.gallery}: {change}; {len(gallery)} photos of {people}")
    tell_threshold(gallery, args.far)
    if len(gallery) > args.exact_rows:
        index(args)


def embed_strangers(args: argparse.Namespace, embedder: Embedder, detector: str | None) -> np.ndarray:
    """Unit rows [I, D] of ``--impostors``."""
    named = argparse.Namespace(**{**vars(args), "name": "stranger", "names": None})
    photos = open_photos(args.impostors, embedder.input_size, detector, named)
    raw_ID, _, raw = embed_photos(photos, embedder, args.gallery, "strangers")
    try:
        return unit_float32(raw_ID, photos.described)
    finally:
        raw.unlink(missing_ok=True)


def add_people(
    before: Gallery | None,
    photos: Photos,
    raw_ND: np.ndarray,
    pixels_N: np.ndarray,
    about: About,
    stranger_ID: np.ndarray,
    path: Path,
) -> tuple[Gallery, int]:
    """Write the gallery with the new photos; a crop that its person has already is left out; it and the count."""
    names, person_R, pixels_R = [], np.empty(0, np.int32), np.empty(0, np.uint64)
    if before is not None:
        names, person_R, pixels_R = list(before.names), before.person_R, before.pixels_R
    number = {name: person for person, name in enumerate(names)}
    num_before = len(person_R)
    there = dict.fromkeys(zip(person_R.tolist(), pixels_R.tolist(), strict=True))
    for i, name in enumerate(photos.name_N):
        there.setdefault((number.setdefault(name, len(number)), int(pixels_N[i])), i)
    new = [(person, i) for (person, _), i in there.items() if i is not None]
    chosen_n = np.array([i for _, i in new], np.int64)

    def rows(position_B: np.ndarray) -> np.ndarray:
        block = np.empty((len(position_B), raw_ND.shape[1]), np.float32)
        old = position_B < num_before
        if old.any():
            block[old] = before.embedding_RD[position_B[old]]
        new = chosen_n[position_B[~old] - num_before]
        block[~old] = unit_float32(raw_ND[new], lambda k: photos.described(int(new[k])))
        return block

    person_R = np.concatenate([person_R, np.array([person for person, _ in new], np.int32)])
    pixels_R = np.concatenate([pixels_R, pixels_N[chosen_n]])
    return write_gallery(path, about, list(number), person_R, pixels_R, rows, np.asarray(stranger_ID)), len(new)


def chosen_precision(precision: str, gallery: Gallery | None) -> str:
    """``precision``, where ``auto`` is that of a gallery which exists: a photo alone could not be checked."""
    if precision != "auto" or gallery is None:
        return precision
    return precision_of(gallery.about.identity)


def check_model(gallery: Gallery, embedder: Embedder, model: str | Path) -> None:
    """Refuse embeddings of other weights or of another precision."""
    enrolled, given = (precision_of(identity) for identity in (gallery.about.identity, embedder.identity))
    problem = ""
    if enrolled != given:
        problem = f"enrolled in {enrolled}, this would be {given}; use --precision {enrolled}"
    elif embedder.identity != gallery.about.identity or embedder.embedding_size != gallery.embedding_RD.shape[1]:
        weights = f"other weights ({gallery.about.identity[:12]} of {gallery.about.model})"
        problem = f"enrolled with {weights} than those of {model} ({embedder.identity[:12]}); use that --model"
    if problem:
        raise UserError(f"{gallery.path}: {problem}, or enrol again into another file")


def find(args: argparse.Namespace) -> None:
    """Rank the people of a gallery for each face of a photo; a face below the threshold is nobody's."""
    gallery = Gallery(args.gallery)
    model = args.model or gallery.about.model
    if args.model is None and not Path(model).exists():
        raise UserError(f"{args.gallery}: its model {model} is not there; name it: --model RUN_OR_WEIGHTS")
    limit = chosen_threshold(gallery, args)
    precision = chosen_precision(args.precision, gallery)
    embedder = load_embedder(model, args.network, args.engine, precision=precision)
    check_model(gallery, embedder, model)
    searcher = choose_search(gallery, args)
    crops, boxes = faces_of(args.photo, embedder.input_size, args, gallery.about.detector)
    query_QD = unit_float32(embedder(crops) + embedder(crops, flip=True), lambda i: f"{args.photo}: face {i + 1}")
    answers = searcher.search(query_QD, args.top)
    found = []
    for face, (box, matches) in enumerate(zip(boxes, answers, strict=True)):
        known = bool(matches and matches[0].cos > limit.value)
        answer = {"matches": [asdict(match) for match in matches], "known": known}
        found.append({"face": face, "box": [round(value, 1) for value in box], **answer})
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, found)
    for face in found:
        tell_face(face, answers[face["face"]])
    as_given = f"threshold {limit.value:.4f} as given; its false-accept rate is not known"
    print(limit if limit.strangers else as_given)
    if isinstance(searcher, ApproximateSearch):
        asked, recall = searcher.about["asked"], searcher.about["recall"]
        print(f"searched by index: of {asked} photos asked when it was built it found the nearest of {recall:.4f}")


def tell_face(face: dict, matches: list[Match]) -> None:
    """One face's answer."""
    box = ", ".join(f"{value:.0f}" for value in face["box"])
    answer = matches[0].name if face["known"] else "nobody in the gallery"
    print(f"face {face['face']} at ({box}): {answer}")
    for rank, match in enumerate(matches, 1):
        print(f"  {rank}. {match.cos:.4f} {match.name}")


def chosen_threshold(gallery: Gallery, args: argparse.Namespace) -> Threshold:
    """``--threshold`` with its measured rate, else that of ``--far``."""
    if args.threshold is not None:
        if not -1 <= args.threshold <= 1:
            raise UserError(f"--threshold {args.threshold}: a cosine lies in -1 ... 1")
        count = len(gallery.impostor_P)
        rate = float(np.mean(gallery.impostor_P > args.threshold)) if count else 0.0
        return Threshold(args.threshold, rate, count)
    limit = gallery.threshold(args.far)
    if limit is None:
        remedy = "enrol others, enrol again with --impostors, or give --threshold"
        raise UserError(f"{gallery.path}: one person alone, so no threshold could be measured; {remedy}")
    return limit


def choose_search(gallery: Gallery, args: argparse.Namespace):
    """Exact up to ``--exact-rows``, by the index above, unless ``--index`` says which."""
    approximate = args.index == "faiss" or (args.index == "auto" and len(gallery) > args.exact_rows)
    return ApproximateSearch(gallery) if approximate else gallery


def faces_of(
    path: Path, size: int, args: argparse.Namespace, of_gallery: str | None
) -> tuple[np.ndarray, list[tuple[float, float, float, float]]]:
    """(crops [Q, size, size, 3], boxes): every face that the detector finds, or the whole photo as one crop."""
    detector = of_gallery if args.detector is None else args.detector
    if not path.is_file():
        raise UserError(f"{path}: no such photo")
    if detector in (None, "none"):
        crops = AlignedFaces([Face(path)], size, resize=args.resize)[0][None]
        height, width = read_photo(path).shape[:2]
        return crops, [(0.0, 0.0, float(width), float(height))]
    found: list[DetectedFace] = build_detector(detector, args.min_score)(read_photo(path))
    if not found:
        raise UserError(f"{path}: no face found; lower --min-score, or give --detector none for an aligned crop")
    aligned = AlignedFaces([Face(path, face.landmark_52, face.score) for face in found], size)
    return np.stack([aligned[i] for i in range(len(found))]), [face.box for face in found]


def tell_threshold(gallery: Gallery, far: float) -> None:
    """What was measured, and on whom."""
    limit = gallery.threshold(far)
    if limit is None:
        problem = "one person alone: no threshold can be measured"
        print(f"{gallery.path}: {problem}; enrol others, or give --impostors", file=sys.stderr)
        return
    whom = gallery.about.strangers or f"photos of these {len(gallery.names)} people, each without its own person"
    print(f"{limit}: {whom}")
    if far and far * limit.strangers < 1:
        print(f"{limit.strangers} searches cannot show a rate of {far:g}; the threshold is the highest score of all")


def index(args: argparse.Namespace) -> None:
    """Build the index of a large gallery (``enrol`` does it by itself above ``--exact-rows``)."""
    about = build_index(Gallery(args.gallery))
    print(f"{index_path(args.gallery)}: {about['rows']} photos in {about['lists']} lists, {about['probed']} searched")
    found = f"the nearest found for {about['recall']:.4f}, {about['recall_10']:.4f} of the ten nearest"
    print(f"beside the exact search, on {about['asked']} photos: {found}")


def info(args: argparse.Namespace) -> None:
    """What a gallery holds and what it was made with."""
    gallery = Gallery(args.gallery)
    size = gallery.embedding_RD.shape[1]
    print(f"{args.gallery}: {len(gallery)} photos of {len(gallery.names)} people, {size} numbers each")
    print(f"model {gallery.about.model} ({gallery.about.identity[:12]})")
    print(f"alignment {gallery.about.alignment}, detector {gallery.about.detector or 'none: aligned crops'}")
    for far in (0.1, 0.01, 0.001):
        limit = gallery.threshold(far)
        if limit is not None:
            print(f"at most {far:g}: {limit}")
    if args.people:
        count = np.bincount(gallery.person_R, minlength=len(gallery.names))
        for name, photos in zip(gallery.names, count.tolist(), strict=True):
            print(f"{photos}\t{name}")


def build_parser() -> argparse.ArgumentParser:
    """Commands and options."""
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function: Callable, *arguments: str, photo_options: bool = True) -> argparse.ArgumentParser:
        text = " ".join((function.__doc__ or "").split())
        sub = commands.add_parser(function.__name__, help=text, description=text)
        sub.set_defaults(run=function)
        for argument in arguments:
            sub.add_argument(argument, type=Path)
        if photo_options:
            sub.add_argument("--network", help="backbone name, where the model does not say it")
            sub.add_argument("--detector", help="mtcnn, a YuNet .onnx file, or none (default: the gallery's)")
            sub.add_argument("--min-score", type=float, help="least detector score (default: the detector's own)")
            sub.add_argument("--resize", action="store_true", help="resize crops of another size")
            add_engine_options(sub)
            add_device_option(sub)
            rate, exact = "false-accept rate aimed at", "photos up to which search is exact"
            sub.add_argument("--far", type=float, default=0.01, help=f"{rate} (default: %(default)s)")
            sub.add_argument("--exact-rows", type=int, default=EXACT_ROWS, help=f"{exact} (default: %(default)s)")
        return sub

    sub = command(enrol, "source", "gallery")
    sub.add_argument("--model", help="run directory, weights file or .onnx (default: that of the gallery)")
    sub.add_argument("--name", help="all photos are this person's")
    sub.add_argument("--names", type=Path, help="names of a data set's labels, one a line, label 0 first")
    sub.add_argument("--impostors", type=Path, help="photos of people who are not in the gallery, to measure on")
    sub.add_argument("--prefix", default="train", help="name of a record set's files without suffix")
    sub.add_argument("--batch-size", type=int, default=64)
    sub = command(find, "photo", "gallery")
    sub.add_argument("--model", help="run directory, weights file or .onnx (default: the gallery's)")
    sub.add_argument("--top", type=int, default=5, help="names shown (default: %(default)s)")
    sub.add_argument("--json", type=Path, help="write the answers there")
    sub.add_argument("--threshold", type=float, help="cosine above which a face is known (default: measured, --far)")
    sub.add_argument("--index", default="auto", choices=("auto", "exact", "faiss"))
    command(index, "gallery", photo_options=False)
    command(info, "gallery", photo_options=False).add_argument("--people", action="store_true", help="list them")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if not 0 <= vars(args).get("far", 0) < 1:
        raise UserError(f"--far {args.far}: must be at least 0 and below 1")
    check_ranges(args, top=POSITIVE, batch_size=POSITIVE, exact_rows=COUNT, min_score=(0, 1))
    if "device" in vars(args):
        distributed.init(args.device)
    args.run(args)


if __name__ == "__main__":
    main()
