"""What the families share: convolution, batch norm, PReLU, linear layers, gradient recompute and ``Backbone``.

Layout is NCHW or NHWC (``data_format``); convolution weights are [out, in, height, width] in both, so a state dict does
not depend on the layout. Batch norm: Paddle's ``momentum`` weights the OLD running value (0.9 here equals 0.1 in
PyTorch), and Paddle's running variance is the biased one, where PyTorch stores n/(n-1) times the batch's
(n = batch x height x width values per channel). Outputs and gradients are the same.
"""

import math
from collections.abc import Callable

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute as paddle_recompute
from paddle.nn import functional as F

from backbones.cpu_prelu import CPUPReLU
from utils.errors import UserError

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.9
SMALL = 1 << 15  # values; Paddle's own PReLU is faster below, because ours costs some 200 us a call (one thread, EPYC)
RUNNING_NORMS = (nn.BatchNorm1D, nn.BatchNorm2D, nn.BatchNorm3D, nn.SyncBatchNorm)  # what keeps running statistics


class Conv2D(nn.Conv2D):
    """Paddle's without bias; in the dynamic graph its kernel is called at once, which saves the host half of its time.

    What Paddle does before each call (flags by name, padding modes, tensors of other kinds) does not concern us.
    """

    def forward(self, x):
        if self.bias is not None or self._padding_mode != "zeros" or not paddle.in_dynamic_mode():
            return nn.Conv2D.forward(self, x)  # not super(): what Paddle 2.6 compiles has lost the class
        shape = (self._stride, self._updated_padding, self._padding_algorithm)
        if self._op_type == "depthwise_conv2d":
            return paddle._C_ops.depthwise_conv2d(
                x, self.weight, *shape, self._groups, self._dilation, self._data_format
            )
        return paddle._C_ops.conv2d(x, self.weight, *shape, self._dilation, self._groups, self._data_format)


class BatchNorm2D(nn.BatchNorm2D):
    """Paddle's; in training its kernel is called at once, as in ``Conv2D``."""

    def forward(self, x):
        if not self.training or not paddle.in_dynamic_mode():
            return nn.BatchNorm2D.forward(self, x)
        factors = (self._momentum, self._epsilon, self._data_format)
        return paddle._C_ops.batch_norm(
            x, self._mean, self._variance, self.weight, self.bias, False, *factors, False, False
        )[0]


def choose(name: str, value: object, *choices: object) -> object:
    """``value`` if it is one of the choices, else UserError."""
    if value not in choices:
        raise UserError(f"{name} {value!r}: choose {' or '.join(map(str, choices))}")
    return value


def conv(
    num_in: int,
    num_out: int,
    kernel: int,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    init: nn.initializer.Initializer | None = None,
    data_format: str = "NCHW",
) -> nn.Conv2D:
    """Convolution without bias; ``padding`` defaults to (kernel - 1) / 2, ``init`` to N(0, 0.1) as in the iresnets."""
    padding = (kernel - 1) // 2 if padding is None else padding
    attr = paddle.ParamAttr(initializer=init or nn.initializer.Normal(0.0, 0.1))
    options = {"weight_attr": attr, "bias_attr": False, "data_format": data_format}
    return Conv2D(num_in, num_out, kernel, stride, padding, groups=groups, **options)


def batch_norm(num_features: int, data_format: str = "NCHW", epsilon: float = BN_EPSILON) -> nn.BatchNorm2D:
    """Batch norm over a feature map, PyTorch's defaults."""
    return BatchNorm2D(num_features, momentum=BN_MOMENTUM, epsilon=epsilon, data_format=data_format)


class FrozenScaleNorm(nn.BatchNorm1D):
    """Batch norm of embeddings [B, D] whose scale stays 1 and is not trained."""

    def __init__(self, num_features: int, **options):
        super().__init__(num_features, **options)
        self.weight.stop_gradient = True

    def forward(self, x):
        if not self.training and not (paddle.in_dynamic_mode() and paddle.is_grad_enabled()):
            options = {"training": False, "momentum": self._momentum, "epsilon": self._epsilon}
            return F.batch_norm(x, self._mean, self._variance, self.weight, self.bias, **options)
        # Paddle gives the shift of a batch norm no gradient where its scale has none, so both stand outside here.
        ones, zeros = paddle.ones_like(self.weight), paddle.zeros_like(self.bias)
        normal = F.batch_norm(x, self._mean, self._variance, ones, zeros, self.training, self._momentum, self._epsilon)
        return normal * self.weight + self.bias


def batch_norm_1d(num_features: int, epsilon: float = BN_EPSILON, frozen_scale: bool = False) -> nn.BatchNorm1D:
    """Batch norm of embeddings [B, D]; ``frozen_scale`` keeps the scale at 1, out of training."""
    kind = FrozenScaleNorm if frozen_scale else nn.BatchNorm1D
    return kind(num_features, momentum=BN_MOMENTUM, epsilon=epsilon)


def linear(num_in: int, num_out: int) -> nn.Linear:
    """Linear layer with PyTorch's default initialisation: weight and bias uniform in +-1/sqrt(num_in)."""
    bound = 1.0 / math.sqrt(num_in)
    uniform = nn.initializer.Uniform(-bound, bound)
    return nn.Linear(num_in, num_out, paddle.ParamAttr(initializer=uniform), paddle.ParamAttr(initializer=uniform))


class PReLU(nn.Layer):
    """max(x, 0) + weight * min(x, 0), one weight a channel, 0.25 at the start (He et al. 2015, eq. 1)."""

    def __init__(self, num_parameters: int, data_format: str = "NCHW"):
        super().__init__()
        self.data_format = data_format
        self.weight = self.create_parameter([num_parameters], default_initializer=nn.initializer.Constant(0.25))

    def forward(self, x):
        # Paddle 2.6's gradient reducer crashes on a parameter whose gradient comes from a PyLayer.
        own = self.data_format == "NCHW" and not paddle.__version__.startswith("2.")
        if own and x.ndim == 4 and paddle.in_dynamic_mode() and x.place.is_cpu_place() and math.prod(x.shape) >= SMALL:
            return CPUPReLU.apply(x, self.weight)
        return F.prelu(x, self.weight, data_format=self.data_format)


def shortcut(
    num_in: int, num_out: int, stride: int, data_format: str, init: nn.initializer.Initializer | None = None
) -> nn.Sequential | None:
    """1x1 convolution - BN where a block changes the shape, None where its input itself is the shortcut."""
    if stride == 1 and num_in == num_out:
        return None
    projection = conv(num_in, num_out, 1, stride, init=init, data_format=data_format)
    return nn.Sequential(projection, batch_norm(num_out, data_format))


def flatten_chw(x: paddle.Tensor, data_format: str) -> paddle.Tensor:
    """[B, C, H, W] or [B, H, W, C] -> [B, C*H*W]: the order of the PyTorch checkpoints in either layout."""
    if data_format == "NHWC":
        x = x.transpose([0, 3, 1, 2])
    return x.flatten(1)


def full_precision(function: Callable, x: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """``function(x)`` outside autocast, ``x`` brought to ``dtype`` first (the dtype of the function's weights)."""
    with paddle.amp.auto_cast(enable=False):
        return function(x.astype(dtype) if x.dtype != dtype else x)


def run_block(block: nn.Layer, x: paddle.Tensor, recompute: bool) -> paddle.Tensor:
    """``block(x)``; with ``recompute`` in training its activations are thrown away and computed again in backward.

    Batch norms must see each batch once: the first pass updates the running statistics, the second does not
    (momentum 1 keeps the old value), so that a step with recompute equals a step without. The second pass draws the
    random numbers of the first (kept here, because Paddle 2.6 does that on GPUs only).
    """
    if not (recompute and block.training and paddle.is_grad_enabled()) or x.stop_gradient:
        return block(x)
    norms = [part for part in block.sublayers(include_self=True) if isinstance(part, RUNNING_NORMS)]
    momenta = [norm._momentum for norm in norms]
    first_state = paddle.get_rng_state()
    passes = 0

    def forward(value):
        nonlocal passes
        passes += 1
        if passes == 1:
            return block(value)
        state = paddle.get_rng_state()
        paddle.set_rng_state(first_state)
        for norm in norms:
            norm._momentum = 1.0
        try:
            return block(value)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm._momentum = momentum
            paddle.set_rng_state(state)

    return paddle_recompute(forward, x, use_reentrant=False, preserve_rng_state=False)


class Backbone(nn.Layer):
    """Image -> raw (unnormalised) embedding: what the families share, the options of all of them among it.

    Args:
        embedding_size: D.
        dropout: probability of dropping a value before the last linear layer, or what takes its place.
        input_size: height and width of the images in pixels.
        recompute: compute each block's activations again in the backward pass instead of keeping them.
        data_format: ``NCHW`` or ``NHWC``: the layout inside; the input is [B, channels, H, W] in both.

    ``forward``: float [B, 3, H, W] in [-1, 1] -> [B, D]. Precision is the caller's autocast; the linear layer at the
    end and what follows it run in the weights' own.
    """

    in_channels = 3  # 1 in a network of grey images, which turns RGB into luma

    def __init__(
        self,
        embedding_size: int = 512,
        dropout: float = 0.0,
        input_size: int = 112,
        recompute: bool = False,
        data_format: str = "NCHW",
    ) -> None:
        super().__init__()
        self.embedding_size, self.input_size = embedding_size, input_size
        self.recompute, self.data_format = recompute, choose("data_format", data_format, "NCHW", "NHWC")
        self.dropout = nn.Dropout(dropout)

    def enter(self, image: paddle.Tensor) -> paddle.Tensor:
        """The image in the layout inside; [B, 3, H, W] RGB becomes luma (ITU-R BT.601) where the network is grey.

        The weights of the luma sum to 1, so an image normalised to [-1, 1] stays normalised.
        """
        if self.in_channels == 1 and image.shape[1] == 3:
            red, green, blue = image.split(3, axis=1)
            image = red * 0.299 + green * 0.587 + blue * 0.114
        return image if self.data_format == "NCHW" else image.transpose([0, 2, 3, 1])

    def add_stages(
        self, make_block: Callable, depths: tuple, strides: tuple, width: int, size: int, expansion: int = 1
    ) -> tuple[int, int]:
        """Four stages ``layer1`` ... of residual blocks; the first block of each takes its stride.

        Args:
            make_block: (channels in, ``width * 2**stage``, stride) -> a block of ``expansion`` times as many channels.
            depths: blocks in each stage.
            size: side of the map before them; each stride divides it, rounding up.

        Returns:
            (channels, side) of the last map.
        """
        num_in = width
        for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            blocks = [make_block(num_in, width * 2**stage, stride)]
            num_in, size = width * 2**stage * expansion, -(-size // stride)
            blocks += [make_block(num_in, width * 2**stage, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        return num_in, size

    def run_stages(self, x: paddle.Tensor) -> paddle.Tensor:
        """Through the blocks of the four stages."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_block(block, x, self.recompute)
        return x
