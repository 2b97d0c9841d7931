"""The numpy kernel with its element-wise passes fused by numba: SGD on rows of float32, what a run has by default.

Optional (``pip install '.[numba]'``). Products, chunks and threads are ``numpy_kernel``'s, and so is every update that
is not covered: other optimisers, float64, margins that change non-targets or leave weights unnormalised.
Letters as in ``paddle_kernel.py``; ``age_R`` which of the transitions ``table_A4`` (2x2, flat) brings a row up to date.
"""

import math

import numba
import numpy as np

from utils.head.draw import Draw
from utils.head.numpy_kernel import NumpyKernel, NumpyPass
from utils.head.optimizers import RowSGD
from utils.head.rows import TINY, RowBank, view

# Infinities and NaN stay what they are, for found_nonfinite to judge. Sums along a row may be reordered for SIMD.
_ordered = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
_fused = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
_ZERO, _HALF, _ONE = map(np.float32, (0, 0.5, 1))
_C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(3, 8))
_LOG2_E, _LN2_HIGH = np.float32(1 / math.log(2)), np.float32(0.693359375)  # 9 bits: n times it is exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_LOWEST = np.float32(-88.1)  # its power of two has the bits of 0


@_fused
def _caught_up(w_ND, v_ND, id_R, age_R, table_A4, out_RD):
    """Rows ``id_R``, up to date, into ``out_RD``."""
    for row in range(len(id_R)):
        stored, ww, wv = id_R[row], table_A4[age_R[row], 0], table_A4[age_R[row], 1]
        for d in range(w_ND.shape[1]):
            out_RD[row, d] = ww * w_ND[stored, d] + wv * v_ND[stored, d]


@_fused
def _inverse_norms(w_RD, tiny, inv_R1):
    for row in range(w_RD.shape[0]):
        square = _ZERO
        for d in range(w_RD.shape[1]):
            square += w_RD[row, d] * w_RD[row, d]
        norm = math.sqrt(square)
        inv_R1[row, 0] = _ZERO if norm <= tiny else _ONE / norm


@_ordered
def _exponentials(z_RG, inv_R1, row_t, col_t, shift_G, sum_G, bits_G):
    """``NumpyPass._exponentials``; relative error below 2e-7, 0 below the normal numbers.

    exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, ln(2) in two parts (Cody and Waite 1980), exp(r) by Taylor's series,
    2^n by its bits.
    """
    t, power_G = 0, bits_G.view(np.float32)
    for row in range(z_RG.shape[0]):
        for g in range(z_RG.shape[1]):
            z_RG[row, g] *= inv_R1[row, 0]
        while t < len(row_t) and row_t[t] == row:
            z_RG[row, col_t[t]] = -np.inf
            t += 1
        for g in range(z_RG.shape[1]):
            z = z_RG[row, g]
            shift_G[g] = z if z > shift_G[g] or z != z else shift_G[g]  # NaN stays, here and below
    for row in range(z_RG.shape[0]):
        for g in range(z_RG.shape[1]):
            x = z_RG[row, g] - shift_G[g]
            x = _LOWEST if x < _LOWEST else x
            n = np.floor(x * _LOG2_E + _HALF)
            r = (x - n * _LN2_HIGH) - n * _LN2_LOW
            p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _HALF
            z_RG[row, g] = p * r * r + r + _ONE
            bits_G[g] = (np.int32(n) + np.int32(127)) << np.int32(23)
        for g in range(z_RG.shape[1]):
            exp = z_RG[row, g] * power_G[g]
            sum_G[g] += exp
            z_RG[row, g] = exp * inv_R1[row, 0]


@_fused
def _sgd(w_ND, v_ND, id_R, age_R, table_A4, grad_RD, grad_scale, lr, momentum, decay, tiny):
    """Catch up rows ``id_R``, project the gradient, step, in place: one pass over memory."""
    for row in range(len(id_R)):
        stored, a = id_R[row], table_A4[age_R[row]]
        ww, wv, vw, vv = a[0], a[1], a[2], a[3]
        square, along = _ZERO, _ZERO
        for d in range(w_ND.shape[1]):
            w, v = w_ND[stored, d], v_ND[stored, d]
            fresh = ww * w + wv * v
            v_ND[stored, d] = vw * w + vv * v
            w_ND[stored, d] = fresh
            square += fresh * fresh
            along += fresh * grad_RD[row, d]
        factor = decay - (grad_scale * along / square if math.sqrt(square) > tiny else _ZERO)
        for d in range(w_ND.shape[1]):
            w = w_ND[stored, d]
            v = momentum * v_ND[stored, d] + grad_scale * grad_RD[row, d] + factor * w
            v_ND[stored, d] = v
            w_ND[stored, d] = w - lr * v


class NumbaKernel(NumpyKernel):
    """``NumpyKernel`` whose element-wise passes are fused where they can be."""

    def begin(self, *, bank: RowBank, draw: Draw, margin) -> NumpyPass:
        covered = isinstance(bank.optimizer, RowSGD) and view(bank.weight).dtype == np.float32
        covered = covered and margin.normalize_weight and not margin.changes_others
        return (NumbaPass if covered else NumpyPass)(self, bank, draw, margin)


class NumbaPass(NumpyPass):
    """One update; see ``protocol.RowPass``."""

    def __init__(self, kernel: NumbaKernel, bank: RowBank, draw: Draw, margin):
        super().__init__(kernel, bank, draw, margin)
        stamp_S = bank.stamp_N if draw.ids_S is None else bank.stamp_N[draw.ids_S]
        self._lags = bank.optimizer.lazy and not (stamp_S == bank.optimizer.now).all()
        table_A22 = bank.optimizer.product_A22 if self._lags else np.eye(2)[None]
        self._table_A4 = table_A22.reshape(-1, 4).astype(np.float32)
        self._age_S = stamp_S if self._lags else np.zeros_like(stamp_S)

    def _stored(self, start: int, stop: int) -> tuple:
        id_R = np.arange(start, stop) if self._ids_S is None else self._ids_S[start:stop]
        return *map(view, self._bank.tensors.values()), id_R, self._age_S[start:stop], self._table_A4

    def _rows(self, start: int, stop: int, buffer_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if buffer_RD.dtype != np.float32:
            return super()._rows(start, stop, buffer_RD)
        if self._ids_S is None and not self._lags:
            w_RD = view(self._bank.weight)[start:stop]
        else:
            w_RD = buffer_RD[: stop - start]
            _caught_up(*self._stored(start, stop), w_RD)
        inv_R1 = np.empty([stop - start, 1], np.float32)
        _inverse_norms(w_RD, np.float32(TINY), inv_R1)
        return w_RD, inv_R1

    def _exponentials(self, z_RG, inv_R1, at: tuple, top_G, shift_G, keep: bool) -> np.ndarray:
        if z_RG.dtype != np.float32:
            return super()._exponentials(z_RG, inv_R1, at, top_G, shift_G, keep)
        sum_G, shift_G[:] = np.zeros_like(top_G), top_G
        _exponentials(z_RG, inv_R1, *at, shift_G, sum_G, np.empty(len(top_G), np.int32))
        return sum_G

    def _step(self, start: int, stop: int, grad_RD: np.ndarray, lr: float, grad_scale: float) -> None:
        if grad_RD.dtype != np.float32:
            super()._step(start, stop, grad_RD, lr, grad_scale)
            return
        numbers = (grad_scale, lr, self._bank.optimizer.momentum, self._bank.optimizer.weight_decay, TINY)
        _sgd(*self._stored(start, stop), grad_RD, *map(np.float32, numbers))
