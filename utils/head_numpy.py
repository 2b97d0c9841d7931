"""The head's chunk arithmetic on CPU: numpy on cache-sized chunks of class rows, spread over threads.

The same passes as ``utils/head_paddle.py``, where each method and equation is explained; tests hold the two equal.
Numpy works in place, in the memory of the Paddle tensors, and releases the GIL in products and elementwise passes.

Legend: as in ``utils/head_paddle.py``; K chunks.
"""

import ctypes
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import threadpoolctl

from utils.head_rows import NO_MAX, TINY, Forward, Record, RowBank

_CTYPES = {"float32": ctypes.c_float, "float64": ctypes.c_double}


def view(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as an array, valid while the tensor lives."""
    pointer = ctypes.cast(tensor.data_ptr(), ctypes.POINTER(_CTYPES[str(tensor.dtype).split(".")[-1]]))
    return np.ctypeslib.as_array(pointer, shape=tuple(tensor.shape))


@functools.lru_cache(maxsize=1)
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


class NumpyKernel:
    """Chunked passes over the rows of an update.

    Args:
        num_threads: chunks in flight at once, each with single-threaded products.
        chunk_rows: rows a chunk; they should stay in the cache of one core.
    """

    def __init__(self, num_threads: int = 1, chunk_rows: int = 1024):
        self.num_threads, self.chunk_rows = num_threads, chunk_rows
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def _run(self, work, num_rows: int) -> list:
        """work([(chunk index, start, stop), ...]) on contiguous shares of all chunks; results in order."""
        starts = range(0, num_rows, self.chunk_rows)
        chunks = [(k, start, min(start + self.chunk_rows, num_rows)) for k, start in enumerate(starts)]
        cuts = [len(chunks) * i // self.num_threads for i in range(self.num_threads + 1)]
        shares = [chunks[a:b] for a, b in itertools.pairwise(cuts) if b > a]
        if len(shares) < 2:
            return [work(share) for share in shares]
        with _blas().limit(limits=1):
            return list(self._pool.map(work, shares))

    def _rows(self, bank: RowBank, ids_S, start: int, stop: int, dtype, with_slots: bool):
        """(rows, w, slots) of one chunk, caught up; views of the storage where nothing changes on the way."""
        rows = slice(start, stop) if ids_S is None else ids_S[start:stop]
        missed = bank.missed(rows)
        tensors = [bank.weight, *bank.slots] if with_slots or missed is not None else [bank.weight]
        w_RD, *slots = [view(tensor)[rows].astype(dtype, copy=False) for tensor in tensors]
        if missed is not None:
            w_RD, *slots = bank.optimizer.catch_up(w_RD, *slots, missed.astype(dtype))
        return rows, w_RD, tuple(slots)

    def forward(self, bank: RowBank, ids_S, u_GD, margin, row_T, col_T, keep: bool) -> Forward:
        u_DG = np.ascontiguousarray(u_GD.numpy().T)
        (dim, num_samples), dtype = u_DG.shape, u_DG.dtype
        num_rows = bank.num_rows if ids_S is None else len(ids_S)
        exp_SG = np.empty([num_rows, num_samples], dtype)
        shift_KG = np.empty([-(-num_rows // self.chunk_rows), num_samples], dtype)
        q_G, inv_G, w_GD = (
            np.zeros(num_samples, dtype),
            np.zeros(num_samples, dtype),
            np.zeros([num_samples, dim], dtype),
        )

        def work(share):
            top_G, sum_G = np.full(num_samples, NO_MAX, dtype), np.zeros(num_samples)
            pull_GD = np.zeros([num_samples, dim], dtype)
            for k, start, stop in share:
                _, w_RD, _ = self._rows(bank, ids_S, start, stop, dtype, with_slots=False)
                inv_R1 = inverse_norm(w_RD) if margin.normalize_weight else np.ones([stop - start, 1], dtype)
                z_RG, keep_others = np.matmul(w_RD, u_DG, out=exp_SG[start:stop]), None
                z_RG *= inv_R1
                mine = slice(*np.searchsorted(row_T, [start, stop]))
                at = row_t, col_t = row_T[mine] - start, col_T[mine]
                q_G[col_t], inv_G[col_t] = z_RG[at], inv_R1[row_t, 0]
                w_GD[col_t] = w_RD[row_t] * inv_R1[row_t]
                if margin.changes_others:
                    z_RG[:], keep_others = margin.others(z_RG)
                if margin.scale != 1:
                    z_RG *= margin.scale
                z_RG[at] = -np.inf
                np.maximum(top_G, z_RG.max(axis=0), out=shift_KG[k])
                z_RG -= shift_KG[k]
                np.exp(z_RG, out=z_RG)
                fade_G = np.exp(top_G - shift_KG[k])
                sum_G = sum_G * fade_G + z_RG.sum(axis=0)
                top_G = shift_KG[k]
                if keep:
                    z_RG *= inv_R1 if keep_others is None else inv_R1 * keep_others
                    pull_GD *= fade_G[:, None]
                    pull_GD += z_RG.T @ w_RD
            return top_G, sum_G, pull_GD

        parts = self._run(work, num_rows) or [work([])]
        top_G = np.max([part[0] for part in parts], axis=0)
        fades = [np.exp(part[0] - top_G) for part in parts]
        sum_G = sum(part[1] * fade_G for part, fade_G in zip(parts, fades, strict=True))
        pull_GD = sum(part[2] * fade_G[:, None] for part, fade_G in zip(parts, fades, strict=True))
        arrays = (top_G, sum_G.astype(dtype), pull_GD, q_G, w_GD, inv_G)
        *tensors, inv_G = [paddle.to_tensor(array) for array in arrays]
        return Forward(*tensors, Record(exp_SG, shift_KG, u_GD, row_T, col_T, inv_G) if keep else None)

    def _pull_on_rows(self, k: int, start: int, stop: int, records: list[Record], total_RD=None):
        for record in records:
            u_GD, coef_G = view(record.u_GD), view(record.coef_G)
            scaled_GD = u_GD * (np.exp(record.shift[k] - view(record.top_G)) * coef_G)[:, None]
            pull_RD = record.exp[start:stop] @ scaled_GD
            target_G = view(record.inv_G) * view(record.target_G)
            for t in range(*np.searchsorted(record.row_T, [start, stop])):
                pull_RD[record.row_T[t] - start] += target_G[record.col_T[t]] * u_GD[record.col_T[t]]
            total_RD = pull_RD if total_RD is None else np.add(total_RD, pull_RD, out=pull_RD)
        return total_RD

    def fold(self, bank: RowBank, ids_S, records: list[Record], dense_SD):
        num_rows = bank.num_rows if ids_S is None else len(ids_S)
        if dense_SD is None:
            dense_SD = np.zeros([num_rows, bank.weight.shape[1]], records[0].exp.dtype)

        def work(share):
            for k, start, stop in share:
                dense_SD[start:stop] += self._pull_on_rows(k, start, stop, records)

        self._run(work, num_rows)
        return dense_SD

    def apply(self, bank: RowBank, ids_S, records, dense_SD, lr: float, grad_scale: float, project: bool) -> None:
        dtype = records[0].exp.dtype if records else dense_SD.dtype

        def work(share):
            for k, start, stop in share:
                rows, w_RD, slots = self._rows(bank, ids_S, start, stop, dtype, with_slots=True)
                folded_RD = None if dense_SD is None else dense_SD[start:stop]
                grad_RD = self._pull_on_rows(k, start, stop, records, folded_RD)
                if grad_scale != 1:
                    grad_RD *= dtype.type(grad_scale)
                if project:
                    along_R1 = np.einsum("rd,rd->r", grad_RD, w_RD)[:, None] * inverse_norm(w_RD) ** 2
                    grad_RD -= along_R1 * w_RD
                count_R = (bank.stamp_N[rows] + 1).astype(dtype)
                w_RD, slots = bank.optimizer.step(w_RD, slots, grad_RD, lr, count_R)
                for tensor, chunk_RD in zip([bank.weight, *bank.slots], [w_RD, *slots], strict=True):
                    stored = view(tensor)
                    if not np.may_share_memory(stored, chunk_RD):
                        stored[rows] = chunk_RD

        self._run(work, bank.num_rows if ids_S is None else len(ids_S))

    def caught_up(self, bank: RowBank, start: int, stop: int) -> tuple:
        _, w_RD, slots = self._rows(bank, None, start, stop, view(bank.weight).dtype, with_slots=True)
        return w_RD, *slots


def inverse_norm(x_RD: np.ndarray) -> np.ndarray:
    norm_R1 = np.sqrt(np.einsum("rd,rd->r", x_RD, x_RD))[:, None]
    return (norm_R1 > TINY) / np.maximum(norm_R1, TINY, dtype=x_RD.dtype)
