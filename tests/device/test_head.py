"""The head on the test device: against the dense definition on 1 to 3 ranks, and bit for bit against the CPU."""

import itertools
from pathlib import Path

import numpy as np
import paddle
import pytest

from losses import build_margin
from partial_fc import PartialFC
from tests.device.build import DEVICE
from tests.device.test_plugin import ON_DEVICE
from tests.ranks import run_ranks
from tests.test_partial_fc_ranks import check_elastic_resume

pytestmark = pytest.mark.device
CLASSES, DIM, BATCH = 61, 8, 12


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_equal_the_dense_definition(num_ranks, tmp_path):
    """What tests/test_partial_fc_ranks.py does on CPU; the shards stored on the device go on there, on CPU."""
    script = Path(__file__).resolve().parents[1] / "head_ranks.py"
    for rank, output in enumerate(run_ranks(script, num_ranks, args=(tmp_path, DEVICE), env=ON_DEVICE)):
        assert f"rank {rank} of {num_ranks}: all checks passed" in output
    paddle.set_device("cpu")
    check_elastic_resume(tmp_path, num_ranks)


def train(device: str, margin: tuple, steps: int = 5, micro_batches: int = 1, **options):
    """Losses, embedding gradients and all rows after a few updates."""
    paddle.set_device(device)
    head = PartialFC(CLASSES, DIM, build_margin(margin[0], **margin[1]), seed=5, backend="paddle", **options)
    found = []
    for step in range(steps):
        rng = np.random.default_rng(step)
        batches = [(rng.normal(size=(BATCH, DIM)), rng.integers(0, CLASSES, BATCH)) for _ in range(micro_batches)]
        head.prepare([paddle.to_tensor(label) for _, label in batches])
        for x, label in batches:
            embedding = paddle.to_tensor(x.astype(np.float32), stop_gradient=False)
            loss = head(embedding, paddle.to_tensor(label))
            (loss * (8.0 / micro_batches)).backward()
            found += [np.float64(float(loss)), embedding.grad.numpy()]
        if step == 2:
            head.skip_step()
        else:
            head.step(0.1, 1 / 8)
    return [*found, head.weight.numpy(), *(slot.numpy() for slot in head._bank.slots), head.export_weight()]


MODES = [
    dict(zip(("sample_rate", "optimizer", "update", "chunk_rows"), mode, strict=True))
    for mode in itertools.product((1.0, 0.3, 0.0), ("sgd", "adamw"), ("dense", "sampled"), (None, 7))
    if mode[1] == "sgd" or mode[2] == "sampled"
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_every_mode_gives_the_cpu_s_bits(mode):
    """The same kernels in the same order: whatever differs was read before it was written, or in the wrong place."""
    for ours, theirs in zip(train(f"{DEVICE}:0", ("arcface", {}), **mode), train("cpu", ("arcface", {}), **mode),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


MARGINS = [
    ("cosface", {}), ("linear", {}), ("magface", {"lambda_g": 35.0}), ("adaface", {}), ("softmax", {}),
    ("sphereface", {}), ("cosface", {"focal_gamma": 2.0}), ("arcface", {"interclass_threshold": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize("margin", MARGINS, ids=str)
def test_every_margin_gives_the_cpu_s_bits(margin):
    mode = {"sample_rate": 0.4, "chunk_rows": 9, "micro_batches": 2}
    for ours, theirs in zip(train(f"{DEVICE}:0", margin, **mode), train("cpu", margin, **mode), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("matmul_dtype", ["tf32", "bf16"])
def test_matmul_types(matmul_dtype):
    """tf32 products are float32 here (the switch is a GPU's); bf16 ones differ from float32, and not by much."""
    ours = train(f"{DEVICE}:0", ("arcface", {}), chunk_rows=20, matmul_dtype=matmul_dtype)
    theirs = train("cpu", ("arcface", {}), chunk_rows=20)
    same = [np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert all(same) == (matmul_dtype == "tf32")
    assert np.abs(ours[-1] - theirs[-1]).max() <= 0.05 * np.abs(theirs[-1]).max()


def test_what_needs_the_cpu_is_refused_here():
    paddle.set_device(DEVICE)
    with pytest.raises(ValueError, match="works on CPU"):
        PartialFC(CLASSES, DIM, build_margin("arcface"), backend="numpy")
