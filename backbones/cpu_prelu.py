"""PReLU for the CPU's dynamic graph: numpy on the tensors' own memory, in pieces that stay in the processor's cache.

Paddle's kernel runs on one thread, unvectorised, with a slow reduction for the weight: a sixth of an iresnet's step.

Shapes: B batch, C channels, P pixels of one image, K channels of one piece.
"""

import ctypes
import math
from collections.abc import Iterator

import numpy as np
import paddle
from paddle.autograd import PyLayer

_PIECE_BYTES = 128 * 1024
_SIGNED = {4: np.int32, 8: np.int64}


class CPUPReLU(PyLayer):
    """max(x, 0) + weight * min(x, 0) for x [B, C, ...] float32 or float64 and weight [C] or [1].

    At 0 the slope is the weight, as in PyTorch.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.frozen = x.stop_gradient, weight.stop_gradient
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        output = paddle.empty_like(x)
        x_BCP, output_BCP = _memory(x), _memory(output)
        weight_C1 = _per_channel(weight, x)
        work = np.empty(_piece_shape(x_BCP), x_BCP.dtype)
        for image, part in _pieces(x_BCP):
            x_KP, output_KP = x_BCP[image, part], output_BCP[image, part]
            work_KP = work[: len(x_KP)]
            np.minimum(x_KP, 0, out=work_KP)
            np.multiply(work_KP, weight_C1[part], out=work_KP)
            np.maximum(x_KP, 0, out=output_KP)
            np.add(output_KP, work_KP, out=output_KP)
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        grad = grad.contiguous()
        grad_x = paddle.empty_like(x)
        x_BCP, grad_BCP, output_BCP = _memory(x), _memory(grad), _memory(grad_x)
        weight_C1 = _per_channel(weight, x)
        signed = _SIGNED[x_BCP.itemsize]
        mask = np.empty(_piece_shape(x_BCP), signed)
        work = np.empty(mask.shape, x_BCP.dtype)
        sum_C = np.zeros(x_BCP.shape[1], np.float64)
        for image, part in _pieces(x_BCP):
            x_KP, grad_KP, output_KP = x_BCP[image, part], grad_BCP[image, part], output_BCP[image, part]
            mask_KP, work_KP = mask[: len(x_KP)], work[: len(x_KP)]
            # Every bit set where x <= 0: the sign of (bits | bits - 1), which counts both zeros, spread over the word.
            bits_KP = x_KP.view(signed)
            np.subtract(bits_KP, 1, out=mask_KP)
            np.bitwise_or(mask_KP, bits_KP, out=mask_KP)
            np.right_shift(mask_KP, x_BCP.itemsize * 8 - 1, out=mask_KP)
            np.bitwise_and(mask_KP, grad_KP.view(signed), out=mask_KP)
            negative_KP = mask_KP.view(x_BCP.dtype)  # the gradient where x <= 0, zero elsewhere
            np.minimum(x_KP, 0, out=work_KP)
            np.multiply(work_KP, grad_KP, out=work_KP)
            sum_C[part] += work_KP.sum(axis=1)
            np.subtract(grad_KP, negative_KP, out=output_KP)
            np.multiply(negative_KP, weight_C1[part], out=negative_KP)
            np.add(output_KP, negative_KP, out=output_KP)
        total_C = sum_C if weight.shape[0] == len(sum_C) else sum_C.sum(keepdims=True)
        grad_weight = paddle.to_tensor(total_C.astype(x_BCP.dtype), place=x.place)
        return tuple(None if frozen else each for frozen, each in zip(ctx.frozen, (grad_x, grad_weight), strict=True))


def _memory(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as [B, C, P]; valid while the tensor lives."""
    dtype = np.dtype({paddle.float32: np.float32, paddle.float64: np.float64}[tensor.dtype])
    num_values = math.prod(tensor.shape)
    memory = (ctypes.c_char * (num_values * dtype.itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype).reshape(tensor.shape[0], tensor.shape[1], -1)


def _per_channel(weight: paddle.Tensor, x: paddle.Tensor) -> np.ndarray:
    """The weight as [C, 1]."""
    return np.broadcast_to(weight.numpy(), [x.shape[1]]).reshape(-1, 1)


def _piece_shape(x_BCP: np.ndarray) -> tuple[int, int]:
    """(K, P): as many channels as fit into ``_PIECE_BYTES``, at least one."""
    _, num_channels, num_pixels = x_BCP.shape
    return min(num_channels, max(1, _PIECE_BYTES // (num_pixels * x_BCP.itemsize))), num_pixels


def _pieces(x_BCP: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(image, channels) of every piece."""
    step = _piece_shape(x_BCP)[0]
    for image in range(x_BCP.shape[0]):
        for start in range(0, x_BCP.shape[1], step):
            yield image, slice(start, start + step)
