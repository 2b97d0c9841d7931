"""What a kernel of the head is: the arithmetic of one update over this rank's class rows.

``numpy_kernel.py`` (CPU, threads; ``numba_kernel.py`` fuses its passes) and ``paddle_kernel.py`` (any device) do it.
``partial_fc.py`` sees this file's types alone; tests hold the kernels equal.

Legend: N local rows, S rows of the update, G samples of all ranks, D row length, T targets on this shard, K chunks.
"""

from dataclasses import dataclass
from typing import Protocol

import paddle

from utils.head.draw import Draw, Targets
from utils.head.rows import RowBank

NO_MAX = -1e30  # running maximum before any logit; finite, so that a difference of two is not NaN


@dataclass
class Residuals:
    """What one micro-batch's forward leaves for the row gradients; ``exp`` and ``shift`` are the kernel's own."""

    exp: object  # [S, G]: inv * exp(z - shift), 0 at the targets
    shift: object  # [K, G]: what chunk k was shifted by
    u_GD: paddle.Tensor
    targets: Targets
    inv_G: paddle.Tensor  # inverse norm of each sample's target row, 0 where another rank has it
    top_G: paddle.Tensor | None = None  # set by the head: global maximum of z
    coef_G: paddle.Tensor | None = None  # d loss / d q of a non-target, over exp(z - top)
    target_G: paddle.Tensor | None = None  # d loss / d q of the targets


@dataclass
class Forward:
    """This rank's pieces of the softmax over non-targets, and its targets."""

    top_G: paddle.Tensor  # maximum of z
    sum_G: paddle.Tensor  # sum of exp(z - top)
    pull_GD: paddle.Tensor  # sum of exp(z - top) * w / |w|
    mine_G: paddle.Tensor  # 1 where this shard has the sample's class, else 0
    q_G: paddle.Tensor  # similarity of the target, 0 where another rank has it
    w_GD: paddle.Tensor  # w / |w| of the target, likewise
    residuals: Residuals | None  # None without gradients


class RowPass(Protocol):
    """The rows of one update in a kernel's hands, from the draw to the step."""

    def forward(self, *, u_GD: paddle.Tensor, targets: Targets, keep: bool) -> Forward:
        """One pass over the rows; nothing stored changes.

        Args:
            u_GD: embeddings of all ranks, normalised if the margin says so; float32 or float64.
            targets: of this micro-batch.
            keep: whether gradients will be asked for.
        """

    def cosines(self, *, unit_GD: paddle.Tensor, targets: Targets) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(to the own class, 0 where another rank has it; to the nearest other of these rows), [G] each.

        Args:
            unit_GD: embeddings of all ranks, of unit length; rows are brought to it whatever the margin says.
        """

    def fold(self, *, residuals: list[Residuals], dense: object) -> object:
        """Residuals (and what was folded before, or None) as row gradients: smaller than they are beyond D samples."""

    def apply(self, *, residuals: list[Residuals], dense: object, lr: float, grad_scale: float) -> None:
        """One optimiser step on the rows of the update.

        For unit-length rows ``dq/dw = inv (u - q w inv)``, hence the projection ``g - (g . w) inv^2 w`` of the sum
        ``g`` of ``inv * (d loss / d q) * u`` over samples.
        """


class Kernel(Protocol):
    """Chunked passes over class rows."""

    def begin(self, *, bank: RowBank, draw: Draw, margin) -> RowPass:
        """Take up an update; on a device, everything that it needs from the host goes up here, in one transfer."""
