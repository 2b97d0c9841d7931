"""Worker of tests/test_partial_fc_ranks.py: the head on real ranks against the dense definition.

Every rank knows the whole batch and all weights, computes the reference itself and checks its own part.
"""

import sys
from pathlib import Path

import numpy as np
import paddle

from losses import build_margin
from partial_fc import PartialFC
from tests import head_reference as reference
from utils import distributed

CLASSES, DIM, LOCAL = 17, 6, 4  # 17 classes divide by neither 2 nor 3


def data(world_size: int, seed: int = 0, classes: int = CLASSES):
    """The same on all ranks: weights, embeddings and labels of the global batch (12 samples at any W up to 3)."""
    rng = np.random.default_rng(seed)
    num = 12 // world_size * world_size
    x_GD = rng.normal(size=(num, DIM))
    x_GD *= 30 * rng.uniform(0.8, 1.4, [num, 1]) / np.linalg.norm(x_GD, axis=1, keepdims=True)
    return rng.normal(size=(classes, DIM)) * 0.3, x_GD, rng.integers(0, classes, num)


class Rank:
    """One rank's view: its part of a batch, its shard of the rows."""

    def __init__(self):
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()

    def build(self, w_CD, margin=("arcface", {}), rate=1.0, **options) -> PartialFC:
        settings = {"dtype": "float64", "momentum": 0.0, "weight_decay": 0.0, "chunk_rows": 3, **options}
        margin = build_margin(margin[0], **margin[1])
        head = PartialFC(len(w_CD), DIM, margin, rate, self.rank, self.world_size, 7, **settings)
        head.weight.set_value(self.rows(w_CD, head))
        return head

    @staticmethod
    def rows(w_CD, head):
        return w_CD[head.shard.start : head.shard.stop]

    def mine(self, x_G):
        num = len(x_G) // self.world_size
        return x_G[self.rank * num : (self.rank + 1) * num]

    def run(self, head, x_GD, label_G, factor=1.0, **call):
        x = paddle.to_tensor(self.mine(x_GD), stop_gradient=False)
        loss = head(x, paddle.to_tensor(self.mine(label_G)), **call)
        (loss * factor).backward()
        return loss.item(), x.grad.numpy()

    def all_ids(self, head) -> np.ndarray:
        return np.concatenate(distributed.all_gather_object(head.sampled))


def check_against_definition(me: Rank) -> None:
    """Loss 1e-6, gradients 1e-5 (max-norm, relative); the embedding gradient is W times the mean's."""
    cases = {
        "arcface": (("arcface", {}), (reference.arcface,), {}),
        "cosface": (("cosface", {}), (reference.cosface,), {}),
        "linear": (("linear", {}), (None,), {"linear": True}),
        "magface": (("magface", {"lambda_g": 35.0}), (reference.magface,), {"lambda_g": 35.0}),
        "adaface": (("adaface", {"t_alpha": 1e-12}), (reference.adaface,), {}),
        "focal": (("cosface", {"focal_gamma": 2.0}), (reference.cosface,), {"gamma": 2.0}),
        "filtered": (("arcface", {"interclass_threshold": 0.2}), (reference.arcface,), {"threshold": 0.2}),
    }
    for name, (margin, args, options) in cases.items():
        for ids in (None, np.array([0, 3, 4, 9, 16])):  # with injected ids one rank may hold few of them
            w_CD, x_GD, label_G = data(me.world_size)
            loss, d_w, d_x = reference.dense_gradients(w_CD, x_GD, label_G, *args, classes=ids, **options)
            assert loss > 1, loss
            head = me.build(w_CD, margin)
            found, grad = me.run(head, x_GD, label_G, sampled=ids)
            assert abs(found / loss - 1) < 1e-6, (name, found, loss)
            assert reference.max_norm(grad, me.world_size * me.mine(d_x)) < 1e-5, name
            head.step(1.0)
            error = np.abs(me.rows(w_CD - d_w, head) - head.weight.numpy()).max() / np.abs(d_w).max()
            assert error < 1e-5, (name, error)


def check_average_is_one_process(me: Rank) -> None:
    """A linear backbone whose gradients are averaged over ranks gets the gradient of one process."""
    w_CD, x_GD, label_G = data(me.world_size)
    kernel = np.random.default_rng(3).normal(size=(DIM, DIM))
    _, _, d_y = reference.dense_gradients(w_CD, x_GD @ kernel, label_G, reference.arcface)
    backbone = paddle.to_tensor(kernel, stop_gradient=False)
    head = me.build(w_CD)
    head(paddle.matmul(paddle.to_tensor(me.mine(x_GD)), backbone), paddle.to_tensor(me.mine(label_G))).backward()
    average = distributed.all_reduce_sum(backbone.grad).numpy() / me.world_size
    assert reference.max_norm(average, x_GD.T @ d_y) < 1e-5


def check_accumulation(me: Rank) -> None:
    """Micro-batches on each rank equal one batch, with momentum, decay and a draw below 1."""
    w_CD, x_GD, label_G = data(me.world_size)
    options = {"rate": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    whole, parts = me.build(w_CD, **options), me.build(w_CD, **options)
    for step in range(3):
        _, x_GD, label_G = data(me.world_size, seed=10 + step)
        x_BD, label_B = me.mine(x_GD), me.mine(label_G)
        whole.prepare([paddle.to_tensor(label_B)])
        me.run(whole, x_GD, label_G)
        cuts = np.array_split(np.arange(len(label_B)), 2)
        parts.prepare([paddle.to_tensor(label_B[cut]) for cut in cuts])
        assert np.array_equal(whole.sampled, parts.sampled)
        for cut in cuts:
            (parts(paddle.to_tensor(x_BD[cut]), paddle.to_tensor(label_B[cut])) * (len(cut) / len(label_B))).backward()
        whole.step(0.1)
        parts.step(0.1)
    assert reference.max_norm(parts.weight.numpy(), whole.weight.numpy()) < 1e-9


def check_sampled_training(me: Rank) -> None:
    """Own draws: softmax over the classes that any rank drew; lazy rows equal a dense float64 optimiser."""
    w_CD, _, _ = data(me.world_size)
    v_CD = np.zeros_like(w_CD)
    head = me.build(w_CD, rate=0.3, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        _, x_GD, label_G = data(me.world_size, seed=step)
        loss, grad = me.run(head, x_GD, label_G)
        ids = me.all_ids(head)
        assert np.isin(label_G, ids).all()
        expected, d_w, d_x = reference.dense_gradients(w_CD, x_GD, label_G, reference.arcface, classes=ids)
        assert abs(loss / expected - 1) < 1e-6
        assert reference.max_norm(grad, me.world_size * me.mine(d_x)) < 1e-5
        head.step(0.05)
        v_CD = 0.9 * v_CD + d_w + 0.01 * w_CD
        w_CD = w_CD - 0.05 * v_CD
    assert reference.max_norm(head.export_weight(), me.rows(w_CD, head)) < 1e-5


def check_nonfinite(me: Rank) -> None:
    """One rank's broken gradient is one decision for all, and a skip leaves every rank as it was."""
    w_CD, x_GD, label_G = data(me.world_size)
    head = me.build(w_CD, momentum=0.9, weight_decay=0.01, rate=0.5)
    me.run(head, x_GD, label_G)
    head.step(0.1)
    before = head.row_state()
    # The cotangent of the last rank alone is broken, so the others see finite numbers.
    me.run(head, x_GD, label_G, factor=np.inf if me.rank == me.world_size - 1 else 1.0)
    assert head.found_nonfinite() == (me.rank == me.world_size - 1)
    assert distributed.agree(head.found_nonfinite())[0]
    head.skip_step()
    for name, array in head.row_state().items():
        assert np.array_equal(array, before[name]), name
    me.run(head, x_GD, label_G)
    assert not distributed.agree(head.found_nonfinite())[0]


def check_rank_without_positives(me: Rank) -> None:
    """Positives only, all of them on rank 0; the others hold no row and take part in every collective."""
    w_CD, x_GD, label_G = data(me.world_size)
    label_G = label_G % 2
    loss, d_w, d_x = reference.dense_gradients(w_CD, x_GD, label_G, reference.arcface, classes=label_G)
    head = me.build(w_CD, rate=0.0)
    found, grad = me.run(head, x_GD, label_G)
    assert len(head.sampled) == (2 if me.rank == 0 else 0)
    assert abs(found / loss - 1) < 1e-6
    assert reference.max_norm(grad, me.world_size * me.mine(d_x)) < 1e-5
    head.step(1.0)
    assert np.abs(me.rows(w_CD - d_w, head) - head.weight.numpy()).max() < 1e-5 * np.abs(d_w).max()


def check_bad_label(me: Rank) -> None:
    """A wrong label on the last rank is an error on every rank, not a hang."""
    w_CD, x_GD, label_G = data(me.world_size)
    label_G[-1] = CLASSES
    head = me.build(w_CD)
    for call in (lambda: me.run(head, x_GD, label_G), lambda: head.prepare([paddle.to_tensor(me.mine(label_G))])):
        try:
            call()
        except ValueError as error:
            assert f"{CLASSES} must lie in [0, {CLASSES})" in str(error)
        else:
            raise AssertionError("no error")


def check_fewer_classes_than_ranks(me: Rank) -> None:
    if me.world_size > 1:
        try:
            me.build(np.ones([me.world_size - 1, DIM]))
        except ValueError as error:
            assert "cannot be split over" in str(error)
        else:
            raise AssertionError("no error")


def store_lazy_shard(me: Rank, folder: Path) -> None:
    """Six lazy steps with injected ids, stored as they are: the parent joins the shards (elastic resume)."""
    w_CD, _, _ = data(1)
    head = me.build(w_CD.astype(np.float32), dtype="float32", momentum=0.9, weight_decay=0.01)
    for step in range(6):
        _, x_GD, label_G = data(1, seed=step)
        me.run(head, x_GD.astype(np.float32), label_G, sampled=np.arange(step % 3, CLASSES, 4))
        head.step(0.1 / (1 + step))
    meta = head.meta_state()
    assert distributed.all_gather_object(meta) == [meta] * me.world_size
    np.savez(folder / f"{me.rank}.npz", **head.row_state(), **head.table_state())


def main() -> None:
    distributed.init(*sys.argv[2:3] or ["cpu"])
    me = Rank()
    check_against_definition(me)
    check_average_is_one_process(me)
    check_accumulation(me)
    check_sampled_training(me)
    check_nonfinite(me)
    check_rank_without_positives(me)
    check_bad_label(me)
    check_fewer_classes_than_ranks(me)
    store_lazy_shard(me, Path(sys.argv[1]))
    print(f"rank {me.rank} of {me.world_size}: all checks passed")


if __name__ == "__main__":
    main()
