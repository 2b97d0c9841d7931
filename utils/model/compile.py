"""The ``run.compile`` switch: the same layer, trained faster; weights, names and results stay.

GPU: the whole backbone becomes one program (``paddle.jit.to_static``). CPU: each convolution becomes a program of its
own that oneDNN runs (about twice as fast, forward and backward), the rest stays in the dynamic graph: in a program of
the whole network oneDNN would take batch norm, PReLU and additions too, whose backward it runs by reference code at
a tenth of the speed.
"""

import types
from collections.abc import Callable

import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.static import InputSpec

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
            # A method, not a closure over the layer: a deep copy of the network must use the copy's own weights.
            part.forward = types.MethodType(_onednn_forward(part), part)
    return layer


def _onednn_forward(conv: nn.Conv2D) -> Callable:
    """What takes the place of ``Conv2D.forward``: (layer, image [B, C, H, W]) -> [B, C', H', W']."""
    stride, padding, dilation, groups = conv._stride, conv._updated_padding, conv._dilation, conv._groups

    def convolve(x, weight):
        # The copy is what brings the result back into the plain layout: a program that ends in a oneDNN operation
        # hands out its private layout, which the dynamic graph cannot read (and see eval/engines.py, _CopyOut).
        return paddle.assign(F.conv2d(x, weight, None, stride, padding, dilation, groups))

    # Any batch and any image size, so that a smaller last batch is not another program.
    specs = [InputSpec([None, conv._in_channels, None, None], "float32"), InputSpec(conv.weight.shape, "float32")]
    program = paddle.jit.to_static(convolve, input_spec=specs, full_graph=True)

    def forward(self, x):
        if x.dtype != paddle.float32 or not paddle.in_dynamic_mode():
            return nn.Conv2D.forward(self, x)
        result = program(x, self.weight)
        return result if self.bias is None else result + self.bias.reshape([1, -1, 1, 1])

    return forward
