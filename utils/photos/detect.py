"""Face detectors behind one function: an image in, its faces with five landmarks out.

    detect = build_detector("mtcnn")                      # or "face_detection_yunet_2023mar.onnx"
    faces = detect(read_photo("photo.jpg"))               # best score first

A detector sees the photo at a size that suits it: a huge one is shrunk, a tiny one enlarged, and what it finds is given
in pixels of the photo itself.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.photos.mtcnn import OUTPUT_SCORE, Mtcnn

Detector = Callable[[np.ndarray], list["DetectedFace"]]
LARGEST_SIDE = 1600  # a longer photo is shrunk to this for detection alone
CHOICES = ("largest", "central", "all")


@dataclass(frozen=True)
class DetectedFace:
    """A face in pixels of the upright photo."""

    landmark_52: np.ndarray  # float64, (x, y): eyes, nose tip, mouth corners, left to right as the viewer sees them
    score: float  # the detector's, 0 ... 1
    box: tuple[float, float, float, float]  # (left, top, right, bottom); parts of it may lie outside the photo

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
        return _of_photos(Mtcnn(min_score=OUTPUT_SCORE if min_score is None else min_score))
    if not Path(name).is_file():
        known = "it is mtcnn, or OpenCV's YuNet .onnx file, from the OpenCV model zoo"
        raise UserError(f"{name}: no such detector; {known}")
    return _of_photos(_yunet(Path(name), 0.8 if min_score is None else min_score))


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


def _of_photos(find: Callable[[np.ndarray], tuple]) -> Detector:
    """A detector of photos from one that finds (boxes [N, 4], landmarks [N, 5, 2], scores [N]) in smaller ones."""

    def detect(image: np.ndarray) -> list[DetectedFace]:
        height, width = image.shape[:2]
        scale = min(1.0, LARGEST_SIDE / max(height, width))
        small = image
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ratio_2 = np.array([width / small.shape[1], height / small.shape[0]])
        box_N4, landmark_N52, score_N = find(small)
        box_N4 = (np.reshape(box_N4, (-1, 2, 2)) * ratio_2).reshape(-1, 4)
        landmark_N52 = (landmark_N52 + 0.5) * ratio_2 - 0.5  # centres of pixels are at whole numbers in both
        return [
            DetectedFace(landmark_N52[i], float(score_N[i]), tuple(box_N4[i].tolist()))
            for i in np.argsort(-score_N, kind="stable")
        ]

    return detect


def _yunet(path: Path, min_score: float) -> Callable[[np.ndarray], tuple]:
    """OpenCV's ``FaceDetectorYN``; it holds the image it works on, so that each thread needs its own."""
    own = threading.local()

    def network() -> cv2.FaceDetectorYN:
        if not hasattr(own, "network"):
            own.network = cv2.FaceDetectorYN.create(str(path), "", (320, 320), min_score)
        return own.network

    def find(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with _told_as_yunet(path, "run"):
            network().setInputSize((image.shape[1], image.shape[0]))
            _, rows = network().detect(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        # A row: box x y w h, then right eye, left eye, nose, right and left mouth corner OF THE PERSON, then the score:
        # the person's right is the viewer's left, which is the order of the alignment template.
        row_N15 = np.zeros((0, 15)) if rows is None else np.asarray(rows, np.float64)
        corner_N2 = row_N15[:, :2]
        box_N4 = np.hstack([corner_N2, corner_N2 + row_N15[:, 2:4]])
        return box_N4, row_N15[:, 4:14].reshape(-1, 5, 2), row_N15[:, 14]

    with _told_as_yunet(path, "load"):
        network()
    return find


@contextlib.contextmanager
def _told_as_yunet(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except cv2.error as error:
        raise UserError(f"{path}: OpenCV cannot {what} it as a YuNet detector ({error.err})") from None
