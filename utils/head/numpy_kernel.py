"""The head's chunk arithmetic on CPU: numpy on cache-sized chunks of class rows, spread over threads.

The same passes as ``utils/head/paddle_kernel.py``, where each equation and letter is explained; tests hold the two
equal. It works in place in the memory of the Paddle tensors; numpy releases the GIL in products and passes.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import threadpoolctl

from utils.head.draw import Draw, Targets
from utils.head.protocol import NO_MAX, Forward, Residuals
from utils.head.rows import RowBank, inverse_norm, split_pieces, view


class NumpyKernel:
    """``num_threads`` chunks of ``chunk_rows`` rows in flight at a time, each with single-threaded products."""

    def __init__(self, num_threads: int = 1, chunk_rows: int = 4096):
        self.num_threads, self.chunk_rows = num_threads, chunk_rows
        self._pool = ThreadPoolExecutor(num_threads)
        self._blas = threadpoolctl.ThreadpoolController().select(internal_api="openblas")

    def begin(self, *, bank: RowBank, draw: Draw, margin) -> "NumpyPass":
        return NumpyPass(self, bank, draw, margin)

    def run(self, work, num_rows: int) -> list:
        """work([(chunk index, start, stop), ...]) on a contiguous share of the chunks for each thread, in order."""
        shares = split_chunks(num_rows, self.chunk_rows, self.num_threads)
        with self._blas.limit(limits=1):  # overflow is for found_nonfinite to judge
            return list(self._pool.map(np.errstate(all="ignore")(work), shares))


class NumpyPass:
    """One update; see ``protocol.RowPass``."""

    def __init__(self, kernel: NumpyKernel, bank: RowBank, draw: Draw, margin):
        self._kernel, self._bank, self._margin = kernel, bank, margin
        self._ids_S, self._num_rows = draw.ids_S, draw.num_rows

    def forward(self, *, u_GD: paddle.Tensor, targets: Targets, keep: bool) -> Forward:
        margin, chunk_rows = self._margin, self._kernel.chunk_rows
        (num_samples, dim), dtype = u_GD.shape, view(u_GD).dtype
        scaled_DG = np.ascontiguousarray(view(u_GD).T) * margin.scale
        exp_SG = np.empty([self._num_rows, num_samples], dtype)
        shift_KG = np.empty([-(-len(exp_SG) // chunk_rows), num_samples], dtype)
        mine_G, q_G, inv_G = (np.zeros(num_samples, dtype) for _ in range(3))
        w_GD = np.zeros([num_samples, dim], dtype)
        mine_G[targets.col_T] = 1

        def work(share):
            top_G, sum_G = np.full(num_samples, NO_MAX, dtype), np.zeros(num_samples)
            pull_GD, buffer_RD = np.zeros([num_samples, dim], dtype), np.empty([chunk_rows, dim], dtype)
            for k, start, stop in share:
                w_RD, inv_R1 = self._rows(start, stop, buffer_RD)
                z_RG = np.matmul(w_RD, scaled_DG, out=exp_SG[start:stop])
                at = row_t, col_t = targets_of_chunk(targets, start, stop)
                inv_G[col_t] = inv_R1[row_t, 0]
                q_G[col_t] = z_RG[at] * inv_G[col_t] / margin.scale
                w_GD[col_t] = w_RD[row_t] * inv_R1[row_t]
                part_G = self._exponentials(z_RG, inv_R1, at, top_G, shift_KG[k], keep)
                fade_G = np.exp(top_G - shift_KG[k])
                sum_G = sum_G * fade_G + part_G
                top_G = shift_KG[k]
                if keep:
                    pull_GD *= fade_G[:, None]
                    pull_GD += z_RG.T @ w_RD
            return top_G, sum_G, pull_GD

        parts = self._kernel.run(work, self._num_rows)
        top_G = np.max([part[0] for part in parts], axis=0)
        sum_G = sum(part[1] * np.exp(part[0] - top_G) for part in parts).astype(dtype)
        pull_GD = sum(part[2] * np.exp(part[0] - top_G)[:, None] for part in parts)
        *tensors, inv_G = map(paddle.to_tensor, (top_G, sum_G, pull_GD, mine_G, q_G, w_GD, inv_G))
        return Forward(*tensors, Residuals(exp_SG, shift_KG, u_GD, targets, inv_G) if keep else None)

    def _rows(self, start: int, stop: int, buffer_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(up-to-date rows of a chunk, in the buffer or stored ones; their inverse norms [R, 1])."""
        w_RD = self._bank.caught_up_weight(self._ids_S, start, stop, buffer_RD)
        return w_RD, inverse_norm(w_RD) if self._margin.normalize_weight else np.ones([stop - start, 1], w_RD.dtype)

    def _exponentials(self, z_RG, inv_R1, at: tuple, top_G, shift_G, keep: bool) -> np.ndarray:
        """Turn products into ``exp(z - shift)``, 0 at the targets ``at``; returns their sums [G].

        Args:
            z_RG: scale * w u, overwritten: times ``inv`` at the end if they are to be kept.
            inv_R1: inverse norms of the rows.
            at: (rows, columns) of the targets, rows ascending.
            top_G: maximum of the chunks before; ``shift_G`` is set to that with this chunk.
        """
        margin, keep_others = self._margin, None
        z_RG *= inv_R1
        if margin.changes_others:
            z_RG[:], keep_others = margin.others(z_RG / margin.scale)
            z_RG *= margin.scale
        z_RG[at] = -np.inf
        np.maximum(top_G, z_RG.max(axis=0), out=shift_G)
        z_RG -= shift_G
        np.exp(z_RG, out=z_RG)
        sum_G = z_RG.sum(axis=0)
        if keep:
            z_RG *= inv_R1 if keep_others is None else inv_R1 * keep_others
        return sum_G

    def cosines(self, *, unit_GD: paddle.Tensor, targets: Targets) -> tuple[paddle.Tensor, paddle.Tensor]:
        (num_samples, dim), unit_DG = unit_GD.shape, np.ascontiguousarray(view(unit_GD).T)
        own_G = np.zeros(num_samples, unit_DG.dtype)

        def work(share):
            top_G, buffer_RD = np.full_like(own_G, NO_MAX), np.empty([self._kernel.chunk_rows, dim], own_G.dtype)
            for _, start, stop in share:
                w_RD = self._bank.caught_up_weight(self._ids_S, start, stop, buffer_RD)
                q_RG = (w_RD @ unit_DG) * inverse_norm(w_RD)
                at = targets_of_chunk(targets, start, stop)
                own_G[at[1]], q_RG[at] = q_RG[at], NO_MAX
                np.maximum(top_G, q_RG.max(axis=0), out=top_G)
            return top_G

        top_G = np.max(self._kernel.run(work, self._num_rows), axis=0)
        return paddle.to_tensor(own_G), paddle.to_tensor(top_G)

    def fold(self, *, residuals: list[Residuals], dense):
        if dense is None:
            dense = np.zeros([self._num_rows, self._bank.weight.shape[1]], residuals[0].exp.dtype)
        self._kernel.run(lambda share: [_pull_on_rows(*chunk, residuals, dense) for chunk in share], self._num_rows)
        return dense

    def apply(self, *, residuals: list[Residuals], dense, lr: float, grad_scale: float) -> None:
        def work(share):
            for k, start, stop in share:
                self._step(start, stop, _pull_on_rows(k, start, stop, residuals, dense), lr, grad_scale)

        self._kernel.run(work, self._num_rows)

    def _step(self, start: int, stop: int, grad_RD: np.ndarray, lr: float, grad_scale: float) -> None:
        """Project the gradient of a chunk, which is overwritten, and apply it."""
        bank = self._bank
        for low, high in split_pieces(start, stop, grad_RD):
            rows = slice(low, high) if self._ids_S is None else self._ids_S[low:high]
            g_RD = grad_RD[low - start : high - start]
            w_RD, *slots = bank.caught_up_rows(rows, g_RD.dtype)
            if grad_scale != 1:
                g_RD *= grad_scale
            along_R1 = np.einsum("rd,rd->r", g_RD, w_RD)[:, None] * inverse_norm(w_RD) ** 2
            along_R1 *= float(self._margin.normalize_weight)
            count_R = (bank.stamp_N[rows] + 1).astype(g_RD.dtype)
            chunks = bank.optimizer.step(w_RD, slots, g_RD, along_S1=along_R1, lr=lr, count_S=count_R)
            for stored, chunk_RD in zip(map(view, (bank.weight, *bank.slots)), chunks, strict=True):
                if not np.may_share_memory(stored, chunk_RD):
                    stored[rows] = chunk_RD


def _pull_on_rows(k: int, start: int, stop: int, residuals: list[Residuals], dense_SD):
    """inv * sum over samples of (d loss / d q) * u: the row gradient before it is projected, [R, D]."""
    total_RD = None if dense_SD is None else dense_SD[start:stop]
    for each in residuals:
        u_GD, target_G = view(each.u_GD), view(each.inv_G) * view(each.target_G)
        coef_G = np.exp(each.shift[k] - view(each.top_G)) * view(each.coef_G)
        pull_RD = each.exp[start:stop] @ (u_GD * coef_G[:, None])
        row_t, col_t = targets_of_chunk(each.targets, start, stop)
        np.add.at(pull_RD, row_t, target_G[col_t, None] * u_GD[col_t])
        total_RD = pull_RD if total_RD is None else np.add(total_RD, pull_RD, out=total_RD)
    return total_RD


def targets_of_chunk(targets: Targets, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows counted from the chunk's first, samples) of the targets in rows ``start ... stop``."""
    inside = slice(*np.searchsorted(targets.row_T, [start, stop]))
    return targets.row_T[inside] - start, targets.col_T[inside]


def split_chunks(num_rows: int, chunk_rows: int, num_shares: int) -> list[list[tuple[int, int, int]]]:
    """Contiguous shares of about equal size of all chunks (index, start, stop); at least one share, maybe empty."""
    starts = range(0, num_rows, chunk_rows)
    chunks = [(k, start, min(start + chunk_rows, num_rows)) for k, start in enumerate(starts)]
    cuts = [len(chunks) * i // num_shares for i in range(num_shares + 1)]
    return [chunks[a:b] for a, b in itertools.pairwise(cuts) if b > a] or [[]]
