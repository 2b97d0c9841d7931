"""The ``run.compile`` switch: the same layer, trained faster; weights, names and results stay.

GPU: the whole backbone becomes one program (``paddle.jit.to_static``). CPU: each convolution becomes a program of its
own that oneDNN runs (about twice as fast, forward and backward), the rest stays in the dynamic graph: in a program of
the whole network oneDNN would take batch norm, PReLU and additions too, whose backward it runs by reference code at
a tenth of the speed.
"""

import paddle
from paddle import nn
from paddle.nn import functional as F

from utils.compat import paddle_version
from utils.errors import UserError


def compile_backbone(layer: nn.Layer) -> nn.Layer:
    """``layer`` itself, its forward compiled for the device it is on; ``state_dict`` is untouched.

    Args:
        layer: a backbone; float32 for the gain on CPU (other dtypes run as before).

    Raises:
        UserError: the layer recomputes activations, or this Paddle cannot compile.
    """
    if getattr(layer, "recompute", False):
        raise UserError("run.compile: true does not go with model.recompute: true; set one of them to false")
    if paddle.get_device().startswith("cpu"):
        return _compile_convolutions(layer)
    return paddle.jit.to_static(layer, full_graph=True)


def _compile_convolutions(layer: nn.Layer) -> nn.Layer:
    """Every NCHW convolution of ``layer`` through oneDNN."""
    if paddle_version() < (3, 0) or not paddle.base.core.is_compiled_with_onednn():
        raise UserError(
            f"run.compile: true on CPU needs paddle 3.0 or later with oneDNN, found {paddle.__version__}; "
            "set run.compile=false"
        )
    paddle.set_flags({"FLAGS_use_mkldnn": True})
    for part in layer.sublayers(include_self=True):
        if isinstance(part, nn.Conv2D) and part._data_format == "NCHW" and part._padding_mode == "zeros":
            part.forward = _onednn_forward(part)
    return layer


def _onednn_forward(conv: nn.Conv2D):
    """A replacement for ``conv.forward``: image [B, C, H, W] -> [B, C', H', W']."""
    stride, padding, dilation, groups = conv._stride, conv._updated_padding, conv._dilation, conv._groups

    def convolve(x, weight):
        # The copy is what brings the result back into the plain layout: a program that ends in a oneDNN operation
        # hands out its private layout, which the dynamic graph cannot read.
        return paddle.assign(F.conv2d(x, weight, None, stride, padding, dilation, groups))

    program = paddle.jit.to_static(convolve, full_graph=True)

    def forward(x):
        if x.dtype != paddle.float32:
            return nn.Conv2D.forward(conv, x)
        result = program(x, conv.weight)
        return result if conv.bias is None else result + conv.bias.reshape([1, -1, 1, 1])

    return forward
