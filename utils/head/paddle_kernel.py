"""The head's chunk arithmetic in plain Paddle, for any device.

No graph of logits exists: one pass over the rows of an update computes similarities, their exponentials and the pull
on the embeddings, and keeps the exponentials alone; a second pass, at ``step``, turns them into row gradients and
applies them, chunk by chunk.

Legend: N local rows, S rows of the update, R rows of one chunk, G samples of all ranks, D row length, T targets on
this shard. ``w`` class rows, ``u`` embeddings (of unit length where the margin normalises them), ``q = w u``
similarity, ``z = scale * q`` logit of a non-target, ``inv = 1 / |w|``.
"""

import numpy as np
import paddle
from paddle.base import core

from utils.errors import UserError
from utils.head.rows import NO_MAX, TINY, Forward, Record, RowBank, dtype_name

MATMUL_DTYPES = ("fp32", "tf32", "bf16")


class PaddleKernel:
    """Chunked passes over the rows of an update.

    Args:
        chunk_rows: rows a chunk; bounds what a pass needs beside the exponentials.
        matmul_dtype: ``fp32``, ``tf32`` or ``bf16`` products (the last two on GPU). Norms, the targets' similarities,
            softmax and update stay float32.
    """

    def __init__(self, chunk_rows: int = 16384, matmul_dtype: str = "fp32"):
        if matmul_dtype not in MATMUL_DTYPES:
            raise UserError(f"matmul_dtype: {matmul_dtype!r} is not one of {', '.join(MATMUL_DTYPES)}")
        self.chunk_rows, self.matmul_dtype = chunk_rows, matmul_dtype

    def _matmul(self, a, b, transpose_x=False, transpose_y=False):
        if self.matmul_dtype == "bf16":
            product = paddle.matmul(a.astype("bfloat16"), b.astype("bfloat16"), transpose_x, transpose_y)
            return product.astype(a.dtype)
        if a.place.is_cpu_place():
            return paddle.matmul(a, b, transpose_x, transpose_y)
        # Paddle allows TF32 by default and for the whole process: set it for this product, then put it back.
        before = core.get_cublas_switch()
        core.set_cublas_switch(self.matmul_dtype == "tf32")
        try:
            return paddle.matmul(a, b, transpose_x, transpose_y)
        finally:
            core.set_cublas_switch(before)

    def _chunks(self, bank: RowBank, ids_S):
        """(chunk index, start, stop, rows as numpy ids) of each chunk."""
        num_rows = bank.num_rows if ids_S is None else len(ids_S)
        for k, start in enumerate(range(0, num_rows, self.chunk_rows)):
            stop = min(start + self.chunk_rows, num_rows)
            yield k, start, stop, np.arange(start, stop) if ids_S is None else ids_S[start:stop]

    def _rows(self, bank: RowBank, ids_R, dtype, with_slots: bool):
        """(ids tensor, w, slots) of one chunk, copied and caught up."""
        index_R, missed = paddle.to_tensor(ids_R), bank.missed(ids_R)
        tensors = [bank.weight, *bank.slots] if with_slots or missed is not None else [bank.weight]
        w_RD, *slots = [paddle.gather(tensor, index_R).astype(dtype) for tensor in tensors]
        if missed is not None:
            w_RD, *slots = bank.optimizer.catch_up(w_RD, *slots, paddle.to_tensor(missed.astype(dtype_name(dtype))))
        return index_R, w_RD, tuple(slots)

    @staticmethod
    def _write(bank: RowBank, index_R, *chunks) -> None:
        for tensor, chunk in zip([bank.weight, *bank.slots], chunks, strict=True):
            paddle.scatter_(tensor, index_R, chunk.astype(tensor.dtype))

    def forward(self, bank: RowBank, ids_S, u_GD, margin, row_T, col_T, keep: bool) -> Forward:
        """One pass over the rows: local softmax pieces, targets, and (``keep``) what the gradients need.

        Args:
            bank: storage; not changed.
            ids_S: sorted local ids of the rows of the update; None for all.
            u_GD: embeddings of all ranks, normalised if the margin says so.
            margin: ``scale``, ``normalize_weight``, ``others`` (losses.Margin).
            row_T, col_T: positions of the targets in ``ids_S``, ascending, and their samples.
            keep: whether gradients will be asked for.
        """
        (num_samples, dim), dtype = u_GD.shape, u_GD.dtype
        top_G = paddle.full([num_samples], NO_MAX, dtype)
        sum_G = paddle.zeros([num_samples], dtype)
        pull_GD = paddle.zeros([num_samples, dim], dtype)
        exp, shift = [], []
        q_G, inv_G, w_GD = paddle.zeros_like(sum_G), paddle.zeros_like(sum_G), paddle.zeros_like(pull_GD)
        for _, start, stop, ids_R in self._chunks(bank, ids_S):
            _, w_RD, _ = self._rows(bank, ids_R, dtype, with_slots=False)
            inv_R1 = inverse_norm(w_RD) if margin.normalize_weight else paddle.ones([stop - start, 1], dtype)
            q_RG = self._matmul(w_RD, u_GD, transpose_y=True) * inv_R1
            lo, hi = np.searchsorted(row_T, [start, stop])
            if hi > lo:
                row_t, col_t = paddle.to_tensor(row_T[lo:hi] - start), paddle.to_tensor(col_T[lo:hi])
                inv_t1 = paddle.gather(inv_R1, row_t)
                w_tD = paddle.gather(w_RD, row_t) * inv_t1
                # The product on its own, so that a reduced precision does not reach the margin.
                q_t = (w_tD * paddle.gather(u_GD, col_t)).sum(-1)
                inv_G, w_GD = paddle.scatter(inv_G, col_t, inv_t1[:, 0]), paddle.scatter(w_GD, col_t, w_tD)
                q_G = paddle.scatter(q_G, col_t, q_t)
            keep_others = None
            if margin.changes_others:
                q_RG, keep_others = margin.others(q_RG)
            z_RG = q_RG * margin.scale if margin.scale != 1 else q_RG
            if hi > lo:
                z_RG = paddle.index_put(z_RG, (row_t, col_t), paddle.full_like(q_t, -np.inf))
            new_top_G = paddle.maximum(top_G, z_RG.max(0))
            exp_RG = paddle.exp(z_RG - new_top_G)
            fade_G = paddle.exp(top_G - new_top_G)
            sum_G = sum_G * fade_G + exp_RG.sum(0)
            top_G = new_top_G
            if keep:
                exp_RG = exp_RG * inv_R1 if keep_others is None else exp_RG * inv_R1 * keep_others
                pull_GD = pull_GD * fade_G[:, None] + self._matmul(exp_RG, w_RD, transpose_x=True)
                exp.append(exp_RG)
                shift.append(new_top_G)
        record = Record(exp, shift, u_GD, row_T, col_T, inv_G) if keep else None
        return Forward(top_G, sum_G, pull_GD, q_G, w_GD, record)

    def _pull_on_rows(self, k: int, start: int, stop: int, records: list[Record]):
        """inv * sum over samples of (d loss / d q) * u: the row gradient before it is projected, [R, D]; or None."""
        total_RD = None
        for record in records:
            scaled_GD = record.u_GD * (paddle.exp(record.shift[k] - record.top_G) * record.coef_G)[:, None]
            pull_RD = self._matmul(record.exp[k], scaled_GD)
            lo, hi = np.searchsorted(record.row_T, [start, stop])
            if hi > lo:
                u_tD = record.u_GD * (record.inv_G * record.target_G)[:, None]
                u_tD = paddle.gather(u_tD, paddle.to_tensor(record.col_T[lo:hi]))
                pull_RD = paddle.index_add(pull_RD, paddle.to_tensor(record.row_T[lo:hi] - start), 0, u_tD)
            total_RD = pull_RD if total_RD is None else total_RD + pull_RD
        return total_RD

    def fold(self, bank: RowBank, ids_S, records: list[Record], dense):
        """Sum records into unprojected row gradients (one per chunk): smaller than they are beyond D samples."""
        folded = []
        for k, start, stop, _ in self._chunks(bank, ids_S):
            pull_RD = self._pull_on_rows(k, start, stop, records)
            folded.append(pull_RD if dense is None else dense[k] + pull_RD)
        return folded

    def apply(self, bank: RowBank, ids_S, records, dense, lr: float, grad_scale: float, project: bool) -> None:
        """One optimiser step on the rows of the update.

        For unit-length rows ``dq/dw = inv (u - q w inv)``, hence the projection ``g - (g . w) inv^2 w``;
        the optimiser takes ``g`` and the coefficient ``(g . w) inv^2`` apart, which saves passes.
        """
        if ids_S is not None and not len(ids_S):  # all of the update's classes are other ranks': no chunk, no dtype
            return
        dtype = records[0].u_GD.dtype if records else dense[0].dtype
        for k, start, stop, ids_R in self._chunks(bank, ids_S):
            index_R, w_RD, slots = self._rows(bank, ids_R, dtype, with_slots=True)
            grad_RD = self._pull_on_rows(k, start, stop, records)
            if dense is not None:
                grad_RD = dense[k] if grad_RD is None else grad_RD + dense[k]
            if grad_scale != 1:
                grad_RD = grad_RD * grad_scale
            along_R1 = (grad_RD * w_RD).sum(-1, keepdim=True) * inverse_norm(w_RD) ** 2 * float(project)
            count_R = paddle.to_tensor((bank.stamp_N[ids_R] + 1).astype(dtype_name(dtype)))
            self._write(bank, index_R, *bank.optimizer.step(w_RD, slots, grad_RD, along_R1, lr, count_R))


def inverse_norm(x_RD: paddle.Tensor) -> paddle.Tensor:
    """1 / |x| by row, [R, 1]; 0 where there is no direction."""
    norm_R1 = paddle.sqrt((x_RD * x_RD).sum(-1, keepdim=True))
    has_direction = (norm_R1 > TINY).astype(x_RD.dtype)
    return has_direction / paddle.clip(norm_R1, min=TINY)
