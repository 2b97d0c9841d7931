"""iResNet ("improved residual network", Duta et al. 2020) as face recognition uses it (Deng et al. 2019, section 3.1).

Stem conv3x3-BN-PReLU at full resolution; four stages that halve it, of blocks BN-conv-BN-PReLU-conv(stride)-BN plus
shortcut; tail BN-flatten-dropout-Linear-BN with the last scale frozen at 1. Layer names follow the public PyTorch
checkpoints (``layer1.0.bn1`` ...), so weights are mapped by name.

Shapes: B batch, H = W input size in pixels, D embedding size; stage s has ``width * 2**s`` channels (64 ... 512).
"""

from functools import partial

from paddle import nn

from backbones.layers import (
    Backbone,
    PReLU,
    batch_norm,
    batch_norm_1d,
    conv,
    flatten_chw,
    full_precision,
    linear,
    shortcut,
)

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}


class Block(nn.Layer):
    """BN - conv3x3 - BN - PReLU - conv3x3(stride) - BN, plus the input (1x1 conv - BN where its shape changes)."""

    def __init__(self, num_in: int, num_out: int, stride: int, data_format: str):
        super().__init__()
        self.bn1 = batch_norm(num_in, data_format)
        self.conv1 = conv(num_in, num_out, 3, data_format=data_format)
        self.bn2 = batch_norm(num_out, data_format)
        self.prelu = PReLU(num_out, data_format)
        self.conv2 = conv(num_out, num_out, 3, stride, data_format=data_format)
        self.bn3 = batch_norm(num_out, data_format)
        self.downsample = shortcut(num_in, num_out, stride, data_format)

    def forward(self, x):
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(Backbone):
    """``depths``: blocks in each of the four stages; ``width``: channels of the stem and the first stage.

    Later stages have 2, 4, 8 times as many channels, and each halves the map, rounding up.
    """

    def __init__(self, depths: tuple[int, ...], width: int = 64, **common):
        super().__init__(**common)
        data_format = self.data_format
        self.conv1 = conv(3, width, 3, data_format=data_format)
        self.bn1 = batch_norm(width, data_format)
        self.prelu = PReLU(width, data_format)
        make_block = partial(Block, data_format=data_format)
        num_out, size = self.add_stages(make_block, depths, (2, 2, 2, 2), width, self.input_size)
        self.bn2 = batch_norm(num_out, data_format)
        self.fc = linear(num_out * size * size, self.embedding_size)
        self.features = batch_norm_1d(self.embedding_size, frozen_scale=True)

    def forward(self, image):
        x = self.run_stages(self.prelu(self.bn1(self.conv1(self.enter(image)))))
        x = self.dropout(flatten_chw(self.bn2(x), self.data_format))
        return full_precision(self._embed, x, self.fc.weight.dtype)

    def _embed(self, x):
        return self.features(self.fc(x))
