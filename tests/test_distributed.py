"""Collectives on real gloo ranks against values worked out by hand."""

import os

import pytest

from tests.ranks import run_ranks
from utils import distributed
from utils.errors import UserError

SCRIPT = """
import numpy as np, paddle
from utils import distributed as d
from utils.errors import UserError
d.init("cpu")
rank, world = d.get_rank(), d.get_world_size()
x = paddle.to_tensor(np.arange(4, dtype="float64").reshape(2, 2) + 10 * rank)
assert np.array_equal(d.all_gather_rows(x).numpy()[:, 0], [v for r in range(world) for v in (10 * r, 10 * r + 2)])
assert np.array_equal(d.all_reduce_sum(x).numpy()[0, 1], sum(10 * r + 1 for r in range(world)))
assert d.all_reduce_max(x).numpy()[1, 1] == 10 * (world - 1) + 3
big = paddle.to_tensor(np.arange(2 * world, dtype="float32").reshape(-1, 1) * (rank + 1))
scale = world * (world + 1) / 2
assert np.array_equal(d.reduce_scatter_rows(big).numpy()[:, 0], np.array([2 * rank, 2 * rank + 1]) * scale)
assert d.all_gather_object({"r": rank, "pad": "x" * rank * 7}) == [{"r": r, "pad": "x" * r * 7} for r in range(world)]
assert d.broadcast_object(f"from {rank}", src=0) == "from 0"
assert d.agree(rank == world - 1, False) == (True, False)
parameter = paddle.create_parameter([3], "float32")
(parameter * float(rank + 1)).sum().backward()
d.average_gradients([parameter])
assert np.allclose(parameter.grad.numpy(), (world + 1) / 2)
d.raise_together(None)
try:
    d.raise_together(UserError("boom") if rank == world - 1 else None)
    raise SystemExit("did not raise")
except UserError as error:
    assert "boom" in str(error)
d.barrier()
print("ok", rank)
"""


@pytest.mark.oldest
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_collectives(num_ranks):
    outputs = run_ranks(SCRIPT, num_ranks)
    for rank, output in enumerate(outputs):
        assert f"ok {rank}" in output


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "PADDLE_TRAINER_ID is not set"),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_CURRENT_ENDPOINT": "a:1", "PADDLE_TRAINER_ENDPOINTS": "a:1"}, "names 1"),
    ],
)
def test_a_leftover_of_the_launcher_is_one_line(monkeypatch, variables, told):
    for name in [name for name in os.environ if name.startswith("PADDLE_")]:
        monkeypatch.delenv(name)
    for name, value in {"PADDLE_TRAINERS_NUM": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"PADDLE_TRAINERS_NUM=2 .*{told}.*unset"):
        distributed.init("cpu")
