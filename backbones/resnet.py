"""Plain ResNets (He et al. 2016) with an embedding layer, and ``resnet_face18``, the small grey face network.

``resnet18/34/50``: the ImageNet stem (conv7x7/2, max pool) or a face stem (conv3x3, no pool), ``pool="avg"`` or
``"flatten"`` before the linear layer, squeeze-and-excitation (Hu et al. 2018) on request. ``resnet_face18``: blocks
BN-conv-BN-PReLU-conv-BN-SE as in the iresnets, but the PReLU has one weight and acts again behind the sum.
Layer names follow the public PyTorch networks.

Shapes: B batch, H = W input size in pixels, D embedding size; stage s has ``width * 2**s`` channels.
"""

import math
from functools import partial

import paddle
from paddle import nn
from paddle.nn import functional as F

from backbones.layers import (
    Backbone,
    PReLU,
    batch_norm,
    batch_norm_1d,
    choose,
    conv,
    flatten_chw,
    full_precision,
    linear,
    shortcut,
)


def _fan_out(num_out: int, kernel: int) -> nn.initializer.Normal:
    """N(0, 2 / fan_out) (He et al. 2015, eq. 14)."""
    return nn.initializer.Normal(0.0, math.sqrt(2.0 / (num_out * kernel * kernel)))


def _fan_out_conv(num_in: int, num_out: int, kernel: int, stride: int, data_format: str) -> nn.Conv2D:
    return conv(num_in, num_out, kernel, stride, init=_fan_out(num_out, kernel), data_format=data_format)


class SqueezeExcite(nn.Layer):
    """Scales each channel by sigmoid(fc(prelu(fc(mean over the map))))."""

    def __init__(self, num_channels: int, data_format: str):
        super().__init__()
        self.data_format = data_format
        hidden = max(1, num_channels // 16)
        self.fc = nn.Sequential(linear(num_channels, hidden), PReLU(1), linear(hidden, num_channels), nn.Sigmoid())

    def forward(self, x):
        if self.data_format == "NCHW":
            return x * self.fc(x.mean([2, 3])).unsqueeze([2, 3])
        return x * self.fc(x.mean([1, 2])).unsqueeze([1, 2])


class BasicBlock(nn.Layer):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN(-SE) plus shortcut, ReLU."""

    expansion = 1

    def __init__(self, num_in: int, width: int, stride: int, se: bool, data_format: str):
        super().__init__()
        self.conv1 = _fan_out_conv(num_in, width, 3, stride, data_format)
        self.bn1 = batch_norm(width, data_format)
        self.conv2 = _fan_out_conv(width, width, 3, 1, data_format)
        self.bn2 = batch_norm(width, data_format)
        self.se = SqueezeExcite(width, data_format) if se else None
        self.downsample = shortcut(num_in, width, stride, data_format, _fan_out(width, 1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out if self.se is None else self.se(out)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlock(nn.Layer):
    """conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN(-SE) to four times ``width``, plus shortcut, ReLU."""

    expansion = 4

    def __init__(self, num_in: int, width: int, stride: int, se: bool, data_format: str):
        super().__init__()
        num_out = width * self.expansion
        self.conv1 = _fan_out_conv(num_in, width, 1, 1, data_format)
        self.bn1 = batch_norm(width, data_format)
        self.conv2 = _fan_out_conv(width, width, 3, stride, data_format)
        self.bn2 = batch_norm(width, data_format)
        self.conv3 = _fan_out_conv(width, num_out, 1, 1, data_format)
        self.bn3 = batch_norm(num_out, data_format)
        self.se = SqueezeExcite(num_out, data_format) if se else None
        self.downsample = shortcut(num_in, num_out, stride, data_format, _fan_out(num_out, 1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out if self.se is None else self.se(out)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class FaceBlock(nn.Layer):
    """BN-conv3x3-BN-PReLU-conv3x3(stride)-BN(-SE) plus shortcut, the same PReLU; the first conv keeps the channels."""

    def __init__(self, num_in: int, num_out: int, stride: int, se: bool, data_format: str):
        super().__init__()
        init = nn.initializer.XavierNormal()
        self.bn0 = batch_norm(num_in, data_format)
        self.conv1 = conv(num_in, num_in, 3, init=init, data_format=data_format)
        self.bn1 = batch_norm(num_in, data_format)
        self.prelu = PReLU(1, data_format)
        self.conv2 = conv(num_in, num_out, 3, stride, init=init, data_format=data_format)
        self.bn2 = batch_norm(num_out, data_format)
        self.se = SqueezeExcite(num_out, data_format) if se else None
        self.downsample = shortcut(num_in, num_out, stride, data_format, init)

    def forward(self, x):
        out = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        out = self.bn2(self.conv2(out))
        out = out if self.se is None else self.se(out)
        return self.prelu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """Trunk, pool, one linear layer with bias.

    Args:
        block: ``BasicBlock`` or ``BottleneckBlock``.
        depths: blocks in each of the four stages.
        width: channels of the stem and the first stage; later stages have 2, 4, 8 times as many.
        pool: ``avg`` (mean over the map) or ``flatten`` (every position has its own weights).
        se: squeeze-and-excitation in every block.
        stem: ``imagenet`` (conv7x7 stride 2, max pool) or ``face`` (conv3x3; the first stage has stride 2).
        in_channels: 3, or 1: RGB is turned into luma.
    """

    def __init__(
        self,
        block: type[nn.Layer],
        depths: tuple[int, ...],
        embedding_size: int = 128,
        width: int = 64,
        pool: str = "avg",
        se: bool = False,
        stem: str = "imagenet",
        in_channels: int = 3,
        **common,
    ):
        super().__init__(embedding_size, **common)
        self.in_channels = choose("in_channels", in_channels, 1, 3)
        data_format = self.data_format
        self.pool, self.stem = choose("pool", pool, "avg", "flatten"), choose("stem", stem, "imagenet", "face")
        imagenet = stem == "imagenet"
        self.conv1 = _fan_out_conv(in_channels, width, 7 if imagenet else 3, 2 if imagenet else 1, data_format)
        self.bn1 = batch_norm(width, data_format)
        make_block = partial(block, se=se, data_format=data_format)
        strides, size = ((1, 2, 2, 2), -(-self.input_size // 4)) if imagenet else ((2, 2, 2, 2), self.input_size)
        num_out, size = self.add_stages(make_block, depths, strides, width, size, block.expansion)
        self.fc = linear(num_out * (size * size if pool == "flatten" else 1), embedding_size)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(self.enter(image))))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1, data_format=self.data_format)
        x = self.run_stages(x)
        if self.pool == "avg":
            x = x.mean([2, 3] if self.data_format == "NCHW" else [1, 2])
        else:
            x = flatten_chw(x, self.data_format)
        return full_precision(self.fc, self.dropout(x), self.fc.weight.dtype)


class ResNetFace(Backbone):
    """``resnet_face18``, a network of grey images; arguments as in ``ResNet``."""

    def __init__(
        self,
        embedding_size: int = 512,
        dropout: float = 0.5,
        width: int = 64,
        input_size: int = 128,
        se: bool = True,
        in_channels: int = 1,
        **common,
    ):
        super().__init__(embedding_size, dropout, input_size, **common)
        self.in_channels = choose("in_channels", in_channels, 1, 3)
        data_format = self.data_format
        init = nn.initializer.XavierNormal()
        self.conv1 = conv(in_channels, width, 3, init=init, data_format=data_format)
        self.bn1 = batch_norm(width, data_format)
        self.prelu = PReLU(1, data_format)
        make_block = partial(FaceBlock, se=se, data_format=data_format)
        num_out, size = self.add_stages(make_block, (2, 2, 2, 2), (1, 2, 2, 2), width, input_size // 2)
        self.bn4 = batch_norm(num_out, data_format)
        self.fc5 = nn.Linear(num_out * size * size, embedding_size, paddle.ParamAttr(initializer=init))
        self.bn5 = batch_norm_1d(embedding_size)

    def forward(self, image):
        x = self.prelu(self.bn1(self.conv1(self.enter(image))))
        x = self.run_stages(F.max_pool2d(x, 2, 2, data_format=self.data_format))
        x = flatten_chw(self.dropout(self.bn4(x)), self.data_format)
        return full_precision(self._embed, x, self.fc5.weight.dtype)

    def _embed(self, x):
        return self.bn5(self.fc5(x))


SETTINGS = {
    "resnet18": {"block": BasicBlock, "depths": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "depths": (3, 4, 6, 3)},
    "resnet50": {"block": BottleneckBlock, "depths": (3, 4, 6, 3)},
}
