"""train.py on the test device: precisions, skips, resume there and on the CPU, two ranks, batch norm over ranks."""

import numpy as np
import pytest

from tests.device.build import DEVICE
from tests.device.test_plugin import BF16_TYPE, ON_DEVICE
from tests.ranks import ROOT, run_ranks
from tests.test_train import arrays, metrics, tiny
from utils.run.checkpoint import list_checkpoints, load_checkpoint

pytestmark = [pytest.mark.device, pytest.mark.distributed]
STEPS = "run.epochs=1"  # 14 updates of 4 images on one rank


def train(config, num_ranks: int = 1, *more: str, device: str = DEVICE, check: bool = True) -> list[str]:
    """train.py on the device; what each rank printed (and the exit status, with ``check=False``)."""
    env = ON_DEVICE | ({"SANDBOX_TYPE": device} if device == BF16_TYPE else {})
    if device == "cpu":
        env = {"PADDLE_DISTRI_BACKEND": "gloo"}
    words = [config, f"run.device={device}", STEPS, *more]
    return run_ranks(ROOT / "train.py", num_ranks, words, env=env, timeout=200, check=check)


def weights(run) -> dict[str, np.ndarray]:
    return load_checkpoint(list_checkpoints(run)[0], 0, 11).shared["backbone"]


def losses(run) -> list[float]:
    return [line["loss"] for line in metrics(run)]


OPTIONS = ("run.accumulation=2", "run.ema=0.9", "model.recompute=true")


def test_float32_is_the_cpu_s_and_resumes_bit_for_bit(tmp_path):
    """Accumulation, EMA and recompute on; a resume in the middle on the device ends with the same bits."""
    config = tiny(tmp_path, "whole", 2)
    more = (*OPTIONS, "model.dropout=0.0", "checkpoint.every_steps=6", "optim.lr=0.001")
    train(config, 1, *more)
    whole = list_checkpoints(tmp_path / "whole")[0]
    middle = tmp_path / "whole" / "checkpoints" / "step_00000006"
    train(tiny(tmp_path, "resumed", 2), 1, *more, "--resume", str(middle))
    assert arrays(tmp_path / "resumed" / "checkpoints" / whole.name) == arrays(whole)
    # The same run on CPU differs by what oneDNN and the numpy kernel round otherwise ...
    train(tiny(tmp_path, "cpu", 2), 1, *more, device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "whole"), losses(tmp_path / "cpu"), rtol=1e-3)
    # ... and a checkpoint of the device goes on there.
    train(tiny(tmp_path, "moved", 2), 1, *more, "--resume", str(middle), device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "moved")[-1], losses(tmp_path / "whole")[-1], rtol=1e-3)


@pytest.mark.parametrize(("precision", "device"), [("fp16", DEVICE), ("bf16", BF16_TYPE)])
def test_half_precision(precision, device, tmp_path):
    """An absurd loss scale overflows float16: the update is skipped and the scale halved until it fits."""
    more = (f"run.precision={precision}", "run.loss_scale=1048576", "log.every_steps=1", *OPTIONS)
    train(tiny(tmp_path, "half", 2), 1, *more, device=device)
    lines = metrics(tmp_path / "half")
    skipped = [line["skipped"] for line in lines]
    assert (skipped[-1] > 3) == (precision == "fp16")
    if precision == "fp16":
        assert lines[-1]["loss_scale"] == 2**20 / 2 ** skipped[-1]
        assert skipped[-1] < len(lines), "in the end it fits"
    assert all(np.isfinite(value).all() for value in weights(tmp_path / "half").values())
    assert all(np.isfinite(losses(tmp_path / "half")))


def test_two_ranks_and_on_with_one(tmp_path):
    """Two ranks resume bit for bit; one rank goes on from their checkpoint with the same global batch."""
    more = ("model.recompute=true", "checkpoint.every_steps=4")
    train(tiny(tmp_path, "two", 4), 2, *more)
    whole = list_checkpoints(tmp_path / "two")[0]
    middle = tmp_path / "two" / "checkpoints" / "step_00000004"
    train(tiny(tmp_path, "again", 4), 2, *more, "--resume", str(middle))
    assert arrays(tmp_path / "again" / "checkpoints" / whole.name) == arrays(whole)
    train(tiny(tmp_path, "one", 8), 1, *more, "--resume", str(middle))
    assert list_checkpoints(tmp_path / "one")[0].name == whole.name
    assert abs(losses(tmp_path / "one")[-1] / losses(tmp_path / "two")[-1] - 1) < 0.5


def test_wrong_device_is_one_line(tmp_path):
    output, status = train(tiny(tmp_path, "none", 4), 1, device="gpu", check=False)
    assert status == "1"
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "device 'gpu' asked for" in line
    assert f"{DEVICE}, cpu" in line


SYNC = """
import json, sys
import numpy as np, paddle
from backbones import build_backbone
from utils import distributed
from utils.model.replica import Replica
distributed.init("sandbox")
rank, world = distributed.get_rank(), distributed.get_world_size()
rng = np.random.default_rng(0)
image = rng.normal(size=(8, 3, 32, 32)).astype(np.float32)
share = image[rank * 8 // world : (rank + 1) * 8 // world]
for recompute in (False, True):
    paddle.seed(5)
    network = build_backbone("iresnet18", width=4, input_size=32, embedding_size=8, recompute=recompute)
    replica = Replica(network, sync_bn=True, recompute=recompute)
    (replica(paddle.to_tensor(share)) ** 2).sum().backward()
    state = network.state_dict()
    names = sorted(name for name in state if name.endswith(("._mean", "._variance")) and "features" not in name)
    statistics = np.concatenate([state[name].numpy().ravel() for name in names])
    gradient = network.conv1.weight.grad.numpy().ravel()
    if rank == 0:
        np.savez(f"{sys.argv[1]}/{world}_{recompute}.npz", statistics=statistics, gradient=gradient)
"""


def test_sync_bn_sees_all_ranks_and_each_batch_once(tmp_path):
    """Two ranks' statistics are one's; with recompute the second pass must not move them again."""
    for num_ranks in (1, 2):
        run_ranks(SYNC, num_ranks, [tmp_path], env=ON_DEVICE)
    found = {path.stem: dict(np.load(path)) for path in tmp_path.glob("*.npz")}
    for name in ("1_True", "2_False", "2_True"):
        np.testing.assert_allclose(found[name]["statistics"], found["1_False"]["statistics"], rtol=1e-4, atol=1e-5)
    for num_ranks in (1, 2):
        plain, again = (found[f"{num_ranks}_{recompute}"]["gradient"] for recompute in (False, True))
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
