"""What the two kernels of the head share: storage of the class rows, and what a micro-batch leaves behind.

Legend: N local rows, S rows of the update, G samples of all ranks, D row length, T targets on this shard, K chunks.
"""

import dataclasses

import numpy as np
import paddle

NO_MAX = -1e30  # running maximum before any logit; finite, so that a difference of two is not NaN
TINY = 1e-12  # a shorter vector has no direction: similarity 0, gradient 0


@dataclasses.dataclass
class RowBank:
    """Storage of a shard: the rows, what their optimiser keeps for each, and what they have missed."""

    weight: paddle.Tensor  # [N, D]
    slots: list  # tensors [N, D], in the optimiser's order
    optimizer: object  # utils.row_optim
    stamp_N: np.ndarray  # int32: last update of a row (lazy SGD) or how many it had (AdamW)

    @property
    def num_rows(self) -> int:
        return self.weight.shape[0]

    def missed(self, rows) -> np.ndarray | None:
        """Catch-up matrices [R, 2, 2] of these rows (slice or ids); None if there is nothing to catch up."""
        return self.optimizer.missed(self.stamp_N[rows]) if self.optimizer.lazy else None


@dataclasses.dataclass
class Record:
    """What one micro-batch leaves for the row gradients until ``step``; ``exp`` and ``shift`` belong to the kernel."""

    exp: object  # [S, G]: inv * exp(z - shift), 0 at the targets
    shift: object  # [K, G]: what chunk k was shifted by
    u_GD: paddle.Tensor
    row_T: np.ndarray  # positions of the targets in the rows of the update, ascending
    col_T: np.ndarray  # their samples
    inv_G: paddle.Tensor  # inverse norm of each sample's target row, 0 where another rank has it
    top_G: paddle.Tensor | None = None  # set by backward: global maximum of z
    coef_G: paddle.Tensor | None = None  # d loss / d q of a non-target, over exp(z - top)
    target_G: paddle.Tensor | None = None  # d loss / d q of the targets


@dataclasses.dataclass
class Forward:
    """This rank's pieces of the softmax over non-targets, and its targets."""

    top_G: paddle.Tensor  # maximum of z
    sum_G: paddle.Tensor  # sum of exp(z - top)
    pull_GD: paddle.Tensor  # sum of exp(z - top) * w / |w|
    q_G: paddle.Tensor  # similarity of the target, 0 where another rank has it
    w_GD: paddle.Tensor  # w / |w| of the target, likewise
    record: Record | None  # None without gradients
