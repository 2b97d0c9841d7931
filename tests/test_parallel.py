"""The backbone on real ranks: gradients and running statistics against copies that see every rank's batches by hand."""

import pytest

from tests.ranks import run_ranks

SCRIPT = """
import numpy as np, paddle
from backbones import build_backbone
from utils import distributed
from utils.compat import paddle_version
from utils.model.replica import Replica

distributed.init("cpu")
rank, world = distributed.get_rank(), distributed.get_world_size()

def build(dtype, recompute=False):
    paddle.seed(3)
    backbone = build_backbone("iresnet18", width=4, input_size=32, embedding_size=8, recompute=recompute)
    backbone.to(dtype=dtype)
    backbone.train()
    return backbone

def batch(of_rank, micro, dtype):
    rng = np.random.default_rng(100 * of_rank + micro)
    image, weight = rng.uniform(-1, 1, (6, 3, 32, 32)), rng.normal(size=(6, 8))
    return paddle.to_tensor(image.astype(dtype)), paddle.to_tensor(weight.astype(dtype))

def loss(backbone, of_rank, micro, dtype):
    image, weight = batch(of_rank, micro, dtype)
    return (backbone(image) * weight).sum()

def statistics(backbone):
    state = backbone.state_dict()
    return {name: value.numpy() for name, value in state.items() if name.endswith(("._mean", "._variance"))}

def close(found, expected, tolerance, what):
    error, size = np.abs(found - expected).max(), np.abs(expected).max()
    assert error <= tolerance * (size + 1e-3), f"{what}: {error} at {size}"

cases = [(False, False, "float64"), (True, False, "float64")]
if paddle_version() >= (3, 0):  # before it nothing is compiled on CPU
    cases.append((False, True, "float32"))
for num_micro in (1, 3):
    for recompute, compiled, dtype in cases:
        tolerance = 1e-9 if dtype == "float64" else 2e-3
        copies = [build(dtype) for _ in range(world)]
        for of_rank, copy in enumerate(copies):
            for micro in range(num_micro):
                loss(copy, of_rank, micro, dtype).backward()
        names = [name for name, p in copies[0].named_parameters() if p.grad is not None]
        parameters = [dict(copy.named_parameters()) for copy in copies]
        expected = {name: sum(each[name].grad.numpy() for each in parameters) / world for name in names}
        mean = {name: sum(statistics(copy)[name] for copy in copies) / world for name in statistics(copies[0])}

        replica = Replica(build(dtype, recompute), recompute=recompute, compile=compiled)
        for micro in range(num_micro):
            with replica.micro_batch(last=micro == num_micro - 1):
                loss(replica, rank, micro, dtype).backward()
        replica.finish_backward()
        what = f"{num_micro} micro-batches, recompute {recompute}, compile {compiled}, {dtype}"
        found = dict(replica.backbone.named_parameters())
        scale = max(np.abs(value).max() for value in expected.values())
        for name in names:
            error = np.abs(found[name].grad.numpy() - expected[name]).max()
            assert error <= tolerance * scale, f"{what}, {name}: {error} at {scale}"
        (figure,) = replica.sum_figures([rank + 0.5]).tolist()
        assert figure == sum(range(world)) + world / 2
        replica.finish_update(skipped=False)
        for name, value in statistics(replica.backbone).items():
            close(value, mean[name], max(tolerance, 1e-6), f"{what}, {name}")
        good = statistics(replica.backbone)
        replica.backbone(batch(rank, 9, dtype)[0])
        assert any((statistics(replica.backbone)[name] != good[name]).any() for name in good)
        replica.sum_figures([0.0])
        replica.finish_update(skipped=True)
        for name, value in statistics(replica.backbone).items():
            assert (value == good[name]).all(), f"{what}: a skipped update changed {name}"
print("agreed", rank)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.oldest), 3])
def test_gradients_and_statistics_are_the_mean_over_ranks(num_ranks):
    """With one micro-batch and three, with activations kept and recomputed, dynamic and compiled."""
    outputs = run_ranks(SCRIPT, num_ranks, timeout=240)
    assert all(f"agreed {rank}" in output for rank, output in enumerate(outputs))
