"""The head on 1, 2 and 3 real gloo ranks (tests/head_ranks.py is what each of them runs), and elastic resume."""

from pathlib import Path

import numpy as np
import pytest

from losses import build_margin
from partial_fc import PartialFC
from tests import head_ranks
from tests import head_reference as reference
from tests.ranks import run_ranks


@pytest.mark.oldest
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_equal_the_dense_definition(num_ranks, tmp_path):
    outputs = run_ranks(Path(__file__).parent / "head_ranks.py", num_ranks, args=(tmp_path,))
    for rank, output in enumerate(outputs):
        assert f"rank {rank} of {num_ranks}: all checks passed" in output
    check_elastic_resume(tmp_path, num_ranks)


def check_elastic_resume(folder: Path, num_ranks: int) -> None:
    """The joined shards of W ranks continue on one rank as a dense float64 optimiser would."""
    shards = [np.load(folder / f"{rank}.npz") for rank in range(num_ranks)]
    names = ("weight", "momentum", "stamp")
    rows = {name: np.concatenate([shard[name] for shard in shards]) for name in names}
    for shard in shards:
        np.testing.assert_array_equal(shard["transition"], shards[0]["transition"])
    options = {"momentum": 0.9, "weight_decay": 0.01}
    head = PartialFC(head_ranks.CLASSES, head_ranks.DIM, build_margin("arcface"), seed=1, **options)
    meta = {**head.meta_state(), "num_updates": 6}
    head.load_state(rows, {"transition": shards[0]["transition"]}, meta)

    w_CD = head_ranks.data(1)[0].astype(np.float32).astype(np.float64)
    v_CD = np.zeros_like(w_CD)
    for step in range(8):
        _, x_GD, label_G = head_ranks.data(1, seed=step)
        ids, lr = np.arange(step % 3, head_ranks.CLASSES, 4), 0.1 / (1 + step)
        if step >= 6:
            head_ranks.Rank().run(head, x_GD.astype(np.float32), label_G, sampled=ids)
            head.step(lr)
        _, d_w, _ = reference.dense_gradients(w_CD, x_GD, label_G, reference.arcface, classes=ids)
        v_CD = 0.9 * v_CD + d_w + 0.01 * w_CD
        w_CD = w_CD - lr * v_CD
    assert reference.max_norm(head.export_weight(), w_CD) < 1e-4  # float32 gradients of s = 64 along the way
