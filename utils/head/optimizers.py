"""Optimisers for the class rows: only the rows of an update are touched, whatever the rest has missed.

The arithmetic is written once for numpy arrays and Paddle tensors (in place on the first, rebound on the second): a
kernel hands in one chunk of rows and writes back what it gets.

Legend: N local rows, S rows of one update, D row length, A ages; ``w`` weight, ``v`` momentum, ``g`` gradient,
``mu`` momentum factor, ``wd`` weight decay, ``lr`` learning rate.
"""

import numpy as np

from utils.compat import momentum_step
from utils.errors import UserError


class RowSGD:
    """SGD with momentum, as PyTorch and Paddle define it: ``v <- mu v + g + wd w``, ``w <- w - lr v``.

    ``update="sampled"`` applies it to sampled rows only (Partial FC v1: the others see neither decay nor momentum).

    ``update="dense"`` means what a dense optimiser does, to every row at every step, at the cost of ``sampled``. A row
    without gradient follows a linear recurrence,

        (w, v) <- T_t (w, v),   T_t = [[1 - lr_t wd, -lr_t mu], [wd, mu]],

    so a row last touched at step a catches up at step t with the product ``T_(t-1) ... T_a``. These products are kept
    forward for every age in float64 (each step multiplies all of them by the new T on the left); prefix products and
    their inverses would lose all digits, as det T = mu shrinks with every step. The table is bounded: the head flushes
    (catches every row up) when ``full``.

    Args:
        momentum: mu in [0, 1).
        weight_decay: wd, at least 0.
        update: ``"dense"`` or ``"sampled"``.
        max_ages: table entries before a flush is due.
    """

    slots = ("momentum",)
    counts_updates = False

    def __init__(self, momentum: float = 0.9, weight_decay: float = 5e-4, update: str = "dense", max_ages: int = 1024):
        if update not in ("dense", "sampled"):
            raise UserError(f"update: {update!r} is not one of dense, sampled")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum: {momentum} must lie in [0, 1)")
        if not weight_decay >= 0:
            raise UserError(f"weight_decay: {weight_decay} must be 0 or above")
        self.momentum, self.weight_decay = float(momentum), float(weight_decay)
        self.lazy = update == "dense"
        self.max_ages = max_ages
        self.product_A22 = np.eye(2)[None].copy()  # entry a: from stamp a to now; the last is the identity

    @property
    def now(self) -> int:
        """Stamp of a row that is up to date."""
        return len(self.product_A22) - 1

    @property
    def full(self) -> bool:
        """Whether the table has reached its bound and every row must be caught up."""
        return len(self.product_A22) > self.max_ages

    def restart(self) -> None:
        """All rows are up to date and stamped 0."""
        self.product_A22 = np.eye(2)[None].copy()

    def table(self) -> dict[str, np.ndarray]:
        """What a checkpoint stores beside the rows."""
        return {"transition": self.product_A22.copy()} if self.lazy else {}

    def load(self, table: dict[str, np.ndarray], highest_stamp: int) -> None:
        """Take back ``table``, for rows stamped up to ``highest_stamp``."""
        found = np.array(table.get("transition", 0.0), dtype=np.float64)
        if found.ndim != 3 or found.shape[1:] != (2, 2) or not 0 <= highest_stamp < len(found):
            raise UserError(f"head state: transition {found.shape}, [ages, 2, 2] needed, ages above {highest_stamp}")
        self.product_A22 = found

    def advance(self, lr: float) -> None:
        """One step has been applied to the sampled rows; what it means for the others joins the table."""
        if not self.lazy:
            return
        mu, wd = self.momentum, self.weight_decay
        step_22 = np.array([[1 - lr * wd, -lr * mu], [wd, mu]])
        self.product_A22 = np.concatenate([step_22 @ self.product_A22, np.eye(2)[None]])

    def missed(self, stamp_S: np.ndarray) -> np.ndarray | None:
        """Catch-up matrices [S, 2, 2] of rows with these stamps; None if all are up to date."""
        if not self.lazy or (stamp_S == self.now).all():
            return None
        return self.product_A22[stamp_S]

    @staticmethod
    def catch_up(w_SD, v_SD, missed_S22):
        """(w, v) brought from their stamps to now; numpy arrays are overwritten."""
        p = missed_S22[:, :, :, None]
        fresh_v_SD = w_SD * p[:, 1, 0]
        w_SD *= p[:, 0, 0]
        w_SD += v_SD * p[:, 0, 1]
        v_SD *= p[:, 1, 1]
        v_SD += fresh_v_SD
        return w_SD, v_SD

    @staticmethod
    def catch_up_weight(w_SD, v_SD, missed_S22):
        """w alone, as ``catch_up`` gives it, for the forward pass; both numpy arrays are overwritten."""
        w_SD *= missed_S22[:, 0, 0, None]
        v_SD *= missed_S22[:, 0, 1, None]
        w_SD += v_SD
        return w_SD

    def fused_step(self, w_SD, v_SD, g_SD, lr_1) -> None:
        """``step`` for Paddle tensors of float32, projected gradient, in place and in one pass; ``lr_1``: [1]."""
        momentum_step(w_SD, g_SD, v_SD, lr_1, momentum=self.momentum, decay=self.weight_decay)

    def step(self, w_SD, slots: tuple, g_SD, along_S1, lr: float, count_S=None):
        """One update of up-to-date rows with the gradient ``g - along * w``; returns (w, v).

        Decay and projection are one multiple of w. Numpy arrays, ``g`` too, are overwritten.
        """
        (v_SD,) = slots
        scratch_SD = w_SD * (self.weight_decay - along_S1)
        g_SD += scratch_SD
        v_SD *= self.momentum
        v_SD += g_SD
        w_SD -= np.multiply(v_SD, lr, out=scratch_SD) if isinstance(v_SD, np.ndarray) else v_SD * lr
        return w_SD, v_SD


class RowAdamW:
    """AdamW (Loshchilov and Hutter 2019, alg. 2) on sampled rows: rows out of the draw keep weight and moments.

    ``m <- b1 m + (1-b1) g``, ``n <- b2 n + (1-b2) g^2``, ``w <- w - lr wd w - lr (m / c1) / (sqrt(n / c2) + eps)`` with
    ``c = 1 - b^count``, where ``count`` is the row's own number of updates: a global one would call the moments of
    rarely sampled rows converged when they are not.
    """

    slots = ("moment1", "moment2")
    lazy = False
    counts_updates = True

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.1):
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and epsilon > 0 and weight_decay >= 0):
            raise UserError(
                f"adamw: betas in [0, 1), epsilon > 0, weight_decay >= 0 needed, "
                f"got {beta1}, {beta2}, {epsilon}, {weight_decay}"
            )
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, float(weight_decay)

    def table(self) -> dict[str, np.ndarray]:
        """Nothing: all that AdamW keeps belongs to rows."""
        return {}

    def step(self, w_SD, slots: tuple, g_SD, along_S1, lr: float, count_S=None):
        """One update with the gradient ``g - along * w``; ``count_S``: which one it is for each row, from 1.

        Returns (w, m, n). Numpy arrays, ``g`` too, are overwritten.
        """
        m_SD, n_SD = slots
        g_SD -= along_S1 * w_SD
        correction1_S1 = 1.0 - self.beta1 ** count_S[:, None]
        correction2_S1 = 1.0 - self.beta2 ** count_S[:, None]
        m_SD *= self.beta1
        m_SD += (1.0 - self.beta1) * g_SD
        n_SD *= self.beta2
        n_SD += (1.0 - self.beta2) * (g_SD * g_SD)
        w_SD *= 1.0 - lr * self.weight_decay
        w_SD -= (lr * m_SD / correction1_S1) / ((n_SD / correction2_S1) ** 0.5 + self.epsilon)
        return w_SD, m_SD, n_SD


def build_optimizer(
    name: str, update: str | None, momentum: float, weight_decay: float | None, betas: tuple, epsilon: float
) -> RowSGD | RowAdamW:
    """Row optimiser ``"sgd"`` or ``"adamw"``; ``None`` stands for the optimiser's own default."""
    if name == "sgd":
        return RowSGD(momentum, 5e-4 if weight_decay is None else weight_decay, update or "dense")
    if name == "adamw":
        if update not in (None, "sampled"):
            raise UserError(f"update: adamw rows are updated when sampled; got {update!r}, use 'sampled'")
        return RowAdamW(*betas, epsilon, 0.1 if weight_decay is None else weight_decay)
    raise UserError(f"optimizer: {name!r} is not one of sgd, adamw")
