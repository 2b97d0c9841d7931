"""Plain ResNets (He et al. 2016) with an embedding layer, and ``resnet_face18``, the small grey face network.

``resnet18/34/50``: the ImageNet stem (conv7x7/2, max pool) or a face stem (conv3x3, no pool), ``pool="avg"`` or
``"flatten"`` before the linear layer, squeeze-and-excitation (Hu et al. 2018) on request. ``resnet_face18``: blocks
BN-conv-BN-PReLU-conv-BN-SE as in the iresnets, but the PReLU has one weight and acts again behind the sum.
Layer names follow the public PyTorch networks.

Shapes: B batch, H = W input size in pixels, D embedding size; stage s has ``width * 2**s`` channels.
"""

import math

import paddle
from paddle import nn
from paddle.nn import functional as F

from backbones.layers import (
    PReLU,
    batch_norm,
    batch_norm_1d,
    check_format,
    conv,
    flatten_chw,
    full_precision,
    linear,
    run_block,
    to_channels,
)
from utils.errors import UserError


def _fan_out_conv(num_in: int, num_out: int, kernel: int, stride: int, data_format: str) -> nn.Conv2D:
    """Convolution initialised N(0, 2 / fan_out) (He et al. 2015, eq. 14)."""
    init = nn.initializer.Normal(0.0, math.sqrt(2.0 / (num_out * kernel * kernel)))
    return conv(num_in, num_out, kernel, stride, init=init, data_format=data_format)


class SqueezeExcite(nn.Layer):
    """Scales each channel by sigmoid(fc(prelu(fc(mean over the map))))."""

    def __init__(self, num_channels: int, data_format: str, reduction: int = 16):
        super().__init__()
        self.data_format = data_format
        hidden = max(1, num_channels // reduction)
        self.fc = nn.Sequential(
            linear(num_channels, hidden), PReLU(1), linear(hidden, num_channels), nn.Sigmoid()
        )  # fmt: skip

    def forward(self, x):
        if self.data_format == "NCHW":
            return x * self.fc(x.mean([2, 3])).unsqueeze([2, 3])
        return x * self.fc(x.mean([1, 2])).unsqueeze([1, 2])


def _shortcut(num_in: int, num_out: int, stride: int, data_format: str) -> nn.Sequential | None:
    """1x1 convolution - BN where the shape changes, None where the input itself is the shortcut."""
    if stride == 1 and num_in == num_out:
        return None
    return nn.Sequential(_fan_out_conv(num_in, num_out, 1, stride, data_format), batch_norm(num_out, data_format))


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
        self.downsample = _shortcut(num_in, width, stride, data_format)

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
        self.downsample = _shortcut(num_in, num_out, stride, data_format)

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
        self.downsample = None
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(
                conv(num_in, num_out, 1, stride, init=init, data_format=data_format), batch_norm(num_out, data_format)
            )

    def forward(self, x):
        out = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        out = self.bn2(self.conv2(out))
        out = out if self.se is None else self.se(out)
        return self.prelu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Layer):
    """Image -> raw (unnormalised) embedding: trunk, pool, one linear layer with bias.

    Args:
        block: ``BasicBlock`` or ``BottleneckBlock``.
        depths: blocks in each of the four stages.
        embedding_size: D.
        dropout: probability of dropping a value before the linear layer.
        width: channels of the stem and the first stage; later stages have 2, 4, 8 times as many.
        input_size: height and width of the images in pixels.
        pool: ``avg`` (mean over the map) or ``flatten`` (every position has its own weights).
        se: squeeze-and-excitation in every block.
        stem: ``imagenet`` (conv7x7 stride 2, max pool) or ``face`` (conv3x3; the first stage has stride 2).
        in_channels: 3, or 1 for grey (RGB input is turned into luma).
        recompute: compute each block's activations again in the backward pass instead of keeping them.
        data_format: ``NCHW`` or ``NHWC``: the layout inside; the input is [B, 3, H, W] in both.

    ``forward``: float [B, 3, H, W] in [-1, 1] -> [B, D]. Under autocast the linear layer runs in its own precision.
    """

    def __init__(self, block: type[nn.Layer], depths: tuple[int, ...], embedding_size: int = 128, dropout: float = 0.0,
                 width: int = 64, input_size: int = 112, pool: str = "avg", se: bool = False, stem: str = "imagenet",
                 in_channels: int = 3, recompute: bool = False, data_format: str = "NCHW"):  # fmt: skip
        super().__init__()
        if pool not in ("avg", "flatten"):
            raise UserError(f"pool {pool!r}: choose avg or flatten")
        if stem not in ("imagenet", "face"):
            raise UserError(f"stem {stem!r}: choose imagenet or face")
        if in_channels not in (1, 3):
            raise UserError(f"in_channels {in_channels}: choose 1 or 3")
        self.data_format = check_format(data_format)
        self.pool = pool
        self.stem = stem
        self.in_channels = in_channels
        self.recompute = recompute
        self.input_size = input_size
        self.embedding_size = embedding_size
        imagenet = stem == "imagenet"
        self.conv1 = _fan_out_conv(in_channels, width, 7 if imagenet else 3, 2 if imagenet else 1, data_format)
        self.bn1 = batch_norm(width, data_format)
        strides = (1, 2, 2, 2) if imagenet else (2, 2, 2, 2)
        size = -(-input_size // 4) if imagenet else input_size
        num_in = width
        for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            stage_width = width * 2**stage
            num_out = stage_width * block.expansion
            blocks = [block(num_in, stage_width, stride, se, data_format)]
            blocks += [block(num_out, stage_width, 1, se, data_format) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            num_in, size = num_out, -(-size // stride)
        self.dropout = nn.Dropout(dropout)
        self.fc = linear(num_in * (size * size if pool == "flatten" else 1), embedding_size)

    def forward(self, image):
        x = to_channels(image, self.in_channels)
        x = x if self.data_format == "NCHW" else x.transpose([0, 2, 3, 1])
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1, data_format=self.data_format)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_block(block, x, self.recompute)
        if self.pool == "avg":
            x = x.mean([2, 3] if self.data_format == "NCHW" else [1, 2])
        else:
            x = flatten_chw(x, self.data_format)
        return full_precision(self.fc, self.dropout(x), self.fc.weight.dtype)


class ResNetFace(nn.Layer):
    """``resnet_face18``: grey image -> raw (unnormalised) embedding.

    Args as in ``ResNet``; ``input_size`` is 128, ``in_channels`` 1, ``se`` on and ``dropout`` 0.5 unless told.
    ``forward``: float [B, 1 or 3, H, W] in [-1, 1] -> [B, D].
    """

    def __init__(self, depths: tuple[int, ...] = (2, 2, 2, 2), embedding_size: int = 512, dropout: float = 0.5,
                 width: int = 64, input_size: int = 128, se: bool = True, in_channels: int = 1,
                 recompute: bool = False, data_format: str = "NCHW"):  # fmt: skip
        super().__init__()
        if in_channels not in (1, 3):
            raise UserError(f"in_channels {in_channels}: choose 1 or 3")
        self.data_format = check_format(data_format)
        self.in_channels = in_channels
        self.recompute = recompute
        self.input_size = input_size
        self.embedding_size = embedding_size
        init = nn.initializer.XavierNormal()
        self.conv1 = conv(in_channels, width, 3, init=init, data_format=data_format)
        self.bn1 = batch_norm(width, data_format)
        self.prelu = PReLU(1, data_format)
        num_in, size = width, input_size // 2
        for stage, depth in enumerate(depths):
            num_out, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks = [FaceBlock(num_in, num_out, stride, se, data_format)]
            blocks += [FaceBlock(num_out, num_out, 1, se, data_format) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            num_in, size = num_out, -(-size // stride)
        self.bn4 = batch_norm(num_in, data_format)
        self.dropout = nn.Dropout(dropout)
        fc_attr = paddle.ParamAttr(initializer=init)
        self.fc5 = nn.Linear(num_in * size * size, embedding_size, fc_attr)
        self.bn5 = batch_norm_1d(embedding_size)

    def forward(self, image):
        x = to_channels(image, self.in_channels)
        x = x if self.data_format == "NCHW" else x.transpose([0, 2, 3, 1])
        x = F.max_pool2d(self.prelu(self.bn1(self.conv1(x))), 2, 2, data_format=self.data_format)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_block(block, x, self.recompute)
        x = flatten_chw(self.dropout(self.bn4(x)), self.data_format)
        return full_precision(self._embed, x, self.fc5.weight.dtype)

    def _embed(self, x):
        return self.bn5(self.fc5(x))


SETTINGS = {
    "resnet18": {"block": BasicBlock, "depths": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "depths": (3, 4, 6, 3)},
    "resnet50": {"block": BottleneckBlock, "depths": (3, 4, 6, 3)},
}
