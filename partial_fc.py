"""Partial FC: the classification head whose classes are split over ranks and sampled (An et al. 2021 and 2022).

One file for the flow of an update; each part of it stands alone: margins are injected (``losses.py``), the draw is
``utils/head/draw.py``, the rows' optimiser ``utils/head/optimizers.py``, the arithmetic over class chunks (what
``utils/head/protocol.py`` declares) ``utils/head/paddle_kernel.py`` (any device) and ``utils/head/numpy_kernel.py``
(CPU; ``numba_kernel.py`` where numba is installed), collectives ``utils/distributed.py``.
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
from utils.head.draw import Draw, Targets, checked_labels, draw_classes, host_labels
from utils.head.kernel import build_kernel
from utils.head.optimizers import build_optimizer
from utils.head.paddle_kernel import inverse_norm
from utils.head.protocol import Residuals, RowPass
from utils.head.rows import RowBank, dtype_name


class ClassShard:
    """The contiguous classes of one rank: ``C // W`` of them, one more on each of the first ``C % W`` ranks.

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


@dataclasses.dataclass
class HeadUpdate:
    """What lives from a draw to the step, and no longer."""

    draw: Draw
    rows: RowPass
    prepared: bool  # by ``prepare``, for the micro-batches that it was given
    num_calls: int = 0
    residuals: list[Residuals] = dataclasses.field(default_factory=list)  # of backward passes not folded yet
    dense: object = None  # what was folded: row gradients
    spent: list[Residuals] = dataclasses.field(default_factory=list)  # of backward passes, as the forward left them
    bound: paddle.Tensor | None = None  # above the class gradient's length, 0-d
    last: tuple | None = None  # of the last batch: what ``last_cosines`` makes cosines of

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has been here."""
        return bool(self.residuals) or self.dense is not None


class PartialFC:
    """Class-sharded, sampled margin softmax with its own optimiser.

    An update: ``prepare`` (once, with the labels of all its micro-batches), then for each micro-batch
    ``head(embedding, label)`` and ``backward``, then ``step`` or ``skip_step``. Gradients add up over micro-batches:
    divide each loss by their number. ``draw`` does the host's part of ``prepare`` ahead, while the update before runs.

    Args:
        num_classes, embedding_size: C and D.
        margin: a ``losses.Margin``.
        sample_rate: share of a rank's classes in each update; 1 all, 0 the batch's own classes only.
        rank, world_size: this process's global rank (not its rank on its machine) and W.
        seed: of initial weights and draws.
        optimizer: ``"sgd"`` or ``"adamw"``.
        update: ``"dense"`` (what a dense optimiser would do to every row, computed lazily) or ``"sampled"`` (rows out
            of the draw stay as they are). AdamW is ``"sampled"``: its rows know nothing else.
        momentum, weight_decay, betas, epsilon: of the optimiser; ``weight_decay=None`` is 5e-4 for SGD, 0.1 for AdamW.
        dtype: of the stored rows, ``"float32"`` or ``"float64"``; math is float64 if either side is.
        backend: ``"paddle"``; on CPU also ``"numpy"`` (threaded) and ``"numba"`` (the same, element-wise passes fused);
            ``"auto"``: on CPU numba where it is installed and there are 20,000 classes or more, else numpy.
        matmul_dtype: ``"fp32"``, ``"tf32"`` (float32 where the device has no such products) or ``"bf16"`` products,
            the last on GPU only; the targets' similarities, norms and softmax stay float32.
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
        self._optimizer = build_optimizer(
            name=optimizer, update=update, momentum=momentum, weight_decay=weight_decay, betas=betas, epsilon=epsilon
        )
        options = {"matmul_dtype": matmul_dtype, "num_threads": num_threads, "chunk_rows": chunk_rows}
        self._kernel = build_kernel(backend=backend, num_classes=num_classes, world_size=world_size, **options)
        self._bank = RowBank(
            self.shard.start, self.shard.num_local, embedding_size, optimizer=self._optimizer, seed=seed, dtype=dtype
        )
        self._anchor = paddle.zeros([1], dtype)  # makes the loss differentiable even if the embedding is not
        self._anchor.stop_gradient = False
        self._update: HeadUpdate | None = None
        self.num_updates = 0  # steps and skipped steps so far: what draws are seeded by

    # ------------------------------------------------------------------ one update

    def draw(self, micro_labels: list[np.ndarray], ahead: int = 0) -> Draw:
        """The classes of an update and where its labels lie among them: the host's part, no collective inside.

        Args:
            micro_labels: labels of all ranks, [G] int64 for each micro-batch (``distributed.gather_host``).
            ahead: how many updates must have ended before this one; 1 while one is under way.
        """
        labels = [checked_labels(label_G, self.shard.num_classes) for label_G in micro_labels]
        return self._drawn(labels, self.num_updates + ahead)

    def prepare(self, labels: list | Draw) -> None:
        """Take up an update: draw its classes, keeping the positives of all its micro-batches. All ranks call it.

        Args:
            labels: this rank's labels of each micro-batch, [B] each; or the ``Draw`` made of those of all ranks.
        """
        self.clear_grad()
        if not isinstance(labels, Draw):
            labels = self._drawn(self._gathered(labels), self.num_updates)
        elif labels.number != self.num_updates:
            raise RuntimeError(f"prepare: a draw for update {labels.number}, this is update {self.num_updates}")
        self._begin(labels, prepared=True)

    def __call__(self, embedding_BD: paddle.Tensor, label_B, sampled=None) -> paddle.Tensor:
        """Loss of the global batch, a 0-d tensor, equal on all ranks.

        Its backward gives the embedding W times the gradient of that loss, because data parallelism then averages over
        ranks, and adds to the class gradient, which ``step`` applies. The upstream gradient scales both.

        Args:
            embedding_BD: raw embeddings, B equal on all ranks; float32 or float64 (half precision is widened).
            label_B: global class ids, any integer dtype, [B] or [B, 1], best in host memory. After ``prepare`` those
                of its micro-batches, in that order.
            sampled: global ids to use instead of a draw (positives are added), for tests and comparisons.
        """
        if embedding_BD.ndim != 2 or embedding_BD.shape[1] != self.embedding_size:
            raise UserError(f"embedding: shape {embedding_BD.shape}, expected [batch, {self.embedding_size}]")
        if (num_labels := int(np.prod(label_B.shape))) != embedding_BD.shape[0]:
            raise UserError(f"label: shape {label_B.shape} ({num_labels}) for {embedding_BD.shape[0]} embeddings")
        targets = self._targets(label_B, sampled)
        if embedding_BD.dtype not in (paddle.float32, paddle.float64):
            embedding_BD = embedding_BD.astype("float32")
        return _HeadFunction.apply(embedding_BD, self._anchor, self, targets, paddle.is_grad_enabled())

    def found_nonfinite(self) -> paddle.Tensor:
        """Whether this rank's class gradient may hold inf or NaN, a 0-d bool on the device: asking does not wait.

        The caller lets one answer count for all ranks.
        """
        bound = None if self._update is None else self._update.bound
        if bound is None:
            return paddle.zeros([], "bool")
        return paddle.logical_not(paddle.isfinite(bound))

    def last_cosines(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Of the last batch, [G] each: cosine to the own class, and to the nearest other one of the update.

        All ranks call it, before ``step``; nothing waits. Where logits are no plain cosines (margins that do not
        normalise, or change the others') this takes another pass over the rows.
        """
        margin, (own_G, top_G, unit_GD, targets) = self.margin, self._update.last
        top_G = top_G / margin.scale
        if not (margin.normalize_embedding and margin.normalize_weight) or margin.changes_others:
            own_G, top_G = self._update.rows.cosines(unit_GD=unit_GD, targets=targets)
        return distributed.all_reduce_sum(own_G), distributed.all_reduce_max(top_G)

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Apply the gradients gathered since the last step.

        Args:
            lr: learning rate of this step.
            grad_scale: factor on the class gradient before anything else, e.g. 1 / loss scale.
        """
        update = self._update
        if update is None or not update.has_gradient:
            raise UserError("step: no gradient; call backward on the head's loss first, or skip_step()")
        update.rows.apply(residuals=update.residuals, dense=update.dense, lr=float(lr), grad_scale=float(grad_scale))
        self._bank.stepped(update.draw.ids_S, float(lr))
        self.skip_step()

    def skip_step(self) -> None:
        """End the update without applying it: weights, momentum and decay stay as they are; the next draw is new."""
        self.num_updates += 1
        self.clear_grad()

    def clear_grad(self) -> None:
        """Forget gradients and draw; the next draw repeats this one unless ``step`` or ``skip_step`` follow."""
        for residuals in self._update.spent if self._update is not None else []:
            residuals.exp = None  # a loss that the caller still holds must not keep it
        self._update = None

    @property
    def sampled(self) -> np.ndarray:
        """Sorted global ids of this rank's classes in the current update."""
        ids_S = None if self._update is None else self._update.draw.ids_S
        local = np.arange(self.shard.num_local) if ids_S is None else ids_S
        return local + self.shard.start

    def _targets(self, label_B, sampled) -> Targets:
        """Those of this call; without ``prepare`` the first call of an update draws its classes."""
        update = self._update
        if update is None or not (update.prepared or update.has_gradient):
            draw = self._drawn(self._gathered([label_B]), self.num_updates, sampled)
            self.clear_grad()
            update = self._begin(draw, prepared=False)
        elif sampled is not None:
            raise UserError(
                "sampled: this update has its classes already; give it to the first call, without prepare()"
            )
        index, micro = update.num_calls, update.draw.micro
        update.num_calls += 1
        if index >= len(micro):  # one more batch than it was prepared for
            (label_G,) = self._gathered([label_B])
            if not np.isin(label_G, update.draw.kept_labels).all():
                missing = np.setdiff1d(label_G, update.draw.kept_labels)
                raise UserError(
                    f"label: class {missing[0]} is not in this update's draw; prepare() with all its labels"
                )
            return update.draw.targets(label_G)
        mine = slice(self.shard.rank * label_B.shape[0], (self.shard.rank + 1) * label_B.shape[0])
        if not np.array_equal(host_labels(label_B), micro[index].label_G[mine]):
            raise UserError(f"label: micro-batch {index} has other labels than prepare() was given for it")
        return micro[index]

    def _begin(self, draw: Draw, prepared: bool) -> HeadUpdate:
        rows = self._kernel.begin(bank=self._bank, draw=draw, margin=self.margin)
        self._update = HeadUpdate(draw, rows, prepared)
        return self._update

    def _drawn(self, micro_labels: list[np.ndarray], number: int, sampled=None) -> Draw:
        return draw_classes(
            self.shard, micro_labels, sample_rate=self.sample_rate, seed=self.seed, number=number, sampled=sampled
        )

    def _gathered(self, label_list: list) -> list[np.ndarray]:
        """Checked labels [G] of all ranks; all ranks see all of them, so all raise if one is wrong."""
        shard, group = self.shard, (distributed.get_rank(), distributed.get_world_size())
        if (shard.rank, shard.world_size) != group:
            raise UserError(f"rank: the head is rank {shard.rank} of {shard.world_size}, this process {group}")
        parts = [host_labels(label_B) for label_B in label_list]
        gathered = distributed.gather_host(np.concatenate(parts))
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        return [checked_labels(part, shard.num_classes) for part in np.split(gathered, cuts, axis=1)]

    # ------------------------------------------------------------------ forward and backward

    def _forward(self, x_BD: paddle.Tensor, targets: Targets, keep: bool):
        """Loss and what ``_backward`` needs."""
        margin, shard, update = self.margin, self.shard, self._update
        dtype = paddle.float64 if self._bank.weight.dtype == paddle.float64 else x_BD.dtype
        x_GD = distributed.all_gather_rows(x_BD.contiguous()).astype(dtype)
        norm_G1 = paddle.linalg.norm(x_GD, p=2, axis=-1, keepdim=True)
        inv_G1 = inverse_norm(x_GD, norm_G1)
        norm_G = norm_G1.squeeze(-1)
        unit_GD = x_GD * inv_G1
        u_GD = unit_GD if margin.normalize_embedding else x_GD.clone()
        if keep:
            margin.observe(norm_G)
        part = update.rows.forward(u_GD=u_GD, targets=targets, keep=keep)
        update.last = part.q_G * part.mine_G, part.top_G, unit_GD, targets

        # Softmax over the classes of all ranks: the target's logit joins the non-targets' maximum and sum.
        target = margin.target(part.q_G, norm_G)
        pieces_13G = paddle.stack([part.top_G, part.sum_G, target.logit * part.mine_G]).unsqueeze(0)
        top_WG, sum_WG, t_WG = paddle.unbind(distributed.all_gather_rows(pieces_13G), axis=1)
        t_G = t_WG.sum(0)
        top_G = paddle.maximum(top_WG.max(0), t_G)
        sum_G = (sum_WG * paddle.exp(top_WG - top_G)).sum(0) + paddle.exp(t_G - top_G)
        fade_G = paddle.exp(part.top_G - top_G)
        loss, slope_G = margin.reduce(paddle.log(sum_G) + top_G - t_G)
        extra = margin.extra(norm_G)
        if extra is not None:
            loss = loss + extra[0].mean()
        if not keep:
            return loss, None

        # d loss / d z = slope * p for a non-target, slope * (p - 1) for the target.
        coef_G = slope_G * margin.scale / sum_G
        miss_G = part.mine_G * slope_G * (paddle.exp(t_G - top_G) / sum_G - 1.0)
        target_G, along_G = miss_G * target.d_similarity, miss_G * target.d_norm
        pull_GD = part.pull_GD * (fade_G * coef_G).unsqueeze(-1) + part.w_GD * target_G.unsqueeze(-1)
        if extra is not None and shard.rank == 0:  # counted once in the sum over ranks
            along_G = along_G + extra[1] / len(targets.label_G)
        residuals = part.residuals
        residuals.top_G, residuals.coef_G, residuals.target_G = top_G, coef_G, target_G
        return loss, (update, residuals, paddle.concat([pull_GD, along_G.unsqueeze(-1)], axis=1), unit_GD, inv_G1)

    def _backward(self, saved, upstream: paddle.Tensor, batch: int, dtype) -> paddle.Tensor:
        """Keep what the row gradients need for ``step``; return the gradient of this rank's embeddings, [B, D]."""
        update, residuals, pull_GD1, unit_GD, inv_G1 = saved
        if update is not self._update:
            raise RuntimeError(
                "backward: the draw of classes changed since the forward pass; call prepare() once with the labels of "
                "all micro-batches of an update, and backward before step()"
            )
        upstream = upstream.astype(pull_GD1.dtype)
        update.spent.append(residuals)
        scaled = {"coef_G": residuals.coef_G * upstream, "target_G": residuals.target_G * upstream}
        self._keep(update, dataclasses.replace(residuals, **scaled))
        pull_BD1 = distributed.reduce_scatter_rows(pull_GD1 * upstream)
        mine = slice(self.shard.rank * batch, (self.shard.rank + 1) * batch)
        pull_BD, along_B1 = paddle.split(pull_BD1, [self.embedding_size, 1], axis=1)
        unit_BD = unit_GD[mine]
        if self.margin.normalize_embedding:  # du/dx = (1 - u u') / |x|
            pull_BD = (pull_BD - (pull_BD * unit_BD).sum(-1, keepdim=True) * unit_BD) * inv_G1[mine]
        return ((pull_BD + along_B1 * unit_BD) * self.shard.world_size).astype(dtype)

    def _keep(self, update: HeadUpdate, residuals: Residuals) -> None:
        # No row gradient exists yet, so its finiteness is judged by a bound: exponentials are at most 1.
        length_G = paddle.linalg.norm(residuals.u_GD, p=2, axis=-1)
        bound = ((paddle.abs(residuals.coef_G) + paddle.abs(residuals.target_G)) * length_G).sum()
        update.bound = bound if update.bound is None else update.bound + bound
        update.residuals.append(residuals)
        # Exponentials cost G values a row, a folded gradient D.
        if sum(each.u_GD.shape[0] for each in update.residuals) > self.embedding_size:
            update.dense = update.rows.fold(residuals=update.residuals, dense=update.dense)
            update.residuals = []

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
    def forward(ctx, embedding_BD, anchor, head, targets, keep):
        ctx.head, ctx.batch, ctx.dtype = head, embedding_BD.shape[0], embedding_BD.dtype
        ctx.frozen = embedding_BD.stop_gradient
        with paddle.amp.auto_cast(enable=False):  # whatever the backbone's precision, the head stays float32
            loss, ctx.saved = head._forward(embedding_BD, targets, keep)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        with paddle.amp.auto_cast(enable=False):
            gradient_BD = ctx.head._backward(ctx.saved, upstream, ctx.batch, ctx.dtype)
        return None if ctx.frozen else gradient_BD, paddle.zeros([1], ctx.head._anchor.dtype)
