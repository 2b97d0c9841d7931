"""Partial FC: the classification head whose classes are split over ranks and sampled (An et al. 2021 and 2022).

One file for the flow of an update; each part of it stands alone: margins are injected (``losses.py``), sampling is
``utils/head/sampling.py``, the rows' optimiser ``utils/head/optimizers.py``, the arithmetic over class chunks
``utils/head/paddle_kernel.py`` (any device) and ``utils/head/numpy_kernel.py`` (CPU), collectives
``utils/distributed.py``.
``docs/partial_fc.md`` derives what is used here.

Legend: W ranks, B samples of a rank, G = W * B, D embedding size, C classes, N local classes, S rows of the update,
T targets on this shard. ``x`` raw embedding, ``u`` embedding as it enters the product (normalised or not), ``q``
similarity, ``z`` logit of a non-target, ``t`` logit of the target, ``p`` probability.
"""

import dataclasses

import numpy as np
import paddle

from utils import distributed
from utils.errors import UserError
from utils.head.kernel import build_kernel
from utils.head.optimizers import build_optimizer
from utils.head.paddle_kernel import inverse_norm
from utils.head.rows import Record, RowBank, dtype_name
from utils.head.sampling import sample_classes


class ClassShard:
    """The contiguous classes of one rank: ``C // W`` of them, one more on each of the first ``C % W`` ranks (trap 16).

    Raises:
        UserError: a rank out of range, or fewer classes than ranks.
    """

    def __init__(self, num_classes: int, rank: int, world_size: int):
        if not 0 <= rank < world_size:
            raise UserError(f"rank: {rank} must lie in [0, {world_size})")
        if num_classes < world_size:
            raise UserError(f"num_classes: {num_classes} classes cannot be split over {world_size} ranks; use fewer")
        base, remainder = divmod(num_classes, world_size)
        self.num_classes, self.rank, self.world_size = num_classes, rank, world_size
        self.num_local = base + (rank < remainder)
        self.start = base * rank + min(rank, remainder)

    @property
    def stop(self) -> int:
        """One past the last class of this rank."""
        return self.start + self.num_local


class PartialFC:
    """Class-sharded, sampled margin softmax with its own optimiser.

    An update: ``prepare`` (once, with the labels of all its micro-batches), then for each micro-batch
    ``head(embedding, label)`` and ``backward``, then ``step`` or ``skip_step``. Gradients add up over micro-batches:
    divide each loss by their number.

    Args:
        num_classes, embedding_size: C and D.
        margin: a ``losses.Margin``.
        sample_rate: share of a rank's classes in each update; 1 all, 0 the batch's own classes only.
        rank, world_size: this process's global rank (not its local one, trap 24) and W.
        seed: of initial weights and draws.
        optimizer: ``"sgd"`` or ``"adamw"``.
        update: ``"dense"`` (what a dense optimiser would do to every row, computed lazily) or ``"sampled"`` (rows out
            of the draw stay as they are). AdamW is ``"sampled"``: its rows know nothing else.
        momentum, weight_decay, betas, epsilon: of the optimiser; ``weight_decay=None`` is 5e-4 for SGD, 0.1 for AdamW.
        dtype: of the stored rows, ``"float32"`` or ``"float64"``; math is float64 if either side is.
        backend: ``"paddle"``, ``"numpy"`` (CPU only, threaded) or ``"auto"``: numpy on CPU.
        matmul_dtype: ``"fp32"``, ``"tf32"`` or ``"bf16"`` products, the last two on GPU only.
        num_threads: of the numpy backend; default: the cores this process may use, shared by the ranks.
        chunk_rows: class rows a chunk; default chosen by the backend.

    Raises:
        UserError: an argument is out of its range, or a label at a call.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin,
        sample_rate: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        optimizer: str = "sgd",
        update: str | None = None,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        dtype: str = "float32",
        backend: str = "auto",
        matmul_dtype: str = "fp32",
        num_threads: int | None = None,
        chunk_rows: int | None = None,
    ):
        if not 0 <= sample_rate <= 1:
            raise UserError(f"sample_rate: {sample_rate} must lie in [0, 1]")
        if embedding_size < 1:
            raise UserError(f"embedding_size: {embedding_size} must be at least 1")
        if dtype not in ("float32", "float64"):
            raise UserError(f"dtype: {dtype!r} is not one of float32, float64")
        self.shard = ClassShard(num_classes, rank, world_size)
        self.embedding_size, self.margin, self.sample_rate, self.seed = embedding_size, margin, sample_rate, seed
        self._optimizer_name = optimizer
        self._optimizer = build_optimizer(optimizer, update, momentum, weight_decay, betas, epsilon)
        self._kernel = build_kernel(backend, matmul_dtype, num_threads, chunk_rows, world_size)
        self._bank = RowBank(self.shard.start, self.shard.num_local, embedding_size, self._optimizer, seed, dtype)
        self._anchor = paddle.zeros([1], dtype)  # makes the loss differentiable even if the embedding is not
        self._anchor.stop_gradient = False
        self._spent: list[Record] = []
        self.num_updates = 0  # steps and skipped steps so far: what draws are seeded by
        self.clear_grad()

    # ------------------------------------------------------------------ one update

    def prepare(self, label_list: list) -> None:
        """Draw the classes of an update, keeping the positives of all its micro-batches. All ranks call it.

        Args:
            label_list: this rank's labels of each micro-batch, [B] each.
        """
        self.clear_grad()
        self._draw(np.concatenate([self._gathered(label) for label in label_list]), sampled=None)
        self._prepared = True

    def __call__(self, embedding_BD: paddle.Tensor, label_B: paddle.Tensor, sampled=None) -> paddle.Tensor:
        """Loss of the global batch, a 0-d tensor, equal on all ranks.

        Its backward gives the embedding W times the gradient of that loss, because data parallelism then averages over
        ranks (trap 12), and adds to the class gradient, which ``step`` applies. The upstream gradient scales both.

        Args:
            embedding_BD: raw embeddings, B equal on all ranks; float32 or float64 (half precision is widened).
            label_B: global class ids, any integer dtype, [B] or [B, 1].
            sampled: global ids to use instead of a draw (positives are added), for tests and comparisons.
        """
        if embedding_BD.ndim != 2 or embedding_BD.shape[1] != self.embedding_size:
            raise UserError(f"embedding: shape {embedding_BD.shape}, expected [batch, {self.embedding_size}]")
        label_G = self._gathered(label_B)
        if len(label_G) != embedding_BD.shape[0] * self.shard.world_size:
            raise UserError(f"label: shape {label_B.shape} for {embedding_BD.shape[0]} embeddings")
        if not self._prepared and not self._has_gradient:
            self._draw(label_G, sampled)
        elif sampled is not None:
            raise UserError(
                "sampled: this update has its classes already; give it to the first call, without prepare()"
            )
        elif not np.isin(label_G, self._kept_labels).all():
            missing = np.setdiff1d(label_G, self._kept_labels)
            raise UserError(f"label: class {missing[0]} is not in this update's draw; prepare() with all its labels")
        if embedding_BD.dtype not in (paddle.float32, paddle.float64):
            embedding_BD = embedding_BD.astype("float32")
        keep = paddle.is_grad_enabled()
        return _HeadFunction.apply(embedding_BD, self._anchor, self, label_G, keep)

    def found_nonfinite(self) -> bool:
        """Whether this rank's class gradient may hold inf or NaN; the caller asks all ranks (``distributed.agree``)."""
        return any(not np.isfinite(float(bound)) for bound in self._bounds)

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Apply the gradients gathered since the last step.

        Args:
            lr: learning rate of this step.
            grad_scale: factor on the class gradient before anything else, e.g. 1 / loss scale (trap 13).
        """
        if not self._has_gradient:
            raise UserError("step: no gradient; call backward on the head's loss first, or skip_step()")
        project = self.margin.normalize_weight
        self._kernel.apply(self._bank, self._ids_S, self._records, self._dense, float(lr), float(grad_scale), project)
        self._bank.stepped(self._ids_S, float(lr))
        self.skip_step()

    def skip_step(self) -> None:
        """End the update without applying it: weights, momentum and decay stay as they are; the next draw is new."""
        self.num_updates += 1
        self.clear_grad()

    def clear_grad(self) -> None:
        """Forget gradients and draw; the next draw repeats this one unless ``step`` or ``skip_step`` follow."""
        for record in self._spent:
            record.exp = None  # a loss that the caller still holds must not keep it
        self._spent: list[Record] = []
        self._records: list[Record] = []
        self._dense = None
        self._bounds = []
        self._ids_S = None
        self._kept_labels = np.zeros(0, np.int64)
        self._prepared = False

    @property
    def _has_gradient(self) -> bool:
        return bool(self._records) or self._dense is not None

    @property
    def sampled(self) -> np.ndarray:
        """Sorted global ids of this rank's classes in the current update."""
        local = np.arange(self.shard.num_local) if self._ids_S is None else self._ids_S
        return local + self.shard.start

    def _gathered(self, label) -> np.ndarray:
        """Checked labels [G] of all ranks; all ranks see all of them, so all raise if one is wrong."""
        shard, group = self.shard, (distributed.get_rank(), distributed.get_world_size())
        if (shard.rank, shard.world_size) != group:
            raise UserError(f"rank: the head is rank {shard.rank} of {shard.world_size}, this process {group}")
        return self._checked(distributed.all_gather_rows(_flat_label(label)).numpy())

    def _checked(self, label_G: np.ndarray) -> np.ndarray:
        wrong = label_G[(label_G < 0) | (label_G >= self.shard.num_classes)]
        if wrong.size:
            raise UserError(f"label: {wrong[0]} must lie in [0, {self.shard.num_classes})")
        return label_G

    def _draw(self, label_G: np.ndarray, sampled) -> None:
        shard = self.shard
        self._kept_labels = np.unique(label_G)
        positive_P = self._kept_labels[(self._kept_labels >= shard.start) & (self._kept_labels < shard.stop)]
        if sampled is not None:
            given = self._checked(np.asarray(sampled, dtype=np.int64).reshape(-1))
            ids = np.union1d(given[(given >= shard.start) & (given < shard.stop)], positive_P) - shard.start
        elif self.sample_rate == 1:
            self._ids_S = None
            return
        else:
            args = (shard.num_local, self.sample_rate, self.seed, self.num_updates, shard.rank)
            ids = sample_classes(positive_P - shard.start, *args)
        self._ids_S = None if len(ids) == shard.num_local else ids

    # ------------------------------------------------------------------ forward and backward

    def _forward(self, x_BD: paddle.Tensor, label_G: np.ndarray, keep: bool):
        """Loss and what ``_backward`` needs."""
        margin, shard = self.margin, self.shard
        dtype = paddle.float64 if self._bank.weight.dtype == paddle.float64 else x_BD.dtype
        x_GD = distributed.all_gather_rows(x_BD.contiguous()).astype(dtype)
        inv_G1 = inverse_norm(x_GD)
        norm_G = paddle.sqrt((x_GD * x_GD).sum(-1))
        u_GD = x_GD * inv_G1 if margin.normalize_embedding else x_GD.clone()
        if keep:
            margin.observe(norm_G)

        local_G = label_G - shard.start
        col_T = np.flatnonzero((local_G >= 0) & (local_G < shard.num_local))
        row_T = local_G[col_T] if self._ids_S is None else np.searchsorted(self._ids_S, local_G[col_T])
        order = np.argsort(row_T, kind="stable")
        row_T, col_T = row_T[order], col_T[order]
        part = self._kernel.forward(self._bank, self._ids_S, u_GD, margin, row_T, col_T, keep)

        # Softmax over the classes of all ranks: the target's logit joins the non-targets' maximum and sum.
        mine_G = paddle.to_tensor(np.isin(np.arange(len(label_G)), col_T)).astype(dtype)
        target = margin.target(part.q_G, norm_G)
        t_G = distributed.all_reduce_sum(target.logit * mine_G)
        top_G = paddle.maximum(distributed.all_reduce_max(part.top_G), t_G)
        fade_G = paddle.exp(part.top_G - top_G)
        sum_G = distributed.all_reduce_sum(part.sum_G * fade_G) + paddle.exp(t_G - top_G)
        loss, slope_G = margin.reduce(paddle.log(sum_G) + top_G - t_G)
        extra = margin.extra(norm_G)
        if extra is not None:
            loss = loss + extra[0].mean()
        if not keep:
            return loss, None

        # d loss / d z = slope * p for a non-target, slope * (p - 1) for the target.
        coef_G = slope_G * margin.scale / sum_G
        miss_G = mine_G * slope_G * (paddle.exp(t_G - top_G) / sum_G - 1.0)
        target_G, along_G = miss_G * target.d_similarity, miss_G * target.d_norm
        pull_GD = part.pull_GD * (fade_G * coef_G)[:, None] + part.w_GD * target_G[:, None]
        if extra is not None and shard.rank == 0:  # counted once in the sum over ranks
            along_G = along_G + extra[1] / len(label_G)
        part.record.top_G, part.record.coef_G, part.record.target_G = top_G, coef_G, target_G
        unit_GD = u_GD if margin.normalize_embedding else x_GD * inv_G1
        token = (self.num_updates, self._ids_S)
        return loss, (part.record, paddle.concat([pull_GD, along_G[:, None]], axis=1), unit_GD, inv_G1, token)

    def _backward(self, saved, upstream: paddle.Tensor, batch: int, dtype) -> paddle.Tensor:
        """Keep what the row gradients need for ``step``; return the gradient of this rank's embeddings, [B, D]."""
        record, pull_GD1, unit_GD, inv_G1, (num_updates, ids_S) = saved
        if num_updates != self.num_updates or ids_S is not self._ids_S:
            raise RuntimeError(
                "backward: the draw of classes changed since the forward pass; call prepare() once with the labels of "
                "all micro-batches of an update, and backward before step()"
            )
        upstream = upstream.astype(pull_GD1.dtype)
        self._spent.append(record)
        scaled = {"coef_G": record.coef_G * upstream, "target_G": record.target_G * upstream}
        self._add_record(dataclasses.replace(record, **scaled))
        pull_BD1 = distributed.reduce_scatter_rows(pull_GD1 * upstream)
        mine = slice(self.shard.rank * batch, (self.shard.rank + 1) * batch)
        pull_BD, along_B1, unit_BD = pull_BD1[:, :-1], pull_BD1[:, -1:], unit_GD[mine]
        if self.margin.normalize_embedding:  # du/dx = (1 - u u') / |x|
            pull_BD = (pull_BD - (pull_BD * unit_BD).sum(-1, keepdim=True) * unit_BD) * inv_G1[mine]
        return ((pull_BD + along_B1 * unit_BD) * self.shard.world_size).astype(dtype)

    def _add_record(self, record: Record) -> None:
        # No row gradient exists yet, so its finiteness is judged by a bound: exponentials are at most 1.
        length_G = paddle.sqrt((record.u_GD * record.u_GD).sum(-1))
        self._bounds.append(((paddle.abs(record.coef_G) + paddle.abs(record.target_G)) * length_G).sum())
        self._records.append(record)
        # Exponentials cost G values a row, a folded gradient D.
        if sum(each.coef_G.shape[0] for each in self._records) > self.embedding_size:
            self._dense = self._kernel.fold(self._bank, self._ids_S, self._records, self._dense)
            self._records = []

    # ------------------------------------------------------------------ weights and checkpoints

    @property
    def weight(self) -> paddle.Tensor:
        """The local rows [N, D], up to date. ``weight.set_value`` writes through.

        With lazy rows this catches all of them up (the same algorithm, rounded once more); ``export_weight`` does not
        touch them.
        """
        self._bank.catch_up()
        return self._bank.weight

    def export_weight(self) -> np.ndarray:
        """A copy of the local rows [N, D] as a dense optimiser would have them now; nothing changes."""
        output_ND = np.empty(self._bank.weight.shape, dtype_name(self._bank.weight.dtype))
        for start, w_RD, *_ in self._bank.caught_up():
            output_ND[start : start + len(w_RD)] = w_RD
        return output_ND

    def rows(self, ids_R) -> np.ndarray:
        """A copy of the local rows with these local ids [R, D], as ``export_weight`` gives them; nothing changes."""
        return self._bank.rows(ids_R)

    def row_state(self) -> dict[str, np.ndarray]:
        """What belongs to single rows, as stored: first axis N, so that shards can be joined and cut anew.

        Lazy rows are not caught up: together with ``table_state`` they continue bit for bit.
        """
        return self._bank.state()

    def table_state(self) -> dict[str, np.ndarray]:
        """Arrays equal on all ranks: the transition table of lazy rows."""
        return self._optimizer.table()

    def meta_state(self) -> dict:
        """JSON-able facts equal on all ranks."""
        return {**self._identity(), "seed": self.seed, "num_updates": self.num_updates, "margin": self.margin.state()}

    def load_state(self, rows: dict, table: dict, meta: dict) -> None:
        """Continue from ``row_state`` (cut to this rank's rows), ``table_state`` and ``meta_state``.

        Raises:
            ValueError: another number of classes, embedding size or optimiser, or arrays of another shape.
        """
        for key, value in self._identity().items():
            if meta.get(key) != value:
                raise UserError(f"head state: {key} is {meta.get(key)!r}, this head has {value!r}")
        self._bank.load(rows, table)
        self.seed, self.num_updates = int(meta["seed"]), int(meta["num_updates"])
        self.margin.load_state(meta["margin"])
        self.clear_grad()

    def _identity(self) -> dict:
        names = {"num_classes": self.shard.num_classes, "embedding_size": self.embedding_size}
        return {**names, "optimizer": self._optimizer_name, "lazy": self._optimizer.lazy}


class _HeadFunction(paddle.autograd.PyLayer):
    """The head as one node of the graph; its backward is the closed form of ``PartialFC._backward``."""

    @staticmethod
    def forward(ctx, embedding_BD, anchor, head, label_G, keep):
        ctx.head, ctx.batch, ctx.dtype = head, embedding_BD.shape[0], embedding_BD.dtype
        ctx.frozen = embedding_BD.stop_gradient
        with paddle.amp.auto_cast(enable=False):  # whatever the backbone's precision, the head stays float32
            loss, ctx.saved = head._forward(embedding_BD, label_G, keep)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        with paddle.amp.auto_cast(enable=False):
            gradient_BD = ctx.head._backward(ctx.saved, upstream, ctx.batch, ctx.dtype)
        return None if ctx.frozen else gradient_BD, paddle.zeros([1], ctx.head._anchor.dtype)


def _flat_label(label) -> paddle.Tensor:
    """[B] int64 of [B] or [B, 1] integers; the caller's tensor stays as it is (trap 21)."""
    label = label if isinstance(label, paddle.Tensor) else paddle.to_tensor(np.asarray(label))
    if label.dtype not in (paddle.int64, paddle.int32, paddle.int16, paddle.uint8, paddle.int8):
        raise UserError(f"label: {label.dtype} values are not class ids; integers are needed")
    return label.reshape([-1]).astype("int64")
