"""Updating the backbone: momentum SGD, AdamW and LARS with the gradient's scale, clip and skip decided outside.

State is kept by structural parameter name (``layer1.0.conv1.weight/velocity``), never by Paddle's generated names, so
that a network built second in a process loads as well (trap 32). Frozen parameters (``stop_gradient``) take no part.
"""

import math
import re

import numpy as np
import paddle

from utils.errors import UserError

# Accumulators as Paddle names them: <parameter>_<kind>_<number>.
_KINDS = re.compile(r"_(velocity|moment1|moment2|beta1_pow_acc|beta2_pow_acc)_\d+$")


def trainable(layer: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """Structural name -> parameter, of those that are trained, in the layer's order."""
    return {name: parameter for name, parameter in layer.named_parameters() if not parameter.stop_gradient}


def is_norm_or_bias(name: str, parameter: paddle.Tensor) -> bool:
    """Scales and shifts of norms, biases, PReLU slopes: everything with fewer than two axes."""
    return len(parameter.shape) < 2 or name.endswith(".bias")


def gradient_norm(parameters: list[paddle.Tensor], grad_scale: float = 1.0) -> float:
    """Global L2 norm of the gradients divided by ``grad_scale``; infinite or NaN if one of them is.

    Every tensor's norm is taken after division by the scale, so a large loss scale does not overflow the squares.
    """
    factor = 1.0 / grad_scale
    with paddle.no_grad():
        squares = []
        for parameter in parameters:
            if parameter.grad is not None:
                flat = parameter.grad.reshape([-1])
                flat = flat if factor == 1.0 else flat * factor
                squares.append(paddle.dot(flat, flat).reshape([1]).astype("float64"))
        if not squares:
            return 0.0
        total = float(paddle.concat(squares).sum())
    return math.sqrt(total) if total >= 0 and math.isfinite(total) else math.nan


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
        parameters: structural name -> parameter (``trainable``).
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
        undecayed = set() if decay_norm_bias else {n for n, p in parameters.items() if is_norm_or_bias(n, p)}
        self._decay = {n: 0.0 if n in undecayed else weight_decay for n in parameters}
        self._optimizers = []
        for decay in sorted(set(self._decay.values())):
            group = [p for n, p in parameters.items() if self._decay[n] == decay]
            if name == "adamw":
                optimizer = paddle.optimizer.AdamW(
                    learning_rate=0.0, beta1=beta1, beta2=beta2, epsilon=epsilon, parameters=group, weight_decay=decay
                )
            else:
                optimizer = paddle.optimizer.Momentum(
                    learning_rate=0.0,
                    momentum=momentum,
                    parameters=group,
                    use_nesterov=nesterov,
                    # LARS decays inside its own ratio.
                    weight_decay=None if name == "lars" or decay == 0 else decay,
                )
            self._optimizers.append(optimizer)

    def step(self, lr: float, grad_coefficient: float = 1.0) -> None:
        """One update with every gradient multiplied by ``grad_coefficient`` (clipping, 1 / loss scale)."""
        with paddle.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.grad is None:
                    continue
                if self.name == "lars":
                    self._lars_gradient(name, parameter, lr, grad_coefficient)
                elif grad_coefficient != 1.0:
                    parameter.grad.scale_(grad_coefficient)
        self._update(1.0 if self.name == "lars" else lr)
        self.num_updates += 1

    def clear_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.clear_gradient(False)

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the accumulators: ``<structural name>/<kind>``. Empty before the first update."""
        return {key: np.array(tensor.numpy()) for key, tensor in self._accumulators().items()}

    def load_state(self, state: dict[str, np.ndarray], num_updates: int | None = None) -> None:
        """Restore what ``state`` returned.

        Raises:
            ValueError: names or shapes differ from this network's.
        """
        if not state:
            self.num_updates = num_updates or 0
            return
        if not self._accumulators():
            # Paddle makes its accumulators in the first step that has a gradient: one without effect (rate 0,
            # gradient 0), for those parameters that had one before.
            named = {key.rpartition("/")[0] for key in state}
            with paddle.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.grad = paddle.zeros_like(parameter) if name in named else None
            self._update(0.0)
            self.clear_grad()
        own = self._accumulators()
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))
            raise UserError(f"optimiser state does not fit: {len(odd)} names differ, the first is {odd[0]!r}")
        for key, tensor in own.items():
            if list(tensor.shape) != list(state[key].shape):
                raise UserError(f"optimiser state {key}: shape {list(state[key].shape)} is not {list(tensor.shape)}")
            tensor.set_value(state[key])
        self.num_updates = num_updates or 0

    def _update(self, lr: float) -> None:
        for optimizer in self._optimizers:
            optimizer.set_lr(lr)
            optimizer.step()

    def _lars_gradient(self, name: str, parameter: paddle.Tensor, lr: float, coefficient: float) -> None:
        gradient = parameter.grad * coefficient
        decay = self._decay[name]
        ratio = paddle.ones([], dtype=gradient.dtype)
        if not is_norm_or_bias(name, parameter):
            weight_norm = paddle.linalg.norm(parameter)
            denominator = paddle.linalg.norm(gradient) + decay * weight_norm
            adapted = self.trust * weight_norm / paddle.where(denominator > 0, denominator, ratio)
            ratio = paddle.where((weight_norm > 0) & (denominator > 0), adapted, ratio)
        parameter.grad = (gradient + decay * parameter) * (lr * ratio)

    def _accumulators(self) -> dict[str, paddle.Tensor]:
        structural = {parameter.name: name for name, parameter in self.parameters.items()}
        found = {}
        for optimizer in self._optimizers:
            for key, tensor in optimizer.state_dict().items():
                match = _KINDS.search(key)
                if match and key[: match.start()] in structural:
                    found[f"{structural[key[: match.start()]]}/{match.group(1)}"] = tensor
        return found
