"""An exponentially averaged copy of the backbone, for evaluation: shadow = d * shadow + (1 - d) * weight.

Running statistics of batch norms are averaged with the same decay. The first updates use min(d, (1 + n) / (10 + n)), n
counted from 0, so that the random start is forgotten quickly.
"""

import contextlib

import numpy as np
import paddle

from utils.errors import UserError


class Ema:
    """Shadow of a layer's ``state_dict``; entries that are not floating point are copied."""

    def __init__(self, layer: paddle.nn.Layer, decay: float):
        self.decay, self.num_updates = decay, 0
        self.shadow = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}

    def update(self, layer: paddle.nn.Layer) -> None:
        """Call after every update that was not skipped."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        with paddle.no_grad():
            for name, tensor in layer.state_dict().items():
                if tensor.is_floating_point():
                    self.shadow[name].scale_(decay).add_(tensor.detach() * (1 - decay))
                else:
                    self.shadow[name] = tensor.detach().clone()

    @contextlib.contextmanager
    def applied_to(self, layer: paddle.nn.Layer):
        """The layer holds the averaged weights inside, its own again afterwards, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
        self._write(layer, self.shadow)
        try:
            yield layer
        finally:
            self._write(layer, own)

    @staticmethod
    def _write(layer: paddle.nn.Layer, values: dict[str, paddle.Tensor]) -> None:
        with paddle.no_grad():
            for name, tensor in layer.state_dict().items():
                tensor.set_value(values[name])

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the shadow by structural name."""
        return {name: np.array(tensor.numpy()) for name, tensor in self.shadow.items()}

    def load_state(self, state: dict[str, np.ndarray], num_updates: int) -> None:
        """Restore what ``state`` returned."""
        if odd := sorted(set(state) ^ set(self.shadow)):
            raise UserError(f"averaged weights do not fit: {len(odd)} names differ, the first is {odd[0]!r}")
        self.shadow = {name: paddle.to_tensor(value) for name, value in state.items()}
        self.num_updates = num_updates
