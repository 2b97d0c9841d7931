"""The head's chunk arithmetic in plain Paddle, for any device.

No graph of logits exists: one pass over the rows of an update computes similarities, their exponentials and the pull
on the embeddings, and keeps the exponentials alone; a second pass, at ``apply``, turns them into row gradients and
applies them, chunk by chunk.

The host never waits here: what it knows (ids, positions, stamps, the table of missed steps) goes up in one vector at
``begin``, whatever the number of chunks, and nothing is read back. Where all rows take part and are up to date, a chunk
is a slice of the stored rows and is updated in place; otherwise the rows are gathered once an update, caught up, and
put back at the end of the step.

Legend: N local rows, S rows of the update, R rows of one chunk, K chunks, G samples of all ranks, D row length, T
targets on this shard, U distinct rows among them. ``w`` class rows, ``u`` embeddings (of unit length where the margin
normalises them), ``q = w u`` similarity, ``z = scale * q`` logit of a non-target, ``inv = 1 / |w|``.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.base import core

from utils.errors import UserError
from utils.head.draw import Draw, Targets
from utils.head.optimizers import RowSGD
from utils.head.protocol import NO_MAX, Forward, Residuals
from utils.head.rows import TINY, RowBank, catch_up_tensors
from utils.system import upload

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

    def begin(self, *, bank: RowBank, draw: Draw, margin) -> "PaddlePass":
        return PaddlePass(self, bank, draw, margin)

    def matmul(self, a, b, *, transpose_x=False, transpose_y=False, exact=False):
        """A product in the chosen precision (``exact``: in that of its arguments), its result in that of ``a``."""
        if self.matmul_dtype == "bf16" and not exact:
            product = paddle.matmul(a.astype("bfloat16"), b.astype("bfloat16"), transpose_x, transpose_y)
            return product.astype(a.dtype)
        if a.place.is_cpu_place():
            return paddle.matmul(a, b, transpose_x, transpose_y)
        # Paddle allows TF32 by default and for the whole process: set it for this product, then put it back.
        before = core.get_cublas_switch()
        core.set_cublas_switch(self.matmul_dtype == "tf32" and not exact)
        try:
            return paddle.matmul(a, b, transpose_x, transpose_y)
        finally:
            core.set_cublas_switch(before)


@dataclass(frozen=True)
class DeviceTargets:
    """``Targets`` on the device; rows are counted from the first of their chunk, runs of a chunk are ``cut_t[k:k+2]``.

    Samples that share a row are summed by a product before they are added to it: that is one fixed order, where
    colliding additions on a GPU come in any.
    """

    row_G: paddle.Tensor  # position in the rows of the update; 0 where another rank has the class
    mine_G: paddle.Tensor  # 1 where this shard has it, int64
    row_T: paddle.Tensor
    col_T: paddle.Tensor
    row_U: paddle.Tensor
    unique_T: paddle.Tensor | None  # index into U; None where no two samples share a row
    cut_T: list[int]
    cut_U: list[int]
    num_unique: int

    def masked(self, z_RG: paddle.Tensor, k: int, value_1: paddle.Tensor) -> paddle.Tensor:
        """``z_RG`` of chunk k with the value at the targets, in place."""
        low, high = self.cut_T[k : k + 2]
        if high == low:
            return z_RG
        return paddle.index_put_(z_RG, (self.row_T._slice(low, high), self.col_T._slice(low, high)), value_1)


class PaddlePass:
    """One update; see ``protocol.RowPass``."""

    def __init__(self, kernel: PaddleKernel, bank: RowBank, draw: Draw, margin):
        self._kernel, self._bank, self._margin = kernel, bank, margin
        rows, chunk_rows = draw.num_rows, kernel.chunk_rows
        self._chunks = [(k, low, min(low + chunk_rows, rows)) for k, low in enumerate(range(0, rows, chunk_rows))]
        self._starts = [*range(0, rows, chunk_rows), rows]
        self._targets: dict[int, DeviceTargets] = {}
        self._tensors: list[paddle.Tensor] | None = None  # [S, D] each: weight and slots, up to date
        self._inv_S1 = None
        self._upload(draw)

    # ------------------------------------------------------------------ what the host sends

    def _upload(self, draw: Draw) -> None:
        """All that this update needs of the host, in one vector of float64 (ids below 2^53 are exact in it)."""
        bank = self._bank
        stamp_S = bank.stamp_N if draw.ids_S is None else bank.stamp_N[draw.ids_S]
        lags = bank.optimizer.lazy and not (stamp_S == bank.optimizer.now).all()
        pieces = [] if draw.ids_S is None else [draw.ids_S]
        if lags or bank.optimizer.counts_updates:
            pieces.append(stamp_S)
        sizes = [len(piece) for piece in pieces]
        layouts = [self._layout(targets) for targets in draw.micro]
        pieces += [piece for layout in layouts for piece in layout[0]]
        table = bank.optimizer.product_A22.reshape(-1) if lags else np.zeros(0)
        num_ints = sum(map(len, pieces))
        vector = upload(np.concatenate([*pieces, table], dtype=np.float64))
        ints, (first, *rest) = vector._slice(0, num_ints).astype("int64") if num_ints else vector, [0, *sizes]
        at = itertools.accumulate(rest, initial=first)
        parts = [ints._slice(low, high) if high > low else None for low, high in itertools.pairwise(at)]
        self._index_S = parts.pop(0) if draw.ids_S is not None else None
        self._stamp_S = parts.pop(0) if parts else None
        self._table = vector._slice(num_ints, len(vector)).reshape([-1, 4]) if lags else None
        offset = sum(sizes)
        for targets, layout in zip(draw.micro, layouts, strict=True):
            self._targets[id(targets)] = self._on_device(ints, offset, layout)
            offset += sum(map(len, layout[0]))

    def _layout(self, targets: Targets) -> tuple[list[np.ndarray], list[int], list[int]]:
        """(the integers of ``DeviceTargets`` in order, cuts of T, cuts of U)."""
        num_samples, row_T = len(targets.label_G), targets.row_T
        row_G, mine_G = np.zeros(num_samples, np.int64), np.zeros(num_samples, np.int64)
        row_G[targets.col_T], mine_G[targets.col_T] = row_T, 1
        row_U, unique_T = np.unique(row_T, return_inverse=True)
        chunk_rows = self._kernel.chunk_rows
        pieces = [row_G, mine_G, row_T % chunk_rows, targets.col_T, row_U % chunk_rows]
        if len(row_U) < len(row_T):
            pieces.append(unique_T)
        cuts = (np.searchsorted(rows, self._starts).tolist() for rows in (row_T, row_U))
        return pieces, *cuts

    @staticmethod
    def _on_device(ints: paddle.Tensor, offset: int, layout: tuple) -> DeviceTargets:
        pieces, cut_T, cut_U = layout
        ends = list(itertools.accumulate(map(len, pieces), initial=offset))
        parts = [ints._slice(low, high) if high > low else None for low, high in itertools.pairwise(ends)]
        unique_T = parts[5] if len(parts) > 5 else None
        return DeviceTargets(*parts[:5], unique_T, cut_T, cut_U, num_unique=len(pieces[4]))

    def _device_targets(self, targets: Targets) -> DeviceTargets:
        """Those of ``draw.micro`` are up already; a batch beyond them goes up by itself."""
        if id(targets) not in self._targets:
            layout = self._layout(targets)
            ints = upload(np.concatenate(layout[0], dtype=np.int64))
            self._targets[id(targets)] = self._on_device(ints, 0, layout)
        return self._targets[id(targets)]

    def _open(self, dtype) -> None:
        """The rows of the update, up to date, in the precision of the first batch: the stored ones, or copies."""
        if self._tensors is not None or not self._chunks:
            return
        bank = self._bank
        stored = list(bank.tensors.values())
        self._copied = self._index_S is not None or self._table is not None or bank.weight.dtype != dtype
        if self._copied:
            if self._index_S is not None:
                stored = [paddle.gather(tensor, self._index_S) for tensor in stored]
            stored = [tensor.astype(dtype) for tensor in stored]
            if self._table is not None:
                stored = catch_up_tensors(*stored, table_A4=self._table, stamp_R=self._stamp_S)
        self._tensors = stored
        if self._margin.normalize_weight:
            self._inv_S1 = inverse_norm(stored[0])

    # ------------------------------------------------------------------ the two passes

    def forward(self, *, u_GD: paddle.Tensor, targets: Targets, keep: bool) -> Forward:
        self._open(u_GD.dtype)
        margin, matmul, at = self._margin, self._kernel.matmul, self._device_targets(targets)
        (num_samples, dim), dtype = u_GD.shape, u_GD.dtype
        scaled_GD = u_GD * margin.scale if margin.scale != 1 else u_GD
        masked = paddle.full([1], NO_MAX, dtype)
        tops, sums, pulls, exps = [], [], [], []
        for k, start, stop in self._chunks:
            w_RD = self._tensors[0]._slice(start, stop)
            inv_R1 = None if self._inv_S1 is None else self._inv_S1._slice(start, stop)
            z_RG, keep_others = matmul(w_RD, scaled_GD, transpose_y=True), None
            if inv_R1 is not None:
                z_RG = z_RG.multiply_(inv_R1)
            if margin.changes_others:
                q_RG, keep_others = margin.others(z_RG / margin.scale)
                z_RG = q_RG * margin.scale
            z_RG = at.masked(z_RG, k, masked)
            top_G = z_RG.max(0)
            exp_RG = z_RG.subtract_(top_G).exp_()
            tops.append(top_G)
            sums.append(exp_RG.sum(0))
            if keep:
                exp_RG = exp_RG if inv_R1 is None else exp_RG.multiply_(inv_R1)
                exp_RG = exp_RG if keep_others is None else exp_RG.multiply_(keep_others)
                pulls.append(matmul(exp_RG, w_RD, transpose_x=True))
                exps.append(exp_RG)
        top_G, sum_G, pull_GD, shift_KG = self._join(tops, sums, pulls, u_GD)
        mine_G = at.mine_G.astype(dtype)
        if not self._chunks:
            zeros_G, zeros_GD = paddle.zeros([num_samples], dtype), paddle.zeros([num_samples, dim], dtype)
            residuals = Residuals([], shift_KG, u_GD, targets, zeros_G) if keep else None
            return Forward(top_G, sum_G, pull_GD, mine_G, zeros_G, zeros_GD, residuals)
        # The targets' similarities by themselves, so that a reduced precision does not reach the margin.
        inv_G1 = mine_G.unsqueeze(-1)
        if self._inv_S1 is not None:
            inv_G1 = inv_G1 * paddle.gather(self._inv_S1, at.row_G)
        w_GD = paddle.gather(self._tensors[0], at.row_G) * inv_G1
        q_G = (w_GD * u_GD).sum(-1)
        residuals = Residuals(exps, shift_KG, u_GD, targets, inv_G1.squeeze(-1)) if keep else None
        return Forward(top_G, sum_G, pull_GD, mine_G, q_G, w_GD, residuals)

    def cosines(self, *, unit_GD: paddle.Tensor, targets: Targets) -> tuple[paddle.Tensor, paddle.Tensor]:
        self._open(unit_GD.dtype)
        at, masked = self._device_targets(targets), paddle.full([1], NO_MAX, unit_GD.dtype)
        own_G = paddle.zeros([unit_GD.shape[0]], unit_GD.dtype)
        top_G = paddle.full_like(own_G, NO_MAX)
        if not self._chunks:
            return own_G, top_G
        inv_S1 = inverse_norm(self._tensors[0]) if self._inv_S1 is None else self._inv_S1
        for k, start, stop in self._chunks:
            q_RG = self._kernel.matmul(self._tensors[0]._slice(start, stop), unit_GD, transpose_y=True, exact=True)
            q_RG = q_RG.multiply_(inv_S1._slice(start, stop))
            top_G = paddle.maximum(top_G, at.masked(q_RG, k, masked).max(0))
        w_GD = paddle.gather(self._tensors[0], at.row_G) * paddle.gather(inv_S1, at.row_G)
        return (w_GD * unit_GD).sum(-1) * at.mine_G.astype(unit_GD.dtype), top_G

    def _join(self, tops: list, sums: list, pulls: list, u_GD: paddle.Tensor) -> tuple:
        """(top [G], sum [G], pull [G, D], shift [K, G]) of all chunks, each of which was shifted by its own maximum."""
        if not tops:
            top_G = paddle.full([u_GD.shape[0]], NO_MAX, u_GD.dtype)
            return top_G, paddle.zeros_like(top_G), paddle.zeros_like(u_GD), None
        shift_KG = paddle.stack(tops)
        if len(tops) == 1:
            return tops[0], sums[0], pulls[0] if pulls else None, shift_KG
        top_G = shift_KG.max(0)
        fade_KG = paddle.exp(shift_KG - top_G)
        sum_G = (paddle.stack(sums) * fade_KG).sum(0)
        pull_GD, fade_KG1 = None, fade_KG.unsqueeze(-1)
        for k, part_GD in enumerate(pulls):
            part_GD = part_GD.multiply_(fade_KG1[k])
            pull_GD = part_GD if pull_GD is None else pull_GD.add_(part_GD)
        return top_G, sum_G, pull_GD, shift_KG

    def _prepared(self, residuals: list[Residuals], grad_scale: float) -> list[tuple]:
        """(residuals, targets, coefficient of each chunk [K, G, 1], pull of the distinct target rows [U, D])."""
        done = []
        for each in residuals:
            at = self._device_targets(each.targets)
            coef_G, target_G = each.coef_G, each.inv_G * each.target_G
            if grad_scale != 1:
                coef_G, target_G = coef_G * grad_scale, target_G * grad_scale
            coef_KG1 = (paddle.exp(each.shift - each.top_G) * coef_G).unsqueeze(-1)
            u_UD = None
            if at.num_unique:
                u_UD = paddle.gather(each.u_GD * target_G.unsqueeze(-1), at.col_T)
                if at.unique_T is not None:
                    same_TU = paddle.nn.functional.one_hot(at.unique_T, at.num_unique).astype(u_UD.dtype)
                    u_UD = self._kernel.matmul(same_TU, u_UD, transpose_x=True, exact=True)
            done.append((each, at, coef_KG1, u_UD))
        return done

    def _pull_on_rows(self, k: int, prepared: list[tuple], dense, grad_scale: float = 1.0) -> paddle.Tensor:
        """inv * sum over samples of (d loss / d q) * u: the row gradient before it is projected, [R, D]."""
        total_RD = None
        for each, at, coef_KG1, u_UD in prepared:
            pull_RD = self._kernel.matmul(each.exp[k], each.u_GD * coef_KG1[k])
            low, high = at.cut_U[k : k + 2]
            if high > low:
                pull_RD = paddle.index_add_(pull_RD, at.row_U._slice(low, high), 0, u_UD._slice(low, high))
            total_RD = pull_RD if total_RD is None else total_RD.add_(pull_RD)
        if dense is not None:
            folded_RD = dense[k] if grad_scale == 1 else dense[k] * grad_scale
            total_RD = folded_RD if total_RD is None else total_RD.add_(folded_RD)
        return total_RD

    def fold(self, *, residuals: list[Residuals], dense: list | None) -> list[paddle.Tensor]:
        prepared = self._prepared(residuals if self._chunks else [], 1.0)
        return [self._pull_on_rows(k, prepared, dense) for k, _, _ in self._chunks]

    def apply(self, *, residuals: list[Residuals], dense: list | None, lr: float, grad_scale: float) -> None:
        if not self._chunks:  # no class of this shard takes part
            return
        bank, dtype = self._bank, self._tensors[0].dtype
        prepared = self._prepared(residuals, grad_scale)
        # Paddle's own kernel takes one pass over rows and momentum; its factors are float32.
        fused = isinstance(bank.optimizer, RowSGD) and dtype == paddle.float32
        lr_1 = paddle.full([1], lr, dtype) if fused else None
        inv2_S1 = None if self._inv_S1 is None else self._inv_S1 * self._inv_S1
        count_S = (self._stamp_S + 1).astype(dtype) if bank.optimizer.counts_updates else None
        for k, start, stop in self._chunks:
            grad_RD = self._pull_on_rows(k, prepared, dense, grad_scale)
            rows = [tensor._slice(start, stop) for tensor in self._tensors]
            w_RD, *slots = rows
            along_R1 = None
            if inv2_S1 is not None:
                along_R1 = (grad_RD * w_RD).sum(-1, keepdim=True).multiply_(inv2_S1._slice(start, stop))
            if fused:
                if along_R1 is not None:
                    grad_RD = grad_RD.subtract_(w_RD * along_R1)
                places = [row.data_ptr() for row in rows]
                bank.optimizer.fused_step(w_RD, slots[0], grad_RD, lr_1)
                # A device that lacks the kernel computes on the CPU and hands back other memory.
                fresh = [row for row, place in zip(rows, places, strict=True) if row.data_ptr() != place]
                fresh = rows if fresh else []
            else:
                along_R1 = paddle.zeros([stop - start, 1], dtype) if along_R1 is None else along_R1
                count_R = None if count_S is None else count_S._slice(start, stop)
                fresh = bank.optimizer.step(w_RD, slots, grad_RD, along_S1=along_R1, lr=lr, count_S=count_R)
            for tensor, row in zip(self._tensors, fresh, strict=False):
                tensor._slice(start, stop).copy_(row, False)
        if self._copied:
            for stored, tensor in zip(bank.tensors.values(), self._tensors, strict=True):
                if self._index_S is None:
                    stored.copy_(tensor.astype(stored.dtype), False)
                else:
                    paddle.scatter_(stored, self._index_S, tensor.astype(stored.dtype))


def inverse_norm(x_RD: paddle.Tensor, norm_R1: paddle.Tensor | None = None) -> paddle.Tensor:
    """1 / |x| by row, [R, 1]; 0 where there is no direction. ``norm_R1``: |x|, where it is known already."""
    if norm_R1 is None:
        norm_R1 = paddle.linalg.norm(x_RD, p=2, axis=-1, keepdim=True)
    has_direction = (norm_R1 > TINY).astype(x_RD.dtype)
    return has_direction / paddle.clip(norm_R1, min=TINY)
