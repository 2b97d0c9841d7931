"""Photos to aligned faces: image files in a folder, landmark lists, a face detector.

Images are uint8 RGB [H, W, 3]; landmarks float64 [5, 2], (x, y) in pixels: eyes, nose tip, mouth corners, left to right
as the viewer sees them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.photos.align import align_face

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Face:
    """One face to embed: the photo, and the landmarks if it has to be aligned (None: the photo is the aligned crop)."""

    path: Path
    landmark_52: np.ndarray | None = None
    score: float = 1.0


def read_image(path: str | Path, rotate: bool = False) -> np.ndarray:
    """uint8 RGB [H, W, 3] of an image file; ``rotate`` obeys its EXIF rotation (photos), else pixels as stored (crops).

    Raises:
        UserError: not an image that can be decoded.
    """
    data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    flags = cv2.IMREAD_COLOR if rotate else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(data, flags) if data.size else None
    if image is None:
        raise UserError(f"{path}: not an image that can be decoded ({data.size} bytes)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def find_images(source: Path) -> list[Path]:
    """The image files under a folder, sorted; a file stands for itself."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{source}: no images there ({', '.join(IMAGE_SUFFIXES)})")
    return found


def read_landmarks(path: Path, folder: Path) -> list[Face]:
    """Faces of a list with one line each: name relative to ``folder``, then x1 y1 ... x5 y5, spaces or commas between.

    Names may hold spaces where commas separate. A header line and empty lines are passed over; what follows the ten
    numbers (a detector's score) is ignored.
    """
    faces = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, *fields = [part.strip() for part in line.split(",")] if "," in line else line.split() or [""]
        if not name:
            continue
        try:
            values = [float(field) for field in fields[:10]]
        except ValueError:
            if number == 1:
                continue  # a header
            raise UserError(f"{path}:{number}: {line[:60]!r}: ten numbers expected after the name") from None
        if len(values) != 10 or not np.isfinite(values).all():
            raise UserError(f"{path}:{number}: {len(values)} finite numbers after {name!r}; x1 y1 ... x5 y5 expected")
        if not (folder / name).is_file():
            raise UserError(f"{path}:{number}: {folder / name}: no such image")
        faces.append(Face(folder / name, np.array(values).reshape(5, 2)))
    if not faces:
        raise UserError(f"{path}: no landmarks in it")
    return faces


def load_detector(path: Path, min_score: float = 0.8) -> Callable[[np.ndarray], list[tuple[np.ndarray, float, float]]]:
    """OpenCV's ``FaceDetectorYN`` on the user's YuNet file.

    Returns:
        RGB image -> a list of (landmarks [5, 2], score, area of the box), best score first.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such detector; it is OpenCV's YuNet .onnx file, from the OpenCV model zoo")
    try:
        detector = cv2.FaceDetectorYN.create(str(path), "", (320, 320), min_score)
    except cv2.error as error:
        raise UserError(f"{path}: OpenCV cannot load it as a YuNet detector ({error.err})") from None

    def detect(image: np.ndarray) -> list[tuple[np.ndarray, float, float]]:
        detector.setInputSize((image.shape[1], image.shape[0]))
        try:
            _, rows = detector.detect(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        except cv2.error as error:
            raise UserError(f"{path}: OpenCV cannot run it as a YuNet detector ({error.err})") from None
        rows = np.zeros((0, 15)) if rows is None else np.asarray(rows, np.float64)
        # A row: box x y w h, then right eye, left eye, nose, right and left mouth corner OF THE PERSON, then the score:
        # the person's right is the viewer's left, which is the order of the alignment template.
        faces = [(row[4:14].reshape(5, 2), float(row[14]), float(row[2] * row[3])) for row in rows]
        return sorted(faces, key=lambda face: -face[1])

    return detect


def detect_faces(paths: list[Path], detect: Callable, every: bool) -> tuple[list[Face], list[Path]]:
    """(faces, photos without one): every face of a photo, or the largest one."""
    faces, empty = [], []
    for path in paths:
        found = detect(read_image(path, rotate=True))
        if not found:
            empty.append(path)
        chosen = found if every else sorted(found, key=lambda face: -face[2])[:1]
        faces += [Face(path, landmark_52, score) for landmark_52, score, _ in chosen]
    return faces, empty


class AlignedFaces:
    """A sequence of aligned crops, read when asked for: ``len`` and ``[i]`` -> uint8 RGB [size, size, 3]."""

    def __init__(self, faces: list[Face], size: int, rotate: bool = False, resize: bool = False):
        self.faces, self.size, self.rotate, self.resize = faces, size, rotate, resize

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> np.ndarray:
        face = self.faces[index]
        image = read_image(face.path, self.rotate)
        if face.landmark_52 is not None:
            return align_face(image, face.landmark_52, self.size)
        if image.shape[:2] != (self.size, self.size):
            if not self.resize:
                raise UserError(
                    f"{face.path}: {image.shape[1]}x{image.shape[0]} pixels, the network takes aligned {self.size}x"
                    f"{self.size} crops; give --landmarks or --detector, or --resize for crops of another size"
                )
            image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return image
