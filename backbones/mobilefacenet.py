"""MobileFaceNet (Chen et al. 2018) at the scales 1, 2 and 4 of insightface: ``mobilefacenet_small`` (depthwise first
stage), ``mbf`` (0.45 GFLOP) and ``mbf_large``. Channels inside the bottlenecks are the same at every scale.

Built of bottlenecks conv1x1-BN-PReLU, depthwise conv3x3-BN-PReLU, conv1x1-BN, and a global depthwise convolution in
place of the average pool. Layer names follow the public checkpoints (``layers.0.layers.0`` ...).

Shapes: B batch, H = W input size in pixels, D embedding size, ``width`` channels of the stem.
"""

import math

import paddle
from paddle import nn

from backbones.layers import Backbone, PReLU, batch_norm, batch_norm_1d, conv, flatten_chw, full_precision, run_block
from utils.errors import UserError


def _fan_out_normal(num_out: int, kernel: int = 1) -> nn.initializer.Normal:
    """He et al. 2015, eq. 14: N(0, 2 / fan_out)."""
    # PyTorch does not divide by the groups when it counts the fan-out, and neither does this.
    return nn.initializer.Normal(0.0, math.sqrt(2.0 / (num_out * kernel * kernel)))


class ConvBN(nn.Layer):
    """Convolution - BN, and PReLU if ``activation``."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        activation: bool = True,
        data_format: str = "NCHW",
    ):
        super().__init__()
        parts = [
            conv(num_in, num_out, kernel, stride, padding, groups, _fan_out_normal(num_out, kernel), data_format),
            batch_norm(num_out, data_format),
        ]
        if activation:
            parts.append(PReLU(num_out, data_format))
        self.layers = nn.Sequential(*parts)

    def forward(self, x):
        return self.layers(x)


class Bottleneck(nn.Layer):
    """1x1 to ``hidden`` channels, depthwise 3x3, 1x1 back, plus the input if ``residual``."""

    def __init__(self, num_in: int, num_out: int, hidden: int, stride: int, residual: bool, data_format: str):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvBN(num_in, hidden, data_format=data_format),
            ConvBN(hidden, hidden, 3, stride, groups=hidden, data_format=data_format),
            ConvBN(hidden, num_out, activation=False, data_format=data_format),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class Residual(nn.Layer):
    """``depth`` residual bottlenecks of one shape."""

    def __init__(self, num_channels: int, depth: int, hidden: int, data_format: str):
        super().__init__()
        blocks = [Bottleneck(num_channels, num_channels, hidden, 1, True, data_format) for _ in range(depth)]
        self.layers = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layers(x)


class EmbeddingHead(nn.Layer):
    """Depthwise convolution over the whole map - BN - Linear - BN: [B, C, size, size] -> [B, D]."""

    def __init__(self, num_channels: int, size: int, embedding_size: int, data_format: str):
        super().__init__()
        self.data_format = data_format
        fc_attr = paddle.ParamAttr(initializer=_fan_out_normal(embedding_size))
        self.layers = nn.Sequential(
            ConvBN(num_channels, num_channels, size, 1, 0, num_channels, activation=False, data_format=data_format),
            nn.Identity(),  # holds the place of the flatten, which keeps the checkpoints' numbering
            nn.Linear(num_channels, embedding_size, fc_attr, False),
            batch_norm_1d(embedding_size),
        )

    def forward(self, x):
        depthwise, _, fc, norm = self.layers
        return norm(fc(flatten_chw(depthwise(x), self.data_format)))


class MobileFaceNet(Backbone):
    """Whole stages are computed again where ``recompute`` is on.

    Args:
        depths: blocks of the four stages; a first stage of one block is a grouped convolution instead.
        hidden_ratio: channels inside the first bottlenecks relative to ``width`` (2, 1, 0.5).
        width: channels of the stem (64, 128, 256); everything else scales with it.

    Under autocast the end (from ``conv_sep``) runs in the weights' own precision, as in the reference.
    """

    def __init__(self, depths: tuple[int, ...], hidden_ratio: float, width: int, **common):
        super().__init__(**common)
        if width % 2 or width < 2:
            raise UserError(f"width {width}: MobileFaceNet needs an even number of channels")
        data_format, hidden = self.data_format, int(width * hidden_ratio)
        final = hidden * 4
        if depths[0] == 1:
            first = ConvBN(width, width, 3, groups=hidden // 2, data_format=data_format)
        else:
            first = Residual(width, depths[0], hidden, data_format)
        self.layers = nn.LayerList(
            [
                ConvBN(3, width, 3, 2, data_format=data_format),
                first,
                Bottleneck(width, width, hidden, 2, False, data_format),
                Residual(width, depths[1], hidden, data_format),
                Bottleneck(width, width * 2, hidden * 2, 2, False, data_format),
                Residual(width * 2, depths[2], hidden * 2, data_format),
                Bottleneck(width * 2, width * 2, hidden * 4, 2, False, data_format),
                Residual(width * 2, depths[3], hidden * 2, data_format),
            ]
        )
        self.conv_sep = ConvBN(width * 2, final, data_format=data_format)
        self.features = EmbeddingHead(final, -(-self.input_size // 16), self.embedding_size, data_format)

    def forward(self, image):
        x = self.enter(image)
        for stage in self.layers:
            x = run_block(stage, x, self.recompute)
        return full_precision(self._embed, x, self.features.layers[2].weight.dtype)

    def _embed(self, x):
        return self.features(self.dropout(self.conv_sep(x)))


SETTINGS = {
    "mobilefacenet_small": {"depths": (1, 4, 6, 2), "hidden_ratio": 2.0, "width": 64},
    "mobilefacenet": {"depths": (1, 4, 6, 2), "hidden_ratio": 1.0, "width": 128},
    "mobilefacenet_large": {"depths": (2, 8, 12, 4), "hidden_ratio": 0.5, "width": 256},
}
