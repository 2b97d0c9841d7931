"""What a network is given: layout, type and range of its pixels, as our backbones have it or as an ``.onnx`` file asks.

Shapes: B images of a batch, H = W input size in pixels, C channels.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.weights.onnx_walk import Graph

RANGES = {"signed": (-1.0, 1.0), "unit": (0.0, 1.0), "raw": (0.0, 255.0)}  # what pixels 0 and 255 become
# On the way to the arithmetic that tells the range; quantised pixels are the same pixels.
PASSED_OVER = ("Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear", "Transpose")


@dataclass(frozen=True)
class NetworkInput:
    """The input of a network. The defaults are those of our backbones.

    Attributes:
        size: H = W in pixels.
        channels: 3 (RGB), or 1 (the luma of the RGB that users give).
        pixels: a key of ``RANGES``.
        dtype: ``float32``, ``float16``, ``float64`` or ``uint8``.
        channels_last: [B, H, W, C], not [B, C, H, W].
        batch: the batch size the network insists on, None if any.
    """

    size: int = 112
    channels: int = 3
    pixels: str = "signed"
    dtype: str = "float32"
    channels_last: bool = False
    batch: int | None = None

    @property
    def scale_shift(self) -> tuple[float, float]:
        """(k, b): the network is given ``k * pixel + b``."""
        low, high = RANGES[self.pixels]
        return (high - low) / 255, low

    def channels_of(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] as it is, or its luma [B, H, W, 1]."""
        if self.channels == 3:
            return image_BHWC
        return np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] for image in image_BHWC])

    def prepare(self, image_BHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] -> what the network takes, contiguous."""
        image_BHWC = self.channels_of(image_BHWC)
        image = image_BHWC if self.channels_last else image_BHWC.transpose(0, 3, 1, 2)
        if self.pixels == "raw":
            return np.ascontiguousarray(image, self.dtype)
        scale, shift = self.scale_shift
        image = np.ascontiguousarray(image, np.float32)
        image /= 1 / scale
        image += shift
        return image.astype(self.dtype, copy=False)

    def from_signed(self, image_BCHW: np.ndarray) -> np.ndarray:
        """float [B, C, H, W] in [-1, 1] -> what the network takes."""
        low, high = RANGES[self.pixels]
        image = image_BCHW if self.pixels == "signed" else (image_BCHW + 1) * ((high - low) / 2) + low
        image = np.rint(image) if self.dtype == "uint8" else image
        return np.ascontiguousarray(image.transpose(0, 2, 3, 1) if self.channels_last else image, self.dtype)


def read_onnx_input(path: str | Path) -> NetworkInput:
    """What the network in an ``.onnx`` file takes; needs the package ``onnx``.

    The range of the pixels is told by the arithmetic at the start of the graph, if there is any: ``(x - 127.5) / 128``
    is meant for 0 ... 255, ``(x - 0.5) / 0.5`` for 0 ... 1. Without it, uint8 means 0 ... 255 and floats [-1, 1].

    Raises:
        UserError: no image input of one or three channels, not square, of another type, or arithmetic on the pixels
            that fits no known range.
    """
    from onnx import TensorProto

    graph = Graph(path)
    sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in graph.input_type.shape.dim]
    shown = [size or "?" for size in sizes]
    if len(sizes) != 4:
        raise UserError(f"{path}: its input is {shown}; a batch of images with four axes is needed")
    channels_last = sizes[3] in (1, 3) and sizes[1] not in (1, 3)
    batch, channels, height, width = (sizes[i] for i in (0, 3, 1, 2)) if channels_last else sizes
    if height != width:
        raise UserError(f"{path}: its input is {shown}; square images are needed")
    name = TensorProto.DataType.Name(graph.input_type.elem_type)
    dtype = {"FLOAT": "float32", "FLOAT16": "float16", "DOUBLE": "float64", "UINT8": "uint8"}.get(name)
    if dtype is None:
        raise UserError(f"{path}: its input is of type {name}; float32, float16, float64 or uint8 is needed")
    pixels = _pixel_range(graph, "raw" if dtype == "uint8" else "signed")
    return NetworkInput(height or 112, channels or 3, pixels, dtype, channels_last, batch)


def embedding_output(path: str | Path, shapes: list[list[int | None]]) -> int:
    """Which of a network's outputs holds the embeddings: the only one, or the only one of shape [B, D] or [B, D, 1, 1].

    Raises:
        UserError: none or several of them have that shape.
    """
    fitting = [i for i, shape in enumerate(shapes) if len(shape) >= 2 and all(side == 1 for side in shape[2:])]
    if len(shapes) > 1 and len(fitting) != 1:
        raise UserError(f"{path}: its outputs are {shapes}; exactly one of shape [batch, size] is needed")
    return fitting[0] if len(shapes) > 1 else 0


def embedding_rows(array: np.ndarray, num_images: int, path: str | Path) -> np.ndarray:
    """An output [B, D] or [B, D, 1, 1] as float32 [B, D].

    Raises:
        UserError: it has another shape.
    """
    if array.ndim < 2 or array.shape[0] != num_images or array[0, ...].size != array.shape[1] or array.shape[1] < 2:
        raise UserError(f"{path}: its output for {num_images} images is {list(array.shape)}, no embedding of each")
    return array.reshape(num_images, -1).astype(np.float32, copy=False)


def _pixel_range(graph: Graph, otherwise: str) -> str:
    """The range for which the arithmetic at the start of the graph gives values around zero, of ordinary size."""
    scale, shift = 1.0, 0.0  # k and b of the k x + b that is computed so far, means over channels
    value, found = graph.input, False
    while len(users := graph.users.get(value, [])) == 1:
        (node,) = users
        constant = next((graph.constants[name] for name in node.input if name in graph.constants), None)
        if node.op_type in ("Add", "Div", "Mul", "Sub") and constant is not None and node.input[0] == value:
            number, found = float(np.mean(constant, dtype=np.float64)), True
            if node.op_type in ("Mul", "Div"):
                number = number if node.op_type == "Mul" else 1 / number
                scale, shift = scale * number, shift * number
            else:
                shift += number if node.op_type == "Add" else -number
        elif node.op_type not in PASSED_OVER:
            break
        value = node.output[0]
    if not found:
        return otherwise
    asymmetry = {}
    for name, (low, high) in RANGES.items():
        ends = scale * low + shift, scale * high + shift
        if 0.4 < max(map(abs, ends)) < 150:
            asymmetry[name] = abs(sum(ends)) / abs(ends[1] - ends[0])
    if not asymmetry:
        begin = f"its graph begins with {scale:.4g} * pixel + {shift:.4g}"
        raise UserError(f"{graph.path}: {begin}, which fits neither pixels of 0 ... 255, nor 0 ... 1, nor -1 ... 1")
    return min(asymmetry, key=asymmetry.get)
