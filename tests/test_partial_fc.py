"""The head in one process against the dense definition (tests/head_reference.py)."""

import copy
import importlib.util

import numpy as np
import paddle
import pytest

from losses import build_margin
from partial_fc import ClassShard, PartialFC
from tests import head_reference as reference

CLASSES, DIM, BATCH = 23, 6, 8

CASES = {
    "arcface": (("arcface", {}), (reference.arcface,), {}),
    "arcface_s128": (("arcface", {"s": 128.0}), (reference.arcface, 128.0), {}),
    "cosface": (("cosface", {}), (reference.cosface,), {}),
    "softmax": (("softmax", {"s": 16.0}), (reference.softmax, 16.0), {}),
    "combined": (("combined", {"m1": 0.9, "m2": 0.3, "m3": 0.2}), (reference.combined,), {}),
    "linear": (("linear", {}), (None,), {"linear": True}),
    "norm": (("sphereface", {"m": 1.0, "lambda_base": 0.0, "lambda_min": 0.0}), (reference.softmax,), {"raw": True}),
    "magface": (("magface", {"lambda_g": 35.0}), (reference.magface,), {"lambda_g": 35.0}),
    "adaface": (("adaface", {"t_alpha": 1e-12}), (reference.adaface,), {}),
    "filtered": (("arcface", {"interclass_threshold": 0.2}), (reference.arcface,), {"threshold": 0.2}),
    "focal": (("cosface", {"focal_gamma": 2.0, "s": 8.0}), (reference.cosface, 8.0), {"gamma": 2.0}),
}
BACKENDS = ["numpy", "paddle", *(["numba"] if importlib.util.find_spec("numba") else [])]
# Paddle 2.6 rounds Python numbers to float32 even beside float64 tensors.
OLD = paddle.__version__.startswith("2.")
LOSS, GRADIENT = (1e-6, 1e-5) if OLD else (1e-10, 1e-9)


def data(seed: int = 0, batch: int = BATCH, length: float = 25.0):
    """Weights, embeddings of norm about ``length`` (inside MagFace's range), labels with repeats."""
    rng = np.random.default_rng(seed)
    x_GD = rng.normal(size=(batch, DIM))
    x_GD *= length * rng.uniform(0.8, 1.4, [batch, 1]) / np.linalg.norm(x_GD, axis=1, keepdims=True)
    label_G = rng.integers(0, CLASSES, batch)
    label_G[-1] = label_G[0]
    return rng.normal(size=(CLASSES, DIM)) * 0.3, x_GD, label_G


def build(margin=("arcface", {}), w_CD=None, **options) -> PartialFC:
    """A float64 head whose step of lr 1 subtracts the plain gradient, in several chunks."""
    settings = {"dtype": "float64", "momentum": 0.0, "weight_decay": 0.0, "chunk_rows": 5, "num_threads": 2}
    head = PartialFC(CLASSES, DIM, build_margin(margin[0], **margin[1]), **{**settings, **options})
    if w_CD is not None:
        head.weight.set_value(w_CD)
    return head


def run(head, x_GD, label_G, factor: float = 1.0, **call):
    """(loss, embedding gradient) of one forward and backward."""
    x = paddle.to_tensor(x_GD, stop_gradient=False)
    loss = head(x, paddle.to_tensor(label_G), **call)
    (loss * factor if factor != 1 else loss).backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, backend):
    """Loss to 1e-6 and gradients to 1e-5 at least, a loss above 1, repeated labels."""
    margin, args, options = CASES[case]
    w_CD, x_GD, label_G = data(length=3.0 if case in ("linear", "norm") else 25.0)
    loss, d_w, d_x = reference.dense_gradients(w_CD, x_GD, label_G, *args, **options)
    assert loss > 1
    head = build(margin, w_CD, backend=backend)
    found, grad = run(head, x_GD, label_G)
    assert found == pytest.approx(loss, rel=LOSS)
    assert reference.max_norm(grad, d_x) < GRADIENT
    head.step(1.0)
    assert reference.max_norm(w_CD - head.weight.numpy(), d_w) < GRADIENT


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_rows(backend):
    """The default: float32 rows. float64 embeddings keep float64 math, float32 ones are close to it."""
    w_CD, x_GD, label_G = data()
    w_CD = w_CD.astype(np.float32).astype(np.float64)
    loss, d_w, d_x = reference.dense_gradients(w_CD, x_GD, label_G, reference.arcface)
    for dtype, tight in (("float64", GRADIENT), ("float32", 2e-5)):
        head = build(w_CD=w_CD.astype(np.float32), dtype="float32", backend=backend)
        assert head.weight.dtype == paddle.float32 and head.weight.shape == [CLASSES, DIM]
        x = paddle.to_tensor(x_GD.astype(dtype), stop_gradient=False)
        found = head(x, paddle.to_tensor(label_G))
        assert found.shape == [] and str(found.dtype).endswith(dtype) and found.item() == pytest.approx(loss, rel=tight)
        found.backward()
        assert str(x.grad.dtype).endswith(dtype) and reference.max_norm(x.grad.numpy(), d_x) < tight
        head.step(1.0)
        assert reference.max_norm(w_CD - head.weight.numpy(), d_w) < 2e-5


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_and_scale(backend):
    """(3 * loss).backward() triples both gradients; grad_scale takes a loss scale out again."""
    w_CD, x_GD, label_G = data()
    plain, tripled, scaled = (build(w_CD=w_CD, backend=backend) for _ in range(3))
    _, d_x = run(plain, x_GD, label_G)
    _, d_x3 = run(tripled, x_GD, label_G, 3.0)
    run(scaled, x_GD, label_G, 4096.0)
    plain.step(1.0)
    tripled.step(1.0)
    scaled.step(1.0, grad_scale=1 / 4096)
    np.testing.assert_allclose(d_x3, 3 * d_x, rtol=1e-12)
    np.testing.assert_allclose(w_CD - tripled.weight.numpy(), 3 * (w_CD - plain.weight.numpy()), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(scaled.weight.numpy(), plain.weight.numpy(), rtol=1e-12)


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_accumulation(backend, rate):
    """Four micro-batches, each loss / 4, equal one batch; 4 * 4 samples > D, so they are folded."""
    w_CD, x_GD, label_G = data(batch=16)
    whole, parts = (build(w_CD=w_CD, backend=backend, sample_rate=rate, seed=5) for _ in range(2))
    whole.prepare([paddle.to_tensor(label_G)])
    loss, d_x = run(whole, x_GD, label_G)
    parts.prepare([paddle.to_tensor(label) for label in label_G.reshape(4, 4)])
    np.testing.assert_array_equal(parts.sampled, whole.sampled)
    assert len(parts.sampled) < CLASSES or rate == 1
    found = [
        run(parts, x, label, 0.25) for x, label in zip(x_GD.reshape(4, 4, DIM), label_G.reshape(4, 4), strict=True)
    ]
    assert np.mean([one for one, _ in found]) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(np.concatenate([grad for _, grad in found]), d_x, rtol=1e-9, atol=1e-12)
    whole.step(1.0)
    parts.step(1.0)
    np.testing.assert_allclose(parts.weight.numpy(), whole.weight.numpy(), rtol=1e-10)


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update", ["dense", "sampled"])
def test_training_equals_a_dense_optimiser(backend, update):
    """40 sampled steps with momentum, decay, changing lr, two skips and a flush, gradients by definition."""
    w_CD, _, _ = data()
    head = build(w_CD=w_CD, backend=backend, sample_rate=0.3, momentum=0.9, weight_decay=0.01, update=update)
    head._optimizer.max_ages = 16
    v_CD, checked = np.zeros_like(w_CD), 0
    for step in range(40):
        _, x_GD, label_G = data(seed=step, batch=3)
        loss, _ = run(head, x_GD, label_G)
        ids, lr = head.sampled, 0.02 * (1 + step % 5)
        assert np.isin(label_G, ids).all() and len(ids) == int(0.3 * CLASSES)
        if step in (11, 30):
            head.skip_step()
            continue
        head.step(lr)
        expected, d_w, _ = reference.dense_gradients(w_CD, x_GD, label_G, reference.arcface, classes=ids)
        assert loss == pytest.approx(expected, rel=1e-6)
        checked += loss > 1
        rows = slice(None) if update == "dense" else ids
        v_CD[rows] = 0.9 * v_CD[rows] + d_w[rows] + 0.01 * w_CD[rows]
        w_CD = w_CD.copy()
        w_CD[rows] -= lr * v_CD[rows]
        assert reference.max_norm(head.export_weight(), w_CD) < GRADIENT
    assert checked > 30
    assert reference.max_norm(head.weight.numpy(), w_CD) < GRADIENT


@pytest.mark.oldest
# Without a threshold non-targets are left alone, and numba's passes take part.
@pytest.mark.parametrize(("threshold", "update"), [(0.1, "dense"), (0.0, "dense"), (0.0, "sampled")])
def test_backends_agree_in_float32(threshold, update):
    """Every kernel: same draw, same training to float32 rounding, over several chunk sizes."""
    results = []
    sizes = [(backend, *size) for backend in BACKENDS if backend != "paddle" for size in ((16, 1), (7, 3), (1024, 2))]
    for backend, chunk, threads in (("paddle", 16, 1), *sizes):
        margin = build_margin("arcface", interclass_threshold=threshold)
        options = {"backend": backend, "chunk_rows": chunk, "num_threads": threads, "update": update}
        head = PartialFC(200, 16, margin, 0.3, seed=4, **options)
        rng = np.random.default_rng(23)  # no cosine comes within 2e-4 of the threshold, where rounding would decide
        for _ in range(12):
            x = paddle.to_tensor(rng.normal(size=(9, 16)).astype("float32"), stop_gradient=False)
            loss = head(x, paddle.to_tensor(rng.integers(0, 200, 9)))
            loss.backward()
            head.step(0.1)
        results.append((loss.item(), x.grad.numpy(), head.export_weight()))
    for loss, grad, weight in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert reference.max_norm(grad, results[0][1]) < 1e-4
        assert reference.max_norm(weight, results[0][2]) < 1e-4


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_direction_and_saturation(backend):
    """A zero embedding, a zero row, cos = +-1 exactly: everything stays finite."""
    w_CD, x_GD, label_G = data()
    x_GD[0], x_GD[1], x_GD[2] = 0.0, 5 * w_CD[label_G[1]], -5 * w_CD[label_G[2]]
    w_CD[(label_G[3] + 1) % CLASSES] = 0.0
    for name in ("arcface", "cosface", "sphereface", "adaface", "magface", "linear"):
        head = build((name, {}), w_CD.astype(np.float32), dtype="float32", backend=backend)
        loss, grad = run(head, x_GD.astype(np.float32), label_G)
        assert np.isfinite(loss) and np.isfinite(grad).all() and not head.found_nonfinite(), name
        head.step(0.1)
        assert np.isfinite(head.weight.numpy()).all()


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", ["embedding", "upstream", "weight"])
def test_nonfinite_is_found_and_skipped(backend, poison):
    """Inf anywhere is reported; skipping leaves weight, momentum and the next steps untouched."""
    w_CD, x_GD, label_G = data()
    head = build(w_CD=w_CD, backend=backend, momentum=0.9, weight_decay=0.01)
    run(head, x_GD, label_G)
    head.step(0.1)
    before = head.row_state()
    if poison == "weight":
        broken = before["weight"].copy()
        broken[2, 1] = np.inf
        head.weight.set_value(broken)
    broken_GD = x_GD.copy()
    if poison == "embedding":
        broken_GD[1, 0] = np.nan
    run(head, broken_GD, label_G, np.inf if poison == "upstream" else 1.0)
    assert head.found_nonfinite()
    head.skip_step()
    assert not head.found_nonfinite()
    if poison != "weight":
        for name, array in head.row_state().items():
            np.testing.assert_array_equal(array, before[name])
    head.weight.set_value(before["weight"])
    run(head, x_GD, label_G)
    assert not head.found_nonfinite()


@pytest.mark.oldest
@pytest.mark.parametrize("sample_rate", [1.0, 0.25])
@pytest.mark.parametrize("options", [{}, {"update": "sampled"}, {"optimizer": "adamw"}])
def test_resume_is_bit_exact(options, sample_rate):
    """What was trained is what is stored; saving mutates nothing; a resumed head repeats the run."""

    def train(head, steps):
        for step in steps:
            _, x_GD, label_G = data(seed=step)
            run(head, x_GD.astype(np.float32), label_G)
            head.step(0.1 / (1 + step))

    def fresh(seed):
        return PartialFC(CLASSES, DIM, build_margin("adaface"), sample_rate, seed=seed, **options)

    straight = fresh(1)
    initial = straight.export_weight()
    train(straight, range(6))
    resumed = fresh(2)
    state = copy.deepcopy((straight.row_state(), straight.table_state(), straight.meta_state()))
    resumed.load_state(*state)
    straight.export_weight()
    train(straight, range(6, 12))
    train(resumed, range(6, 12))
    for name, array in straight.row_state().items():
        np.testing.assert_array_equal(array, resumed.row_state()[name], err_msg=name)
        assert len(array) == CLASSES
    assert resumed.meta_state() == straight.meta_state() and np.abs(straight.export_weight() - initial).max() > 1e-3
    for name, array in state[0].items():  # loading has not taken hold of the caller's arrays
        assert not np.may_share_memory(array, resumed.row_state()[name])


@pytest.mark.oldest
def test_load_refuses_what_does_not_fit():
    head = build()
    rows, table, meta = head.row_state(), head.table_state(), head.meta_state()
    with pytest.raises(ValueError, match="num_classes is 24"):
        head.load_state(rows, table, {**meta, "num_classes": 24})
    with pytest.raises(ValueError, match="momentum is missing"):
        head.load_state({name: rows[name] for name in ("weight", "stamp")}, table, meta)
    with pytest.raises(ValueError, match=r"weight is \(22, 6\)"):
        head.load_state({**rows, "weight": rows["weight"][1:]}, table, meta)
    with pytest.raises(ValueError, match="ages above 7"):
        head.load_state({**rows, "stamp": rows["stamp"] + 7}, table, meta)


@pytest.mark.oldest
def test_caller_keeps_its_tensors():
    """Labels and embeddings are not changed, [B, 1] labels and a batch of one work, half is widened."""
    w_CD, x_GD, label_G = data()
    x, label = paddle.to_tensor(x_GD[:1], stop_gradient=False), paddle.to_tensor(label_G[:1, None])
    loss = build(w_CD=w_CD)(x, label)
    assert label.shape == [1, 1] and x.shape == [1, DIM] and x.dtype == paddle.float64
    assert loss.item() == pytest.approx(reference.dense_loss(w_CD, x_GD[:1], label_G[:1], reference.arcface), rel=LOSS)
    half = paddle.to_tensor(x_GD.astype(np.float16), stop_gradient=False)
    loss = build(w_CD=w_CD.astype(np.float32), dtype="float32")(half, paddle.to_tensor(label_G.astype(np.int32)))
    loss.backward()
    assert loss.dtype == paddle.float32 and half.grad.dtype == paddle.float16
    with paddle.no_grad():
        assert build(w_CD=w_CD)(x, label).stop_gradient


@pytest.mark.oldest
def test_frozen_embedding_still_trains_the_head():
    w_CD, x_GD, label_G = data()
    _, d_w, _ = reference.dense_gradients(w_CD, x_GD, label_G, reference.arcface)
    head = build(w_CD=w_CD)
    head(paddle.to_tensor(x_GD), paddle.to_tensor(label_G)).backward()
    head.step(1.0)
    assert reference.max_norm(w_CD - head.weight.numpy(), d_w) < GRADIENT


@pytest.mark.oldest
def test_sampling_of_the_head():
    """Rate 0 keeps positives alone; an unprepared call draws like a prepared one; draws move on."""
    w_CD, x_GD, label_G = data()
    positives = build(w_CD=w_CD, sample_rate=0.0)
    loss, _ = run(positives, x_GD, label_G)
    np.testing.assert_array_equal(positives.sampled, np.unique(label_G))
    expected = reference.dense_loss(w_CD, x_GD, label_G, reference.arcface, classes=label_G)
    assert loss == pytest.approx(expected, rel=LOSS)
    head = build(w_CD=w_CD, sample_rate=0.5, seed=9)
    run(head, x_GD, label_G)
    first = head.sampled
    head.clear_grad()
    head.prepare([paddle.to_tensor(label_G)])
    np.testing.assert_array_equal(head.sampled, first)
    head.skip_step()
    head.prepare([paddle.to_tensor(label_G)])
    assert not np.array_equal(head.sampled, first)
    assert not np.array_equal(build(sample_rate=0.5, seed=8).sampled, first)


@pytest.mark.oldest
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"update": "sampled"}])
def test_a_shard_without_rows_steps_after_a_fold(backend, options, monkeypatch):
    """Rate 0 and all labels on the other rank: no row, yet folded gradients and a step, once and over two batches."""
    monkeypatch.setattr("utils.distributed.get_world_size", lambda: 1)
    head = build(backend=backend, sample_rate=0.0, **options)
    head.shard = ClassShard(2 * CLASSES, 0, 1)
    head.shard.num_local, head.shard.start = CLASSES, CLASSES  # the second half: no label falls into it
    _, x_GD, label_G = data(batch=2 * DIM)
    before = head.row_state()
    for num_batches in (1, 2):
        head.prepare([label_G] * num_batches)
        for _ in range(num_batches):
            run(head, x_GD, label_G)
        assert head._update.dense is not None and len(head.sampled) == 0
        head.step(0.1)
    for name, array in head.row_state().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.oldest
def test_misuse_is_named():
    w_CD, x_GD, label_G = data()
    x, label = paddle.to_tensor(x_GD, stop_gradient=False), paddle.to_tensor(label_G)
    head = build(w_CD=w_CD, sample_rate=0.1)
    for wrong in (-1, CLASSES):
        with pytest.raises(ValueError, match=f"label: {wrong} must lie"):
            head(x, paddle.to_tensor(np.append(label_G[1:], wrong)))
    with pytest.raises(ValueError, match="float"):
        head(x, label.astype("float32"))
    with pytest.raises(ValueError, match=r"\[8, 5\]"):
        head(x[:, :5], label)
    with pytest.raises(ValueError, match="8 embeddings"):
        head(x, label[:3])
    with pytest.raises(ValueError, match="no gradient"):
        head.step(0.1)
    head.prepare([label[:1]])
    with pytest.raises(ValueError, match="prepare"):
        head(x, label)
    head.clear_grad()
    stale = head(x, label)
    head.skip_step()
    with pytest.raises((RuntimeError, OSError), match="draw of classes changed"):
        stale.backward()
    for options, words in (
        ({"sample_rate": 1.1}, "sample_rate"),
        ({"optimizer": "lion"}, "'lion'"),
        ({"optimizer": "adamw", "update": "dense"}, "sampled"),
        ({"matmul_dtype": "bf16"}, "bf16"),
        ({"backend": "torch"}, "'torch'"),
        ({"dtype": "float16"}, "'float16'"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)


@pytest.mark.oldest
@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 8), (100, 16), (85742, 8), (7, 7), (5, 1)])
def test_shards(num_classes, world_size):
    """The shards sum to C, contiguous in rank order; any C works."""
    shards = [ClassShard(num_classes, rank, world_size) for rank in range(world_size)]
    assert [shard.num_local for shard in shards] == [
        num_classes // world_size + (rank < num_classes % world_size) for rank in range(world_size)
    ]
    assert [shard.start for shard in shards] == [0, *np.cumsum([shard.num_local for shard in shards])[:-1]]
    assert shards[-1].stop == num_classes
    with pytest.raises(ValueError, match="split over"):
        ClassShard(num_classes, 0, num_classes + 1)
    with pytest.raises(ValueError, match="rank"):
        ClassShard(num_classes, world_size, world_size)


@pytest.mark.oldest
def test_initial_rows_do_not_depend_on_the_ranks():
    """A class starts from the same row on any number of ranks, N(0, 0.01^2)."""
    margin = build_margin("arcface")
    whole = PartialFC(10_001, 4, margin, seed=3).export_weight()
    for world_size in (2, 3):
        parts = [PartialFC(10_001, 4, margin, 1.0, rank, world_size, 3).export_weight() for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert abs(whole.mean()) < 2e-4 and whole.std() == pytest.approx(0.01, rel=0.02)
    with pytest.raises(ValueError, match="rank 1 of 2"):  # not the rank of this process
        PartialFC(10, 4, margin, 1.0, 1, 2).prepare([paddle.to_tensor([1])])


@pytest.mark.oldest
def test_easy_margin_of_1_2_trains():
    """m = 1.2 with s = 64 and the easy margin learns a separable toy from scratch (a recipe of the original demo)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8))
    paddle.seed(0)
    layer = paddle.nn.Linear(8, 8)
    sgd = paddle.optimizer.SGD(0.05, parameters=layer.parameters())
    head = PartialFC(6, 8, build_margin("arcface", m=1.2, s=64.0, easy_margin=True))
    losses = []
    for _ in range(150):
        label = rng.integers(0, 6, 32)
        noisy = centres[label] + 0.1 * rng.normal(size=(32, 8))
        loss = head(layer(paddle.to_tensor(noisy.astype(np.float32))), paddle.to_tensor(label))
        loss.backward()
        sgd.step()
        sgd.clear_grad()
        head.step(0.05)
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.25 * np.mean(losses[:10])
