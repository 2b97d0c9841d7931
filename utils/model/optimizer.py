"""Updating the backbone: momentum SGD, AdamW and LARS with the gradient's scale, clip and skip decided outside.

Paddle's fused kernels do the arithmetic on tensors that are kept here: SGD is one kernel for all parameters, scale and
clip together one more where they change anything. State goes by structural name (``layer1.0.conv1.weight/velocity``),
never by Paddle's generated ones, so that a network built second in a process loads as well. Frozen parameters
(``stop_gradient``) take no part.
"""

import math

import numpy as np
import paddle

from utils.compat import adamw_step, momentum_steps, scale_all, split_sizes, squared_norms
from utils.errors import UserError


def trainable(layer: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """Structural name -> parameter, of those that are trained, in the layer's order."""
    return {name: parameter for name, parameter in layer.named_parameters() if not parameter.stop_gradient}


def is_norm_or_bias(name: str, parameter: paddle.Tensor) -> bool:
    """Scales and shifts of norms, biases, PReLU slopes: everything with fewer than two axes."""
    return len(parameter.shape) < 2 or name.endswith(".bias")


def squared_gradient(gradients: list[paddle.Tensor]) -> paddle.Tensor:
    """Sum of squares of all these tensors as they are (scaled), float64 [1] on the device: nothing waits.

    One kernel a tensor, in the tensor's precision: inf or NaN in a gradient, or squares that leave float32, give inf or
    NaN here, and the update is to be skipped.
    """
    if not gradients:
        return paddle.zeros([1], "float64")
    with paddle.no_grad():
        return squared_norms(gradients).astype("float64").sum().reshape([1])


def unscaled_norm(square: float, grad_scale: float = 1.0) -> float:
    """Global norm of gradients divided by ``grad_scale``, from the sum of their squares; NaN if that is no number."""
    return math.sqrt(square) / grad_scale if square >= 0 and math.isfinite(square) else math.nan


def gradient_norm(parameters: list[paddle.Tensor], grad_scale: float = 1.0) -> float:
    """Global L2 norm of the gradients divided by ``grad_scale``; NaN if one of them is not finite. The host waits.

    Divided first, so that a large loss scale does not overflow the squares.
    """
    gradients = [grad for parameter in parameters if (grad := parameter.grad) is not None]
    if grad_scale != 1.0:
        gradients = [each * (1.0 / grad_scale) for each in gradients]
    return unscaled_norm(squared_gradient(gradients).item())


def clip_coefficient(norm: float, clip_norm: float) -> float:
    """Factor that brings a gradient of this global norm to at most ``clip_norm``; 0 means no clipping."""
    return 1.0 if clip_norm == 0 or norm <= clip_norm else clip_norm / norm


class BackboneOptimizer:
    """One optimiser over named parameters.

    sgd (velocity v, decay d):      v = momentum * v + g + d * w;           w -= lr * v
    adamw:                          Loshchilov and Hutter 2019, decoupled decay
    lars (You et al. 2017):         v = momentum * v + lr * ratio * (g + d * w);   w -= v
                                    ratio = trust * |w| / (|g| + d * |w|), 1 for norms and biases

    Args:
        parameters: structural name -> parameter (``trainable``), all of one dtype.
        name: ``sgd``, ``adamw`` or ``lars``.
        decay_norm_bias: False leaves norms and biases undecayed.
    """

    def __init__(
        self,
        parameters: dict[str, paddle.Tensor],
        name: str = "sgd",
        momentum: float = 0.9,
        nesterov: bool = False,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 5e-4,
        decay_norm_bias: bool = True,
        trust: float = 0.001,
    ):
        if name not in ("sgd", "adamw", "lars"):
            raise UserError(f"optim.name: {name!r} is not one of sgd, adamw, lars")
        self.parameters = dict(parameters)
        self.name, self.trust, self.weight_decay = name, trust, weight_decay
        self.num_updates = 0
        self._momentum, self._nesterov = momentum, nesterov
        self._betas, self._epsilon = (beta1, beta2), epsilon
        undecayed = set() if decay_norm_bias else {n for n, p in parameters.items() if is_norm_or_bias(n, p)}
        self._decay = {n: 0.0 if n in undecayed else weight_decay for n in parameters}
        self._slots: dict[str, dict[str, paddle.Tensor]] = {}  # of the parameters that have had a gradient

    def step(self, lr: float, grad_coefficient: float = 1.0) -> None:
        """One update with every gradient multiplied by ``grad_coefficient`` (clipping, 1 / loss scale)."""
        with paddle.no_grad():
            named = {name: (p, grad) for name, p in self.parameters.items() if (grad := p.grad) is not None}
            for name in named.keys() - self._slots.keys():
                self._slots[name] = self._fresh_slots(self.parameters[name])
            gradients = [grad for _, grad in named.values()]
            if grad_coefficient != 1.0 and named:
                scale_all(gradients, grad_coefficient)
            if named:
                {"sgd": self._sgd, "adamw": self._adamw, "lars": self._lars}[self.name](named, gradients, lr)
        self.num_updates += 1

    def gradients(self) -> list[paddle.Tensor]:
        """Of the parameters that have one, in their order."""
        return [grad for parameter in self.parameters.values() if (grad := parameter.grad) is not None]

    def clear_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.clear_gradient(False)

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the accumulators: ``<structural name>/<kind>``. Empty before the first update."""
        return {
            f"{name}/{kind}": np.array(tensor.numpy())
            for name in self.parameters
            for kind, tensor in self._slots.get(name, {}).items()
        }

    def load_state(self, state: dict[str, np.ndarray], num_updates: int | None = None) -> None:
        """Restore what ``state`` returned.

        Raises:
            UserError: names or shapes differ from this network's.
        """
        named = {key.rpartition("/")[0] for key in state}
        fresh = {name: self._fresh_slots(p) for name, p in self.parameters.items() if name in named}
        own = {f"{name}/{kind}": tensor for name, slots in fresh.items() for kind, tensor in slots.items()}
        if odd := sorted(set(own) ^ set(state)):
            raise UserError(f"optimiser state does not fit: {len(odd)} names differ, the first is {odd[0]!r}")
        for key, tensor in own.items():
            if list(tensor.shape) != list(state[key].shape):
                raise UserError(f"optimiser state {key}: shape {list(state[key].shape)} is not {list(tensor.shape)}")
            tensor.set_value(state[key].astype(str(tensor.dtype).split(".")[-1]))
        self._slots = fresh
        self.num_updates = num_updates or 0

    def _fresh_slots(self, parameter: paddle.Tensor) -> dict[str, paddle.Tensor]:
        if self.name != "adamw":
            return {"velocity": paddle.zeros_like(parameter)}
        slots = {kind: paddle.zeros_like(parameter) for kind in ("moment1", "moment2")}
        for number, beta in enumerate(self._betas, 1):
            # In host memory: the kernel takes the powers by value, and nobody reads a device for them.
            power_1 = paddle.to_tensor([beta], dtype=parameter.dtype, place=paddle.CPUPlace())
            slots[f"beta{number}_pow_acc"] = power_1
        return slots

    def _momentum_step(self, named: dict, gradients: list, lr: float, decays: list[float]) -> None:
        weights = [parameter for parameter, _ in named.values()]
        velocities = [self._slots[name]["velocity"] for name in named]
        lr_1 = paddle.full([1], lr, weights[0].dtype)
        rule = {"momentum": self._momentum, "decays": decays, "nesterov": self._nesterov}
        momentum_steps(weights, gradients, velocities, lr_1, **rule)

    def _sgd(self, named: dict, gradients: list, lr: float) -> None:
        self._momentum_step(named, gradients, lr, [self._decay[name] for name in named])

    def _lars(self, named: dict, gradients: list, lr: float) -> None:
        adapted = [name for name, (parameter, _) in named.items() if not is_norm_or_bias(name, parameter)]
        factors = self._lars_factors([named[name] for name in adapted], lr) if adapted else []
        factor_of = dict(zip(adapted, factors, strict=True))
        gradients = [
            (gradient + parameter * self._decay[name]) * factor_of.get(name, lr)
            for name, (parameter, gradient) in named.items()
        ]
        self._momentum_step(named, gradients, 1.0, [0.0] * len(named))

    def _lars_factors(self, pairs: list[tuple], lr: float) -> list[paddle.Tensor]:
        """``lr * ratio`` of these (parameter, gradient), [1] each, worked out for all at once."""
        weight_norm_n, gradient_norm_n = (squared_norms(list(each)).sqrt() for each in zip(*pairs, strict=True))
        denominator_n = gradient_norm_n + weight_norm_n * self.weight_decay
        ones_n = paddle.ones_like(weight_norm_n)
        ratio_n = weight_norm_n * self.trust / paddle.where(denominator_n > 0, denominator_n, ones_n)
        ratio_n = paddle.where((weight_norm_n > 0) & (denominator_n > 0), ratio_n, ones_n)
        return split_sizes(ratio_n * lr, [1] * len(pairs))

    def _adamw(self, named: dict, gradients: list, lr: float) -> None:
        lr_1 = paddle.full([1], lr, gradients[0].dtype)
        for name, (parameter, gradient) in named.items():
            rule = {"betas": self._betas, "epsilon": self._epsilon, "decay": self._decay[name]}
            adamw_step(parameter, gradient, lr_1, self._slots[name], **rule)
