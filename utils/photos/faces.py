"""Photos to aligned faces: image files in a folder, landmark lists, a face detector.

Images are uint8 RGB [H, W, 3]; landmarks float64 [5, 2], (x, y) in pixels: eyes, nose tip, mouth corners, left to right
as the viewer sees them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.decode import read_image
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, find_image_files
from utils.photos.align import align_face, lies_outside
from utils.photos.detect import Detector, choose_faces
from utils.photos.landmarks import read_landmark_list
from utils.photos.photo import read_photo
from utils.progress import progress
from utils.system import num_cores

CROP_SIZE = (112, 112)  # of aligned faces everywhere


@dataclass(frozen=True)
class Face:
    """One face to embed: the photo, and the landmarks if it has to be aligned (None: the photo is the aligned crop)."""

    path: Path
    landmark_52: np.ndarray | None = None
    score: float = 1.0


def find_images(source: Path) -> list[Path]:
    """The image files under a folder, sorted; a file stands for itself."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_file():
        return [source]
    found = find_image_files(source).paths()
    if not found:
        raise UserError(f"{source}: no images there ({', '.join(IMAGE_SUFFIXES)})")
    return found


def read_landmarks(path: Path, folder: Path) -> list[Face]:
    """Faces of a landmark list (``utils.photos.landmarks`` says which formats); names are relative to ``folder``."""
    faces = []
    for name, found in read_landmark_list(path).items():
        if not (folder / name).is_file():
            raise UserError(f"{path}: {folder / name}: no such image")
        faces += [Face(folder / name, face.landmark_52, face.score) for face in found]
    return faces


def detect_faces(paths: list[Path], detect: Detector, every: bool) -> tuple[list[Face], list[Path]]:
    """(faces, photos without one): every face of a photo, or the largest one."""

    def look(path: Path) -> list[Face]:
        photo = read_photo(path)
        found = choose_faces(detect(photo), "all" if every else "largest", photo.shape)
        return [Face(path, face.landmark_52, face.score) for face in found]

    with ThreadPoolExecutor(num_cores()) as pool:
        results = list(progress(pool.map(look, paths), len(paths), "detecting"))
    faces = [face for found in results for face in found]
    return faces, [path for path, found in zip(paths, results, strict=True) if not found]


def align_largest(photo: np.ndarray, detect: Detector, size: int, name: str) -> np.ndarray:
    """The largest face of a photo as a crop, uint8 RGB [size, size, 3]; ``name`` is for the message.

    Raises:
        UserError: no face found.
    """
    found = choose_faces(detect(photo), "largest", photo.shape)
    if not found:
        raise UserError(f"{name}: no face found in {photo.shape[1]}x{photo.shape[0]} pixels")
    return align_face(photo, found[0].landmark_52, size)


class AlignedFaces:
    """A sequence of aligned crops, read when asked for: ``len`` and ``[i]`` -> uint8 RGB [size, size, 3].

    What has landmarks is a photo and turned upright first; what has none is a crop, taken as it is stored. Crops of the
    usual 112 x 112 are scaled for a network of another size; others only with ``resize``, since they may be photos.
    ``outside`` collects the numbers of faces that were read and have a landmark outside of their photo.
    """

    def __init__(self, faces: list[Face], size: int, resize: bool = False):
        self.faces, self.size, self.resize = faces, size, resize
        self.outside: set[int] = set()

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> np.ndarray:
        face = self.faces[index]
        if face.landmark_52 is not None:
            photo = read_photo(face.path)
            if lies_outside(face.landmark_52, photo.shape):
                self.outside.add(index)
            try:
                return align_face(photo, face.landmark_52, self.size)
            except ValueError as error:
                raise UserError(f"{face.path}: {error}") from None
        image = read_image(face.path)
        if image.shape[:2] != (self.size, self.size):
            if not self.resize and image.shape[:2] != CROP_SIZE:
                raise UserError(
                    f"{face.path}: {image.shape[1]}x{image.shape[0]} pixels, the network takes aligned {self.size}x"
                    f"{self.size} crops; give --landmarks or --detector, or --resize for crops of another size"
                )
            image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return image
