"""iResNet ("improved residual network", Duta et al. 2020) as face recognition uses it (Deng et al. 2019, section 3.1).

Stem conv3x3-BN-PReLU at full resolution; four stages that halve it, of blocks BN-conv-BN-PReLU-conv(stride)-BN plus
shortcut; tail BN-flatten-dropout-Linear-BN with the last scale frozen at 1. Layer names follow the public PyTorch
checkpoints (``layer1.0.bn1`` ...), so weights are mapped by name.

Shapes: B batch, H = W input size in pixels, D embedding size; stage s has ``width * 2**s`` channels (64 ... 512).
"""

from paddle import nn

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
        self.downsample = None
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(
                conv(num_in, num_out, 1, stride, data_format=data_format), batch_norm(num_out, data_format)
            )

    def forward(self, x):
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Layer):
    """Image -> raw (unnormalised) embedding.

    Args:
        depths: blocks in each of the four stages.
        embedding_size: D.
        dropout: probability of dropping a value before the linear layer.
        width: channels of the stem and the first stage; later stages have 2, 4, 8 times as many.
        input_size: height and width of the images in pixels; each stage halves it, rounding up.
        recompute: compute each block's activations again in the backward pass instead of keeping them.
        data_format: ``NCHW`` or ``NHWC``: the layout inside; the input is [B, 3, H, W] in both.

    ``forward``: float [B, 3, H, W] in [-1, 1] -> [B, D]. Under autocast the tail runs in the weights' own precision.
    """

    def __init__(self, depths: tuple[int, ...], embedding_size: int = 512, dropout: float = 0.0, width: int = 64,
                 input_size: int = 112, recompute: bool = False, data_format: str = "NCHW"):  # fmt: skip
        super().__init__()
        self.data_format = check_format(data_format)
        self.recompute = recompute
        self.input_size = input_size
        self.embedding_size = embedding_size
        self.conv1 = conv(3, width, 3, data_format=data_format)
        self.bn1 = batch_norm(width, data_format)
        self.prelu = PReLU(width, data_format)
        num_in, size = width, input_size
        for stage, depth in enumerate(depths):
            num_out = width * 2**stage
            blocks = [Block(num_in, num_out, 2, data_format)]
            blocks += [Block(num_out, num_out, 1, data_format) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            num_in, size = num_out, -(-size // 2)
        self.bn2 = batch_norm(num_in, data_format)
        self.dropout = nn.Dropout(dropout)
        self.fc = linear(num_in * size * size, embedding_size)
        self.features = batch_norm_1d(embedding_size, frozen_scale=True)

    def forward(self, image):
        x = image if self.data_format == "NCHW" else image.transpose([0, 2, 3, 1])
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_block(block, x, self.recompute)
        x = self.dropout(flatten_chw(self.bn2(x), self.data_format))
        return full_precision(self._embed, x, self.fc.weight.dtype)

    def _embed(self, x):
        return self.features(self.fc(x))
