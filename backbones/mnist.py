"""``mnist_2d``: digits -> two numbers that can be drawn, for the rings of softmax against ArcFace.

Three stages of two conv3x3-BN-PReLU and a max pool, then one linear layer: the plan of the network of Wen et al. 2016
(section 3.1), narrower and with batch norm, so that it trains in minutes on a CPU.

Shapes: B batch, H = W input size in pixels, D embedding size (2); stage s has ``width * 2**s`` channels.
"""

from paddle import nn
from paddle.nn import functional as F

from backbones.layers import (
    PReLU,
    batch_norm,
    check_format,
    conv,
    flatten_chw,
    full_precision,
    linear,
    run_block,
    to_channels,
)
from utils.errors import UserError


class MnistNet(nn.Layer):
    """Digit image -> raw (unnormalised) embedding.

    Args:
        embedding_size: D, 2 to draw it.
        dropout: probability of dropping a value before the linear layer.
        width: channels of the first stage; later stages have 2 and 4 times as many.
        input_size: height and width of the images in pixels.
        in_channels: 1 (RGB input is turned into luma) or 3.
        recompute: compute each stage's activations again in the backward pass instead of keeping them.
        data_format: ``NCHW`` or ``NHWC``: the layout inside; the input is [B, 1 or 3, H, W] in both.

    ``forward``: float [B, 1 or 3, H, W] in [-1, 1] -> [B, D].
    """

    def __init__(self, embedding_size: int = 2, dropout: float = 0.0, width: int = 16, input_size: int = 28,
                 in_channels: int = 1, recompute: bool = False, data_format: str = "NCHW"):  # fmt: skip
        super().__init__()
        if in_channels not in (1, 3):
            raise UserError(f"in_channels {in_channels}: choose 1 or 3")
        if input_size < 8:
            raise UserError(f"input_size {input_size}: three halvings need at least 8 pixels")
        self.data_format = check_format(data_format)
        self.in_channels = in_channels
        self.recompute = recompute
        self.input_size = input_size
        self.embedding_size = embedding_size
        stages, num_in, size = [], in_channels, input_size
        for stage in range(3):
            num_out, parts = width * 2**stage, []
            for _ in range(2):
                init = nn.initializer.KaimingNormal()
                parts += [
                    conv(num_in, num_out, 3, init=init, data_format=data_format),
                    batch_norm(num_out, data_format),
                    PReLU(num_out, data_format),
                ]
                num_in = num_out
            stages.append(nn.Sequential(*parts))
            size //= 2
        self.stages = nn.LayerList(stages)
        self.dropout = nn.Dropout(dropout)
        self.fc = linear(num_in * size * size, embedding_size)

    def forward(self, image):
        x = to_channels(image, self.in_channels)
        x = x if self.data_format == "NCHW" else x.transpose([0, 2, 3, 1])
        for stage in self.stages:
            x = F.max_pool2d(run_block(stage, x, self.recompute), 2, 2, data_format=self.data_format)
        x = self.dropout(flatten_chw(x, self.data_format))
        return full_precision(self.fc, x, self.fc.weight.dtype)
