"""The backbones in float64 numpy, straight from named weights: what a conversion is checked against.

Nothing here goes through Paddle or through the code that maps names, so an error there shows as a difference. Weights
may be spelled as PyTorch's or as Paddle's. Evaluation mode only; a few seconds for the largest network.

Legend: B batch, C channels, H W map, F flattened features, T tokens, D embedding size.
"""

import re

import numpy as np

EPSILON = 1e-5


class Weights:
    """Named arrays with the two spellings hidden."""

    def __init__(self, state: dict[str, np.ndarray], from_torch: bool):
        self.state, self.from_torch = state, from_torch

    def get(self, name: str) -> np.ndarray:
        """The array called ``name``, float64; the ancestor's ``._weight`` counts as ``.weight``."""
        if name not in self.state and name.endswith(".weight"):
            name = name.removesuffix("weight") + "_weight"
        return self.state[name].astype(np.float64)

    def has(self, name: str) -> bool:
        """True if any array's name starts with ``name``."""
        return any(key.startswith(name) for key in self.state)

    def count(self, prefix: str) -> int:
        """Number of parts ``prefix``0, ``prefix``1, ..."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({match[1] for name in self.state if (match := pattern.match(name))})

    def batch_norm(self, name: str, x: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
        """(x - mean) / sqrt(variance + epsilon) * weight + bias over axis 1."""
        mean, variance = ("running_mean", "running_var") if self.from_torch else ("_mean", "_variance")
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = self.get(f"{name}.weight") / np.sqrt(self.get(f"{name}.{variance}") + epsilon)
        shift = self.get(f"{name}.bias") - self.get(f"{name}.{mean}") * scale
        return x * scale.reshape(shape) + shift.reshape(shape)

    def prelu(self, name: str, x: np.ndarray) -> np.ndarray:
        """max(x, 0) + weight * min(x, 0)."""
        return np.maximum(x, 0) + self.get(f"{name}.weight").reshape(1, -1, 1, 1) * np.minimum(x, 0)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """x W^T + bias, W [out, in]."""
        weight = self.get(f"{name}.weight")
        out = x @ (weight.T if self.from_torch else weight)
        return out + self.get(f"{name}.bias") if f"{name}.bias" in self.state else out

    def conv(self, name: str, x: np.ndarray, stride: int = 1, padding: int | None = None) -> np.ndarray:
        """Cross-correlation, [B, C, H, W] -> [B, O, H', W']; groups follow from the shapes; zero padding."""
        weight = self.get(f"{name}.weight")
        num_out, group_in, kernel, _ = weight.shape
        num_images, num_in = x.shape[:2]
        padding = (kernel - 1) // 2 if padding is None else padding
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        side = (x.shape[2] - kernel) // stride + 1
        groups = num_in // group_in
        weight = weight.reshape(groups, num_out // groups, group_in, kernel, kernel)
        weight = np.ascontiguousarray(weight.transpose(3, 4, 0, 1, 2))
        out = np.zeros((num_images, groups, num_out // groups, side * side))
        for row in range(kernel):
            for column in range(kernel):
                stop = stride * (side - 1) + 1
                part = x[:, :, row : row + stop : stride, column : column + stop : stride]
                out += weight[row, column] @ part.reshape(num_images, groups, group_in, -1)
        return out.reshape(num_images, num_out, side, side)


def reference_embedding(state: dict[str, np.ndarray], from_torch: bool, image_BCHW: np.ndarray) -> np.ndarray | None:
    """Raw embedding [B, D] of images in [-1, 1], or None for a family that is not written down here."""
    weights = Weights(state, from_torch)
    x = image_BCHW.astype(np.float64)
    if weights.has("layer1.0.bn1.") and weights.has("features."):
        return _iresnet(weights, x)
    if weights.has("conv_sep."):
        return _mobilefacenet(weights, x)
    return None


def _iresnet(w: Weights, x: np.ndarray) -> np.ndarray:
    x = w.prelu("prelu", w.batch_norm("bn1", w.conv("conv1", x)))
    for stage in range(1, 5):
        for index in range(w.count(f"layer{stage}.")):
            name, stride = f"layer{stage}.{index}", 2 if index == 0 else 1
            out = w.conv(f"{name}.conv1", w.batch_norm(f"{name}.bn1", x))
            out = w.prelu(f"{name}.prelu", w.batch_norm(f"{name}.bn2", out))
            out = w.batch_norm(f"{name}.bn3", w.conv(f"{name}.conv2", out, stride))
            if w.has(f"{name}.downsample."):
                x = w.batch_norm(f"{name}.downsample.1", w.conv(f"{name}.downsample.0", x, stride))
            x = x + out
    x = w.batch_norm("bn2", x).reshape(len(x), -1)
    return w.batch_norm("features", w.linear("fc", x))


def _mobilefacenet(w: Weights, x: np.ndarray) -> np.ndarray:
    def conv_bn(name: str, x: np.ndarray, stride: int = 1, padding: int | None = None) -> np.ndarray:
        x = w.batch_norm(f"{name}.layers.1", w.conv(f"{name}.layers.0", x, stride, padding))
        return w.prelu(f"{name}.layers.2", x) if w.has(f"{name}.layers.2.") else x

    def bottleneck(name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        return conv_bn(f"{name}.layers.2", conv_bn(f"{name}.layers.1", conv_bn(f"{name}.layers.0", x), stride))

    def residuals(name: str, x: np.ndarray) -> np.ndarray:
        for index in range(w.count(f"{name}.layers.")):
            x = x + bottleneck(f"{name}.layers.{index}", x)
        return x

    x = conv_bn("layers.0", x, 2)
    x = residuals("layers.1", x) if w.has("layers.1.layers.0.layers.0.") else conv_bn("layers.1", x)
    for stage in (2, 4, 6):
        x = residuals(f"layers.{stage + 1}", bottleneck(f"layers.{stage}", x, 2))
    x = conv_bn("features.layers.0", conv_bn("conv_sep", x), 1, 0)
    return w.batch_norm("features.layers.3", w.linear("features.layers.2", x.reshape(len(x), -1)))
