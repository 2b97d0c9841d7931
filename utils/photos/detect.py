"""Face detectors behind one function: an image in, its faces with five landmarks out.

    detect = build_detector("mtcnn")                      # or "face_detection_yunet_2023mar.onnx"
    faces = detect(read_photo("photo.jpg"))               # best score first

A detector sees the photo at a size that suits it: a huge one is shrunk, a tiny one enlarged, and what it finds is given
in pixels of the photo itself.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.photos.mtcnn import OUTPUT_SCORE, Mtcnn

Detector = Callable[[np.ndarray], list["DetectedFace"]]
LARGEST_SIDE = 1600  # a longer photo is shrunk to this for detection alone
NAMES = ("mtcnn",)
CHOICES = ("largest", "central", "all")


@dataclass(frozen=True)
class DetectedFace:
    """A face in pixels of the upright photo.

    Attributes:
        landmark_52: float64 [5, 2], (x, y): eyes, nose tip, mouth corners, left to right as the viewer sees them.
        score: the detector's, 0 ... 1.
        box: (left, top, right, bottom); parts of it may lie outside the photo.
    """

    landmark_52: np.ndarray
    score: float
    box: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def build_detector(name: str | Path, min_score: float | None = None) -> Detector:
    """The detector ``mtcnn``, or OpenCV's ``FaceDetectorYN`` on the user's YuNet file.

    Args:
        name: ``mtcnn`` or the path of a YuNet ``.onnx``.
        min_score: least score of a face; None: the detector's own default (0.7 for MTCNN, 0.8 for YuNet).

    Returns:
        uint8 RGB [H, W, 3] -> faces, best score first. Threads may share it.

    Raises:
        UserError: no such detector, a file that is not one, a missing package, a score outside 0 ... 1.
    """
    if min_score is not None and not 0 <= min_score <= 1:
        raise UserError(f"--min-score {min_score}: a detector's score lies in 0 ... 1")
    if str(name) == "mtcnn":
        return _Mtcnn(OUTPUT_SCORE if min_score is None else min_score)
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{path}: no such detector; it is {' or '.join(NAMES)}, or OpenCV's YuNet .onnx file, from the "
                        "OpenCV model zoo")  # fmt: skip
    return _shared_by_threads(lambda: _Yunet(path, 0.8 if min_score is None else min_score))


def _shared_by_threads(make: Callable[[], Detector]) -> Detector:
    """OpenCV's networks hold the image they work on, so that each thread needs its own; the first is made at once."""
    own = threading.local()
    own.detect = make()

    def detect(image: np.ndarray) -> list[DetectedFace]:
        if not hasattr(own, "detect"):
            own.detect = make()
        return sorted(own.detect(image), key=lambda face: -face.score)

    return detect


def choose_faces(found: list[DetectedFace], which: str, image_shape: tuple[int, ...]) -> list[DetectedFace]:
    """The faces of one photo that are wanted.

    Args:
        found: what the detector found.
        which: ``largest`` (area of the box), ``central`` (its centre closest to the photo's) or ``all`` (best first).
        image_shape: shape of the photo, [H, W, ...].

    Raises:
        UserError: another word.
    """
    if which not in CHOICES:
        raise UserError(f"faces {which!r}: choose {', '.join(CHOICES)}")
    if which == "all" or not found:
        return list(found)
    if which == "largest":
        return [max(found, key=lambda face: face.area)]
    centre = complex(image_shape[1] / 2, image_shape[0] / 2)
    return [min(found, key=lambda face: abs(complex(*face.centre) - centre))]


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """The image at ``scale`` times its size, at least one pixel, averaged over areas where it shrinks."""
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


class PointsBack:
    """Points of a resized image to points of the image itself; centres of pixels are at whole numbers in both."""

    def __init__(self, image: np.ndarray, resized: np.ndarray):
        self.ratio_2 = np.array([image.shape[1] / resized.shape[1], image.shape[0] / resized.shape[0]])

    def __call__(self, point_K2: np.ndarray) -> np.ndarray:
        return (np.asarray(point_K2, np.float64) + 0.5) * self.ratio_2 - 0.5

    def box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """The same for a box: its edges."""
        return tuple(float(value) for value in (np.reshape(box, (2, 2)) * self.ratio_2).ravel())


def _shrunk(image: np.ndarray) -> np.ndarray:
    return scaled(image, min(1.0, LARGEST_SIDE / max(image.shape[:2])))


class _Mtcnn:
    """``utils.photos.mtcnn`` at the size of detection; its networks are shared by threads."""

    def __init__(self, min_score: float):
        self.network = Mtcnn(min_score=min_score)

    def __call__(self, image: np.ndarray) -> list[DetectedFace]:
        small = _shrunk(image)
        back = PointsBack(image, small)
        return [
            DetectedFace(back(landmark_52), float(score), back.box(box))
            for box, landmark_52, score in zip(*self.network(small), strict=True)
        ]


class _Yunet:
    """``FaceDetectorYN`` of one thread."""

    def __init__(self, path: Path, min_score: float):
        self.path = path
        try:
            self.network = cv2.FaceDetectorYN.create(str(path), "", (320, 320), min_score)
        except cv2.error as error:
            raise UserError(f"{path}: OpenCV cannot load it as a YuNet detector ({error.err})") from None

    def __call__(self, image: np.ndarray) -> list[DetectedFace]:
        small = _shrunk(image)
        back = PointsBack(image, small)
        self.network.setInputSize((small.shape[1], small.shape[0]))
        try:
            _, rows = self.network.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        except cv2.error as error:
            raise UserError(f"{self.path}: OpenCV cannot run it as a YuNet detector ({error.err})") from None
        rows = np.zeros((0, 15)) if rows is None else np.asarray(rows, np.float64)
        # A row: box x y w h, then right eye, left eye, nose, right and left mouth corner OF THE PERSON, then the score:
        # the person's right is the viewer's left, which is the order of the alignment template.
        return [
            DetectedFace(back(row[4:14].reshape(5, 2)), float(row[14]), back.box((*row[:2], *(row[:2] + row[2:4]))))
            for row in rows
        ]
