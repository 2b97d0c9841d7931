"""Row optimisers against dense float64 optimisers that see the same recorded gradients."""

import math

import numpy as np
import pytest

from utils.head.optimizers import RowAdamW, RowSGD
from utils.head.rows import RowBank

ROWS, DIM, PICK = 60, 8, 12


def schedule(step: int, total: int) -> float:
    """Warm-up, then cosine: a learning rate that changes every step."""
    return 0.3 * min(1.0, (step + 1) / 20) * (0.02 + math.cos(0.5 * math.pi * step / total))


def recorded(total: int, seed: int = 0):
    """(sampled ids, their gradient, learning rate) of each step; a learning rate of None is a skipped step."""
    rng = np.random.default_rng(seed)
    for step in range(total):
        # Row 0 is never drawn, row 1 once: ages up to the whole run.
        ids = np.sort(rng.choice(np.arange(2, ROWS), PICK, replace=False))
        if step == total // 7:
            ids = np.concatenate([[1], ids])
        gradient = rng.normal(size=(len(ids), DIM)) * 0.1
        yield ids, gradient, None if rng.random() < 0.05 else schedule(step, total)


def apply(bank: RowBank, ids, gradient, lr) -> None:
    """One update as the head's kernels do it."""
    tensors = [tensor.numpy() for tensor in bank.tensors.values()]
    chunk = [array[ids] for array in tensors]
    missed = bank.missed(ids)
    if missed is not None:
        chunk = bank.optimizer.catch_up(*chunk, missed.astype(chunk[0].dtype))
    along = np.zeros([len(ids), 1], chunk[0].dtype)
    count = (bank.stamp_N[ids] + 1).astype(chunk[0].dtype)
    fresh = bank.optimizer.step(chunk[0], tuple(chunk[1:]), gradient.astype(chunk[0].dtype), along, lr, count)
    for tensor, array, rows in zip(bank.tensors.values(), tensors, fresh, strict=True):
        array[ids] = rows
        tensor.set_value(array)
    bank.stepped(ids, lr)


def difference(ours, reference) -> float:
    return np.abs(ours - reference).max() / np.abs(reference).max()


@pytest.mark.oldest
@pytest.mark.parametrize("total", [300, 3000])
@pytest.mark.parametrize("max_ages", [40, 1024])
@pytest.mark.parametrize("decay", [5e-4, 0.0, 0.02])
def test_lazy_equals_dense(total, max_ages, decay):
    """Dense momentum and decay on every row, at the cost of the sampled ones; float32 rows to 1e-5."""
    bank = RowBank(0, ROWS, DIM, RowSGD(0.9, decay, "dense", max_ages), seed=0, dtype="float32")
    w, v = bank.weight.numpy().astype(np.float64) * 100, np.zeros([ROWS, DIM])
    bank.weight.set_value(w.astype(np.float32))
    w = bank.weight.numpy().astype(np.float64)
    longest = 0
    for ids, gradient, lr in recorded(total):
        if lr is None:
            continue
        dense = np.zeros_like(w)
        dense[ids] = gradient
        v = 0.9 * v + dense + decay * w
        w = w - lr * v
        apply(bank, ids, gradient, lr)
        longest = max(longest, len(bank.optimizer.product_A22))
    assert longest <= max_ages + 1
    stored = bank.state()
    w_now = np.concatenate([rows for _, rows, _ in bank.caught_up()])
    v_now = np.concatenate([rows for _, _, rows in bank.caught_up()])
    assert difference(w_now, w) < 1e-5
    assert difference(v_now, v) < 1e-5
    for name, array in bank.state().items():  # looking has changed nothing
        np.testing.assert_array_equal(array, stored[name])
    if decay:
        assert difference(stored["weight"], w) > 1e-4  # the rows as stored do lag behind


@pytest.mark.oldest
def test_forward_products_keep_their_digits():
    """350 steps without a touch: the product for the oldest row equals stepping it by hand to 1e-12."""
    optimizer = RowSGD(0.9, 5e-4, "dense")
    state = np.array([1.0, -0.7])
    for step in range(350):
        lr = schedule(step, 350)
        v = 0.9 * state[1] + 5e-4 * state[0]
        state = np.array([state[0] - lr * v, v])
        optimizer.advance(lr)
    np.testing.assert_allclose(optimizer.product_A22[0] @ [1.0, -0.7], state, rtol=1e-12)
    # Why no inverse is kept: the prefix product is singular to working precision by now.
    assert abs(np.linalg.det(optimizer.product_A22[0])) < 1e-15


@pytest.mark.oldest
def test_sampled_leaves_other_rows_alone():
    """update="sampled": rows out of the draw keep weight and momentum; drawn ones follow momentum SGD at their pace."""
    bank = RowBank(0, ROWS, DIM, RowSGD(0.9, 0.01, "sampled"), seed=0, dtype="float64")
    w, v = bank.weight.numpy().copy(), np.zeros([ROWS, DIM])
    for ids, gradient, lr in recorded(100):
        lr = lr or 0.0
        v[ids] = 0.9 * v[ids] + gradient + 0.01 * w[ids]
        w[ids] -= lr * v[ids]
        apply(bank, ids, gradient, lr)
    np.testing.assert_allclose(bank.weight.numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(bank.slots[0].numpy(), v, rtol=1e-12)


def test_adamw_against_torch():
    """Each row counts its own updates, so a row sampled now and then equals torch.optim.AdamW on it alone."""
    torch = pytest.importorskip("torch")
    bank = RowBank(0, ROWS, DIM, RowAdamW(0.9, 0.99, 1e-8, 0.05), seed=0, dtype="float64")
    rows = [torch.nn.Parameter(torch.tensor(row)) for row in bank.weight.numpy().copy()]
    optimizers = [torch.optim.AdamW([row], lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05) for row in rows]
    for ids, gradient, lr in recorded(25):
        if lr is None:
            continue
        for index, one in zip(ids, gradient, strict=True):
            rows[index].grad = torch.tensor(one)
            optimizers[index].param_groups[0]["lr"] = lr * 0.05
            optimizers[index].step()
        apply(bank, ids, gradient, lr * 0.05)
    reference = np.stack([row.detach().numpy() for row in rows])
    np.testing.assert_allclose(bank.weight.numpy(), reference, rtol=1e-9, atol=1e-12)
    assert bank.stamp_N[0] == 0 and bank.stamp_N.max() > bank.stamp_N[1] > 0


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RowSGD(momentum=1.0), r"momentum: 1\.0"),
        (lambda: RowSGD(weight_decay=-1), "weight_decay: -1"),
        (lambda: RowSGD(update="lazy"), "'lazy'"),
        (lambda: RowAdamW(beta1=1.0), r"1\.0"),
    ],
)
def test_bad_parameters(build, words):
    with pytest.raises(ValueError, match=words):
        build()
