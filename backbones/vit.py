"""Vision transformer for faces (Dosovitskiy et al. 2021, in the form of the PyTorch reference), sizes t, s, b, l.

Patches of 9 pixels, no class token: all tokens are flattened into one linear layer. In training a share of the tokens
is left out of the blocks and replaced by a learned token behind them (as masked autoencoders do, He et al. 2022).
Layer names follow the public checkpoints (``patch_embed.proj``, ``blocks.0.attn.qkv`` ...).

Shapes: B batch, H = W input size in pixels, L = (H // 9)**2 tokens (144 at 112), K kept tokens, C = ``width``,
D embedding size.
"""

import paddle
from paddle import nn
from paddle.nn import functional as F

from backbones.layers import Backbone, batch_norm_1d, full_precision, run_block
from utils.errors import UserError

PATCH_SIZE = 9
NUM_HEADS = 8
HEAD_EPSILON = 2e-5


def _linear(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    """Linear layer, weight N(0, 0.02), bias 0."""
    attr = paddle.ParamAttr(initializer=nn.initializer.Normal(0.0, 0.02))
    return nn.Linear(num_in, num_out, attr, None if bias else False)


class Attention(nn.Layer):
    """Multi-head self-attention, [B, L, C] -> [B, L, C]; no bias on queries, keys and values."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_size = width // num_heads
        self.qkv = _linear(width, width * 3, bias=False)
        self.proj = _linear(width, width)

    def forward(self, x):
        split = self.qkv(x).reshape([0, 0, 3, self.num_heads, self.head_size])
        query, key, value = split.transpose([2, 0, 3, 1, 4]).unbind(0)
        # Scaling the query, not the product, keeps float16 logits in range.
        weight = F.softmax(paddle.matmul(query * self.head_size**-0.5, key, transpose_y=True), axis=-1)
        return self.proj(paddle.matmul(weight.astype(value.dtype), value).transpose([0, 2, 1, 3]).flatten(2))


class MLP(nn.Layer):
    """Linear to 4C - ReLU6 - linear back."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = _linear(width, width * 4)
        self.fc2 = _linear(width * 4, width)

    def forward(self, x):
        return self.fc2(F.relu6(self.fc1(x)))


class DropPath(nn.Layer):
    """Stochastic depth (Huang et al. 2016): drops a sample's whole branch with ``probability``, in training only."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if not self.training or self.probability == 0.0:
            return x
        return x * F.dropout(paddle.ones([x.shape[0], 1, 1], dtype=x.dtype), self.probability)


class Block(nn.Layer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, num_heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Layer):
    """Non-overlapping patches -> tokens; what is left at the right and lower edge is ignored, as in the reference."""

    def __init__(self, width: int, data_format: str):
        super().__init__()
        self.data_format = data_format
        # PyTorch's default for a convolution, which the reference leaves as it is.
        bound = (3 * PATCH_SIZE * PATCH_SIZE) ** -0.5
        attr = paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound))
        options = {"weight_attr": attr, "bias_attr": attr, "data_format": data_format}
        self.proj = nn.Conv2D(3, width, PATCH_SIZE, PATCH_SIZE, **options)

    def forward(self, image):
        if self.data_format == "NHWC":
            return self.proj(image.transpose([0, 2, 3, 1])).flatten(1, 2)
        return self.proj(image).flatten(2).transpose([0, 2, 1])


class VisionTransformer(Backbone):
    """Patches, ``depth`` blocks, two linear layers.

    Args:
        depth: number of blocks.
        width: C, a multiple of ``num_heads``.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        mask_ratio: share of the tokens masked in training, 0 to below 1: int(L * (1 - mask_ratio)) are kept.
        num_heads: attention heads.

    ``data_format`` is the layout of the patch convolution. The last norm runs in the weights' own precision too.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        drop_path: float = 0.1,
        mask_ratio: float = 0.1,
        num_heads: int = NUM_HEADS,
        **common,
    ):
        super().__init__(**common)
        if width % num_heads:
            raise UserError(f"width {width}: not a multiple of num_heads {num_heads}")
        if not 0.0 <= mask_ratio < 1.0:
            raise UserError(f"mask_ratio {mask_ratio}: must be at least 0 and below 1")
        if self.input_size < PATCH_SIZE:
            raise UserError(f"input_size {self.input_size}: smaller than a patch of {PATCH_SIZE} pixels")
        self.num_tokens = (self.input_size // PATCH_SIZE) ** 2
        self.num_kept = max(1, int(self.num_tokens * (1.0 - mask_ratio)))
        self.patch_embed = PatchEmbed(width, self.data_format)
        normal = nn.initializer.Normal(0.0, 0.02)
        self.pos_embed = self.create_parameter([1, self.num_tokens, width], default_initializer=normal)
        self.mask_token = self.create_parameter([1, 1, width], default_initializer=normal)
        rates = [drop_path * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.LayerList([Block(width, num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            _linear(width * self.num_tokens, width, bias=False),
            batch_norm_1d(width, HEAD_EPSILON),
            _linear(width, self.embedding_size, bias=False),
            batch_norm_1d(self.embedding_size, HEAD_EPSILON),
        )

    def forward(self, image):
        x = self.patch_embed(image)
        x = x + self.pos_embed.astype(x.dtype)
        masking = self.training and self.num_kept < self.num_tokens
        if masking:
            order_BL = paddle.rand([x.shape[0], self.num_tokens]).argsort(axis=1)
            x = paddle.take_along_axis(x, order_BL[:, : self.num_kept].unsqueeze(2), axis=1)
        for block in self.blocks:
            x = run_block(block, x, self.recompute)
        x = full_precision(self.norm, x, self.norm.weight.dtype)
        if masking:
            num_masked = self.num_tokens - self.num_kept
            x = paddle.concat([x, self.mask_token.expand([x.shape[0], num_masked, -1])], axis=1)
            # Sorting the order gives its inverse: token i lies at place inverse[i] of the shuffled row.
            x = paddle.take_along_axis(x, order_BL.argsort(axis=1).unsqueeze(2), axis=1)
        return full_precision(self._embed, x, self.norm.weight.dtype)

    def _embed(self, x):
        return self.feature(self.dropout(x.flatten(1)))


SETTINGS = {
    "vit_t": {"depth": 12, "width": 256, "drop_path": 0.1, "mask_ratio": 0.1},
    "vit_s": {"depth": 12, "width": 512, "drop_path": 0.1, "mask_ratio": 0.1},
    "vit_b": {"depth": 24, "width": 512, "drop_path": 0.1, "mask_ratio": 0.1},
    "vit_l": {"depth": 24, "width": 768, "drop_path": 0.05, "mask_ratio": 0.05},
}
