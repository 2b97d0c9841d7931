"""``mnist_2d``: digits -> two numbers that can be drawn, for the rings of softmax against ArcFace.

Three stages of two conv3x3-BN-PReLU and a max pool, then one linear layer: the plan of the network of Wen et al. 2016
(section 3.1), narrower and with batch norm, so that it trains in minutes on a CPU.

Shapes: B batch, H = W input size in pixels, D embedding size (2); stage s has ``width * 2**s`` channels.
"""

from paddle import nn
from paddle.nn import functional as F

from backbones.layers import Backbone, PReLU, batch_norm, choose, conv, flatten_chw, full_precision, linear, run_block
from utils.errors import UserError


class MnistNet(Backbone):
    """``width``: channels of the first stage, later ones have 2 and 4 times as many; ``in_channels``: 1 or 3.

    ``forward`` takes digits, [B, 1 or 3, H, W]; RGB is turned into luma where ``in_channels`` is 1.
    """

    def __init__(self, embedding_size: int = 2, width: int = 16, input_size: int = 28, in_channels: int = 1, **common):
        super().__init__(embedding_size, input_size=input_size, **common)
        self.in_channels = choose("in_channels", in_channels, 1, 3)
        data_format = self.data_format
        if input_size < 8:
            raise UserError(f"input_size {input_size}: three halvings need at least 8 pixels")
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
        self.fc = linear(num_in * size * size, embedding_size)

    def forward(self, image):
        x = self.enter(image)
        for stage in self.stages:
            x = F.max_pool2d(run_block(stage, x, self.recompute), 2, 2, data_format=self.data_format)
        x = self.dropout(flatten_chw(x, self.data_format))
        return full_precision(self.fc, x, self.fc.weight.dtype)
