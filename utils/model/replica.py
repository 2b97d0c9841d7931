"""One copy of the backbone a rank: gradients and running statistics averaged; the same code for 1..W ranks."""

import contextlib

import paddle

from utils import distributed
from utils.compat import split_sizes
from utils.errors import UserError
from utils.model.compile import compile_backbone


class Replica:
    """The backbone as it is trained.

    Args:
        backbone: the layer; its parameters are made equal to rank 0's.
        sync_bn: batch norms see the batch of all ranks (GPU only).
        recompute: the backbone drops activations; its gradients are then averaged after backward, because the layer's
            hooks would fire while it is run again.
        compile: run the forward compiled (``utils/model/compile.py``).
    """

    def __init__(
        self, backbone: paddle.nn.Layer, sync_bn: bool = False, recompute: bool = False, compile: bool = False
    ):
        self.world_size = distributed.get_world_size()
        if sync_bn:
            if paddle.get_device() == "cpu":
                raise UserError("run.sync_bn: true on cpu, where Paddle has no such kernel; set run.sync_bn=false")
            _synchronise_norms(backbone)
        self.backbone = backbone
        self._average_later = recompute and self.world_size > 1
        parameters = {id(parameter) for parameter in backbone.parameters()}
        # Batch-norm statistics are parameters to Paddle (trainable=False) or buffers, by version; both are caught.
        self._statistics = [
            tensor
            for name, tensor in backbone.state_dict().items()
            if (id(tensor) not in parameters or name.endswith(("._mean", "._variance"))) and tensor.is_floating_point()
        ]
        self._sizes = [int(tensor.size) for tensor in self._statistics]
        self._flat = all(tensor.ndim == 1 for tensor in self._statistics)  # asked here once: each time it is a call
        self.remember_statistics()
        self._mean: paddle.Tensor | None = None  # of the statistics over ranks, from ``sum_figures`` to the end
        forward = compile_backbone(backbone) if compile else backbone
        self.model = paddle.DataParallel(forward) if self.world_size > 1 else forward

    def __call__(self, image_BCHW: paddle.Tensor) -> paddle.Tensor:
        return self.model(image_BCHW)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of one micro-batch's forward and backward: gradients are averaged over ranks in the last one only."""
        if self.world_size == 1 or (last and not self._average_later):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def finish_backward(self) -> None:
        """After the last micro-batch's backward."""
        if self._average_later:
            distributed.average_gradients([p for p in self.backbone.parameters() if not p.stop_gradient])

    def sum_figures(self, values: list) -> paddle.Tensor:
        """``utils.distributed.sum_figures`` of the update; the running statistics go along in its message."""
        flat = self._flat_statistics()
        figures, total = distributed.sum_figures(values, flat)
        self._mean = flat
        if total is not flat:
            self._mean = total.scale_(1.0 / self.world_size).astype(flat.dtype)
        return figures

    def finish_update(self, skipped: bool) -> None:
        """Running means and variances become their mean over ranks, so that all ranks hold one and the same backbone.

        Done after every update, not when saving: what a checkpoint's cadence is must not change the run. A skipped
        update puts them back, or a NaN in one batch would stay in them for good. ``sum_figures`` comes before it.
        """
        mean, self._mean = self._mean, None
        if not self._statistics:
            return
        with paddle.no_grad():
            if skipped:
                self._write_statistics(self._good)
                return
            if self.world_size > 1:
                self._write_statistics(mean)
            self._good = mean

    def remember_statistics(self) -> None:
        """Take the present statistics as the good ones (after loading weights)."""
        self._good = self._flat_statistics()

    def _flat_statistics(self) -> paddle.Tensor | None:
        if not self._statistics:
            return None
        with paddle.no_grad():
            parts = self._statistics
            return paddle.concat(parts if self._flat else [each.reshape([-1]) for each in parts])

    def _write_statistics(self, flat: paddle.Tensor) -> None:
        """The parts of ``flat`` become the statistics' own memory: one call, where copies would be one for each."""
        for tensor, part in zip(self._statistics, split_sizes(flat, self._sizes), strict=True):
            part = part if self._flat else part.reshape(tensor.shape)
            tensor.get_tensor()._share_data_with(part.get_tensor())


def _synchronise_norms(layer: paddle.nn.Layer) -> None:
    """Every batch norm over feature maps takes its statistics from all ranks; each keeps its train or eval mode.

    The embedding's norm stays as it is: its frozen scale needs the arithmetic of ``FrozenScaleNorm``.
    """
    for name, part in list(layer.named_children()):
        if isinstance(part, paddle.nn.BatchNorm2D):
            synchronised = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(part)
            synchronised.training = part.training
            setattr(layer, name, synchronised)
        else:
            _synchronise_norms(part)
