"""The test device itself: memory that the host cannot touch, counters, collectives, half precision, randomness."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from tests.device.build import DEVICE
from tests.device.counters import counts, kernel_calls
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.device
BF16_TYPE = "intel_hpu"  # one of the names to which Paddle's autocast grants bfloat16, and nothing else
ON_DEVICE = {"PADDLE_DISTRI_BACKEND": "auto"}  # not gloo, which tests/ranks.py asks for


@pytest.fixture(autouse=True)
def device():
    paddle.set_device(f"{DEVICE}:0")


def child(source: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", source]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_the_host_cannot_touch_the_memory():
    """Reading a tensor's address from Python ends the process; so it does if our own view of a CPU tensor is taken."""
    for read in ("ctypes.string_at(t.data_ptr(), 4)", "float(view(t)[0])"):
        done = child(
            "import ctypes, faulthandler, paddle; from utils.head.rows import view; "
            f"paddle.set_device('{DEVICE}'); t = paddle.ones([8]); print(t.numpy()[0], flush=True); {read}"
        )
        assert "1.0" in done.stdout, done.stderr
        assert done.returncode == -signal.SIGSEGV or "Segmentation fault" in done.stderr, (done.returncode, done.stderr)


def test_fresh_memory_is_nan():
    assert np.isnan(paddle.empty([1000]).numpy()).all()
    del_me = paddle.ones([1000])
    del del_me  # its memory is free again, and must not be seen by the next tensor
    assert np.isnan(paddle.empty([1000]).numpy()).all()


def test_copies_are_counted_and_nothing_else_is():
    array = np.arange(300, dtype=np.float32).reshape(10, 30)
    start = counts()
    tensor = paddle.to_tensor(array)
    up = counts()
    assert ((up - start).h2d_calls, (up - start).h2d_bytes, (up - start).d2h_calls) == (1, 1200, 0)
    result = paddle.nn.functional.softmax(tensor @ tensor.T * 0.01, -1)[:, 2:5].sum()
    computed = counts()
    assert (computed - up).h2d_calls == (computed - up).d2h_calls == 0
    assert (computed - up).kernel_calls >= 4
    value = result.numpy()
    read = counts()
    assert (read - computed).d2h_calls == 1
    assert (read - computed).d2h_bytes == 256, "Paddle reads a scalar's whole allocation, the least of which is that"
    scores = array @ array.T * 0.01
    softmax = np.exp(scores - scores.max(1, keepdims=True))
    assert abs(value - (softmax / softmax.sum(1, keepdims=True))[:, 2:5].sum()) < 1e-5
    assert kernel_calls()["softmax"] >= 1


def test_peak_memory_is_the_device_s():
    from utils.system import peak_memory_mb

    paddle.zeros([4 << 20])  # 16 MB
    assert 16 <= peak_memory_mb() < 200, "the host's resident memory is more"


HALF = """
import sys, numpy as np, paddle
from utils import distributed
from utils.model.precision import autocast, check_precision
precision, name = sys.argv[1:]
device = distributed.init(name)
check_precision(precision, paddle.get_device())
exact, dtype = {"fp16": (2049.0, "float16"), "bf16": (257.0, "bfloat16")}[precision]
conv = paddle.nn.Conv2D(1, 1, 1, bias_attr=False, weight_attr=paddle.nn.initializer.Constant(1.0))
norm, image = paddle.nn.BatchNorm2D(1), paddle.full([1, 1, 2, 2], exact)
assert float(conv(image).max()) == exact
with autocast(precision):
    reduced = conv(image)
    normal = norm(reduced)
    product = paddle.matmul(paddle.full([2, 2], 300.0), paddle.full([2, 2], 300.0))
assert str(reduced.dtype).endswith(dtype) and str(normal.dtype).endswith(dtype), (reduced.dtype, normal.dtype)
assert float(reduced.astype("float32").max()) == exact - 1, "only what was rounded on the way loses the last unit"
assert np.isinf(product.astype("float32").numpy()).all() == (precision == "fp16"), "180,000 is beyond float16 alone"
(normal.astype("float32") ** 2).sum().backward()
assert conv.weight.grad.dtype == norm.weight.grad.dtype == norm._mean.dtype == paddle.float32
assert np.isfinite(norm.weight.grad.numpy()).all()
print("half it is")
"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_autocast_computes_in_half_precision(precision):
    (output,) = run_ranks(HALF, 1, [precision, BF16_TYPE], env={"SANDBOX_TYPE": BF16_TYPE})
    assert "half it is" in output


def test_half_precision_that_paddle_ignores_is_refused():
    """Paddle's autocast knows by name which plug-ins have bfloat16, warns on all others and computes in float32."""
    output, status = run_ranks(HALF, 1, ["bf16", DEVICE], check=False)
    assert status == "1"
    assert "UserError: run.precision: bf16" in output
    assert "set run.precision=fp16" in output


def test_random_numbers_come_from_the_device_s_state():
    paddle.seed(3)
    state = paddle.get_rng_state()
    ones = paddle.ones([1000])
    first = paddle.nn.functional.dropout(ones, 0.5).numpy()
    second = paddle.nn.functional.dropout(ones, 0.5).numpy()
    paddle.set_rng_state(state)
    again = paddle.nn.functional.dropout(ones, 0.5).numpy()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


COLLECTIVES = """
import numpy as np, paddle, paddle.distributed as dist
from utils import distributed
distributed.init("sandbox")
rank, world = distributed.get_rank(), distributed.get_world_size()
assert paddle.get_device() == f"sandbox:{rank}", paddle.get_device()
def value(rank, dtype, size=100_001):  # more than one piece of the shared memory
    return ((np.arange(size) * 7 + rank * 13) % 11 - 5).astype(dtype)
for dtype in ("float32", "float64", "int32", "int64"):
    everyone = np.stack([value(r, dtype) for r in range(world)])
    mine = paddle.to_tensor(value(rank, dtype))
    for op, reduced in ((dist.ReduceOp.SUM, everyone.sum(0)), (dist.ReduceOp.MAX, everyone.max(0)),
                        (dist.ReduceOp.MIN, everyone.min(0)), (dist.ReduceOp.PROD, everyone.prod(0))):
        output = mine.clone()
        dist.all_reduce(output, op=op)
        np.testing.assert_array_equal(output.numpy(), reduced.astype(dtype))
    np.testing.assert_array_equal(distributed.all_gather_rows(mine).numpy(), everyone.ravel())
    spread = mine.clone()
    dist.broadcast(spread, src=world - 1)
    np.testing.assert_array_equal(spread.numpy(), everyone[-1])
    wide = np.stack([value(r, dtype, world * 40_000) for r in range(world)])
    shares = distributed.reduce_scatter_rows(paddle.to_tensor(wide[rank]))
    np.testing.assert_array_equal(shares.numpy(), wide.sum(0).astype(dtype)[rank * 40_000 : (rank + 1) * 40_000])
half = paddle.full([3], 1.0 + rank, "float16")
dist.all_reduce(half)
assert half.astype("float32").numpy().tolist() == [world * (world + 1) / 2] * 3
output = mine.clone()
dist.reduce(output, dst=0)
if rank == 0:
    np.testing.assert_array_equal(output.numpy(), everyone.sum(0))
# Round the ring; the message does not fit the mailbox, so a send ends when the other side receives.
received = paddle.empty([100_001], "int64")
if rank == 0:
    dist.send(mine, 1)
dist.recv(received, (rank - 1) % world)
if rank > 0:
    dist.send(mine, (rank + 1) % world)
np.testing.assert_array_equal(received.numpy(), everyone[(rank - 1) % world])
parts = []
dist.alltoall(parts, [paddle.full([5], 10 * rank + to) for to in range(world)])
assert [int(part[0]) for part in parts] == [10 * each + rank for each in range(world)]
assert distributed.all_gather_object({"rank": rank}) == [{"rank": r} for r in range(world)]
assert distributed.agree(rank == 1, False) == (True, False)
print("all right", rank)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_collectives(num_ranks):
    for rank, output in enumerate(run_ranks(COLLECTIVES, num_ranks, env=ON_DEVICE)):
        assert f"all right {rank}" in output
    assert not list(Path("/dev/shm").glob("sandbox-*")), "nothing is left behind"
