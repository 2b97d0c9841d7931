"""Differences between Paddle 2.6 and 3.x, and the fused kernels that both have without a public name."""

import functools

import numpy as np
import paddle


def paddle_version() -> tuple[int, int]:
    """(major, minor) of the installed Paddle, e.g. (3, 3)."""
    major, minor = paddle.__version__.split(".")[:2]
    return int(major), int(minor)


def share_numpy(array: np.ndarray) -> paddle.Tensor:
    """A CPU tensor on the array's own memory (DLPack); it keeps the array alive. Paddle 2.6 takes capsules only."""
    from paddle.utils import dlpack

    return dlpack.from_dlpack(array.__dlpack__())


def squared_norms(tensors: list) -> paddle.Tensor:
    """Sum of squares of each tensor, [n], in its own precision: one kernel a tensor."""
    return paddle.concat(list(map(paddle._C_ops.squared_l2_norm, tensors)))


def split_sizes(vector: paddle.Tensor, sizes: list[int]) -> list[paddle.Tensor]:
    """A vector cut into parts of these sizes; ``paddle.split`` first looks for tensors among them, one by one."""
    return paddle._C_ops.split(vector, sizes, 0)


def momentum_step(weight, gradient, velocity, lr_1, *, momentum: float, decay: float, nesterov: bool = False) -> None:
    """``v = momentum v + g + decay w;  w -= lr v`` in one kernel, in place; ``lr_1`` is a tensor [1] of their dtype.

    Nesterov's: ``w -= lr (g + decay w + momentum v)``. The kernel's own factor on the gradient stays 1: on CPU it is
    passed over.
    """
    rule = "l2_decay" if decay else ""
    paddle._C_ops.momentum_(weight, gradient, velocity, lr_1, None, momentum, nesterov, rule, decay, False, 1.0)


def _merged_momentum(weights, gradients, velocities, lr_1, *, momentum: float, decays: list, nesterov: bool) -> None:
    rules, lrs = ["l2_decay" if decay else "" for decay in decays], [lr_1]
    rest = (momentum, nesterov, rules, decays, False, 1.0)
    paddle._C_ops.merged_momentum_(weights, gradients, velocities, lrs, None, *rest)


def momentum_steps(weights, gradients, velocities, lr_1, *, momentum: float, decays: list, nesterov: bool) -> None:
    """``momentum_step`` of lists of tensors of one dtype: in one kernel where the device has it."""
    lists = (weights, gradients, velocities)
    if has_merged_momentum(paddle.get_device()):
        _merged_momentum(*lists, lr_1, momentum=momentum, decays=decays, nesterov=nesterov)
        return
    for *tensors, decay in zip(*lists, decays, strict=True):
        momentum_step(*tensors, lr_1, momentum=momentum, decay=decay, nesterov=nesterov)


@functools.cache
def has_merged_momentum(device: str) -> bool:
    """Whether the kernel works on this device: a plug-in may lack it, and the CPU's does not stand in. Tried once."""
    if device.startswith(("cpu", "gpu")):
        return True
    weight, velocity = paddle.ones([1]), paddle.ones([1])
    try:
        lr_1 = paddle.full([1], 0.5)
        _merged_momentum([weight], [weight.clone()], [velocity], lr_1, momentum=0.5, decays=[0.0], nesterov=False)
    except (ValueError, RuntimeError):
        return False
    return weight.item() == 0.25 and velocity.item() == 1.5


def adamw_step(weight, gradient, lr_1, slots: dict, *, betas: tuple, epsilon: float, decay: float) -> None:
    """AdamW of one tensor in place; ``slots``: moment1, moment2, beta1_pow_acc, beta2_pow_acc."""
    third, amsgrad = ([None], [False]) if paddle_version() >= (3, 0) else ([], [])
    moments, powers = (slots["moment1"], slots["moment2"], *third), (slots["beta1_pow_acc"], slots["beta2_pow_acc"])
    rest = (*betas, epsilon, 1.0, decay, decay != 0, False, 1000, False, False, *amsgrad)
    paddle._C_ops.adamw_(weight, gradient, lr_1, *moments, *powers, None, None, *rest)


def scale_all(tensors: list, factor: float) -> None:
    """``t *= factor`` of many tensors of one dtype, in place: one kernel on a device, on CPU one each."""
    if tensors[0].place.is_cpu_place():
        for tensor in tensors:
            paddle._C_ops.scale_(tensor, factor, 0.0, True)
        return
    paddle._C_ops.check_finite_and_unscale_(tensors, paddle.full([1], 1.0 / factor, tensors[0].dtype))
