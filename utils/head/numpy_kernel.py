"""The head's chunk arithmetic on CPU: numpy on cache-sized chunks of class rows, spread over threads.

The same passes as ``utils/head/paddle_kernel.py``, where each method, equation and letter is explained; tests hold
the two equal. It works in place in the memory of the Paddle tensors; numpy releases the GIL in products and passes.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import threadpoolctl

from utils.head.rows import NO_MAX, Forward, Record, RowBank, inverse_norm, split_chunks, split_pieces, view


class NumpyKernel:
    """``num_threads`` chunks of ``chunk_rows`` rows in flight at a time, each with single-threaded products."""

    def __init__(self, num_threads: int = 1, chunk_rows: int = 4096):
        self.num_threads, self.chunk_rows = num_threads, chunk_rows
        self._pool = ThreadPoolExecutor(num_threads)
        self._blas = threadpoolctl.ThreadpoolController().select(internal_api="openblas")

    def _run(self, work, num_rows: int) -> list:
        """work([(chunk index, start, stop), ...]) on a contiguous share of the chunks for each thread, in order."""
        shares = split_chunks(num_rows, self.chunk_rows, self.num_threads)
        with self._blas.limit(limits=1):  # overflow is for found_nonfinite to judge
            return list(self._pool.map(np.errstate(all="ignore")(work), shares))

    def forward(self, bank: RowBank, ids_S, u_GD, margin, row_T, col_T, keep: bool) -> Forward:
        (num_samples, dim), dtype = u_GD.shape, view(u_GD).dtype
        scaled_DG = np.ascontiguousarray(view(u_GD).T) * margin.scale
        exp_SG = np.empty([bank.num_rows if ids_S is None else len(ids_S), num_samples], dtype)
        shift_KG = np.empty([-(-len(exp_SG) // self.chunk_rows), num_samples], dtype)
        q_G, inv_G, w_GD = (np.zeros(shape, dtype) for shape in (num_samples, num_samples, [num_samples, dim]))

        def work(share):
            top_G, sum_G = np.full(num_samples, NO_MAX, dtype), np.zeros(num_samples)
            pull_GD, buffer_RD = np.zeros([num_samples, dim], dtype), np.empty([self.chunk_rows, dim], dtype)
            for k, start, stop in share:
                w_RD = bank.caught_up_weight(ids_S, start, stop, buffer_RD)
                inv_R1 = inverse_norm(w_RD) if margin.normalize_weight else np.ones([stop - start, 1], dtype)
                z_RG, keep_others = np.matmul(w_RD, scaled_DG, out=exp_SG[start:stop]), None
                z_RG *= inv_R1
                mine = slice(*np.searchsorted(row_T, [start, stop]))
                at = row_t, col_t = row_T[mine] - start, col_T[mine]
                q_G[col_t], inv_G[col_t] = z_RG[at] / margin.scale, inv_R1[row_t, 0]
                w_GD[col_t] = w_RD[row_t] * inv_R1[row_t]
                if margin.changes_others:
                    z_RG[:], keep_others = margin.others(z_RG / margin.scale)
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

        parts = self._run(work, len(exp_SG))
        top_G = np.max([part[0] for part in parts], axis=0)
        sum_G = sum(part[1] * np.exp(part[0] - top_G) for part in parts).astype(dtype)
        pull_GD = sum(part[2] * np.exp(part[0] - top_G)[:, None] for part in parts)
        *tensors, inv_G = map(paddle.to_tensor, (top_G, sum_G, pull_GD, q_G, w_GD, inv_G))
        return Forward(*tensors, Record(exp_SG, shift_KG, u_GD, row_T, col_T, inv_G) if keep else None)

    def _pull_on_rows(self, k: int, start: int, stop: int, records: list[Record], dense_SD):
        total_RD = None if dense_SD is None else dense_SD[start:stop]
        for record in records:
            u_GD, target_G = view(record.u_GD), view(record.inv_G) * view(record.target_G)
            coef_G = np.exp(record.shift[k] - view(record.top_G)) * view(record.coef_G)
            pull_RD = record.exp[start:stop] @ (u_GD * coef_G[:, None])
            mine = slice(*np.searchsorted(record.row_T, [start, stop]))
            row_t, col_t = record.row_T[mine] - start, record.col_T[mine]
            np.add.at(pull_RD, row_t, target_G[col_t, None] * u_GD[col_t])
            total_RD = pull_RD if total_RD is None else np.add(total_RD, pull_RD, out=total_RD)
        return total_RD

    def fold(self, bank: RowBank, ids_S, records: list[Record], dense_SD):
        if dense_SD is None:
            dense_SD = np.zeros([len(records[0].exp), bank.weight.shape[1]], records[0].exp.dtype)
        self._run(lambda share: [self._pull_on_rows(*chunk, records, dense_SD) for chunk in share], len(dense_SD))
        return dense_SD

    def apply(self, bank: RowBank, ids_S, records, dense_SD, lr: float, grad_scale: float, project: bool) -> None:
        dtype = records[0].exp.dtype if records else dense_SD.dtype

        def work(share):
            for k, start, stop in share:
                grad_RD = self._pull_on_rows(k, start, stop, records, dense_SD)
                for low, high in split_pieces(start, stop, grad_RD):
                    update(low, high, grad_RD[low - start : high - start])

        def update(start: int, stop: int, grad_RD: np.ndarray) -> None:
            rows = slice(start, stop) if ids_S is None else ids_S[start:stop]
            w_RD, *slots = bank.caught_up_rows(rows, dtype)
            if grad_scale != 1:
                grad_RD *= grad_scale
            along_R1 = np.einsum("rd,rd->r", grad_RD, w_RD)[:, None] * inverse_norm(w_RD) ** 2 * float(project)
            count_R = (bank.stamp_N[rows] + 1).astype(dtype)
            chunks = bank.optimizer.step(w_RD, slots, grad_RD, along_R1, lr, count_R)
            for stored, chunk_RD in zip(map(view, (bank.weight, *bank.slots)), chunks, strict=True):
                if not np.may_share_memory(stored, chunk_RD):
                    stored[rows] = chunk_RD

        self._run(work, len(records[0].exp) if records else len(dense_SD))
