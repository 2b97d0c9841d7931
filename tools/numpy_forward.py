"""The backbones in float64 numpy, straight from named weights: what a conversion is checked against.

Nothing here goes through Paddle or through the code that maps names, so an error there shows as a difference. Weights
may be spelled as PyTorch's or as Paddle's. Evaluation mode only; a few seconds for the largest network.

Legend: B batch, C channels, H W map, F flattened features, T tokens, D embedding size.
"""

import re
from dataclasses import dataclass

import numpy as np

EPSILON = 1e-5


@dataclass(frozen=True)
class Weights:
    """Named arrays with the two spellings hidden."""

    state: dict[str, np.ndarray]
    from_torch: bool

    def get(self, name: str) -> np.ndarray:
        """The array called ``name``, float64; arcface-Paddle's ``._weight`` counts as ``.weight``."""
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

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """Normalised over the last axis, times weight, plus bias."""
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)
        return scaled * self.get(f"{name}.weight") + self.get(f"{name}.bias")

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
                part = part.reshape(num_images, groups, group_in, -1)
                if group_in > 4:
                    out += weight[row, column] @ part
                    continue
                for channel in range(group_in):  # matrices this thin are slow as matrices
                    out += weight[row, column, :, :, channel, None] * part[:, :, channel, None]
        return out.reshape(num_images, num_out, side, side)


def reference_embedding(state: dict[str, np.ndarray], from_torch: bool, image_BCHW: np.ndarray) -> np.ndarray | None:
    """Raw embedding [B, D] of images in [-1, 1], or None for a family that is not written down here."""
    weights = Weights(state, from_torch)
    x = image_BCHW.astype(np.float64)
    if weights.has("layer1.0.bn1.") and weights.has("features."):
        return _iresnet(weights, x)
    if weights.has("conv_sep."):
        return _mobilefacenet(weights, x)
    if weights.has("blocks.0.attn.qkv."):
        return _vit(weights, x)
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


def _vit(w: Weights, x: np.ndarray, num_heads: int = 8) -> np.ndarray:
    weight = w.get("patch_embed.proj.weight")
    width, channels, patch, _ = weight.shape
    num_images, side = len(x), x.shape[2] // patch
    patches = x[:, :, : side * patch, : side * patch].reshape(num_images, channels, side, patch, side, patch)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(num_images, side * side, -1)
    x = patches @ weight.reshape(width, -1).T + w.get("patch_embed.proj.bias") + w.get("pos_embed")
    for index in range(w.count("blocks.")):
        name = f"blocks.{index}"
        qkv = w.linear(f"{name}.attn.qkv", w.layer_norm(f"{name}.norm1", x))
        parts = np.split(qkv, 3, axis=-1)
        query, key, value = (p.reshape(num_images, -1, num_heads, width // num_heads).swapaxes(1, 2) for p in parts)
        logit = query @ key.swapaxes(2, 3) / np.sqrt(width // num_heads)
        attention = np.exp(logit - logit.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + w.linear(f"{name}.attn.proj", (attention @ value).swapaxes(1, 2).reshape(x.shape))
        hidden = w.linear(f"{name}.mlp.fc1", w.layer_norm(f"{name}.norm2", x))
        x = x + w.linear(f"{name}.mlp.fc2", np.clip(hidden, 0, 6))
    x = w.layer_norm("norm", x).reshape(num_images, -1)
    x = w.batch_norm("feature.1", w.linear("feature.0", x), 2e-5)
    return w.batch_norm("feature.3", w.linear("feature.2", x), 2e-5)
