"""Embedding, verification and gpu_check's steps on the test device."""

import json

import numpy as np
import paddle
import pytest

from backbones import build_backbone
from eval.embed import load_embedder
from tests.device.build import DEVICE
from tests.device.counters import counts
from tests.device.test_plugin import BF16_TYPE, ON_DEVICE
from tests.eval_data import faces
from tests.ranks import ROOT, run_ranks
from utils.errors import UserError

pytestmark = pytest.mark.device


@pytest.fixture
def network():
    def build(device: str):
        paddle.set_device(device)
        layer = build_backbone("iresnet18", width=4, input_size=32, embedding_size=8)
        rng = np.random.default_rng(1)
        for _, tensor in sorted(layer.state_dict().items()):
            value = rng.normal(size=tensor.shape) / np.sqrt(max(1, np.prod(tensor.shape[1:])))
            tensor.set_value((np.abs(value) + 0.5 if tensor.ndim == 1 else value).astype(np.float32))
        return layer.eval()

    yield build
    paddle.set_device(DEVICE)


@pytest.mark.parametrize("engine", ["auto", "dynamic", "static"])
def test_embeddings_are_the_cpu_s_and_made_on_the_device(engine, network):
    images, _ = faces(3, 4, 32)
    expected = load_embedder(network("cpu"), engine="dynamic")(images, flip=True)
    embedder = load_embedder(network(DEVICE), engine=engine, batch_size=5)
    before = counts()
    found = embedder(images, flip=True)
    work = counts() - before
    assert work.kernel_calls > 3 * 50, f"{embedder.engine} ran elsewhere"
    assert work.h2d_bytes >= images.size, "the images went there"
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("engine", ["predictor", "onnx", "openvino"])
def test_engines_that_do_not_know_the_device_are_refused(engine, network):
    """Nothing falls back to the CPU in silence."""
    with pytest.raises(UserError, match=f"engine '?{engine}'?.*{DEVICE}"):
        load_embedder(network(DEVICE), engine=engine)


VERIFY = """
import sys, json
import numpy as np, paddle
from backbones import build_backbone
from eval.pairs import verify
from tests.eval_data import faces, pairs_of
from utils import distributed
distributed.init(sys.argv[1])
images, person = faces(6, 6, 32)
index, same = pairs_of(person, 40)
paddle.seed(2)
layer = build_backbone("iresnet18", width=4, input_size=32, embedding_size=8)
rng = np.random.default_rng(1)
for _, tensor in sorted(layer.state_dict().items()):
    value = rng.normal(size=tensor.shape) / np.sqrt(max(1, np.prod(tensor.shape[1:])))
    tensor.set_value((np.abs(value) + 0.5 if tensor.ndim == 1 else value).astype(np.float32))
result = verify(layer, {"set": (images[index], same)}, batch_size=7)["set"]
print("RESULT " + json.dumps([result.metrics.accuracy, result.metrics.auc, result.no_flip.accuracy]), flush=True)
"""


@pytest.mark.distributed
def test_verification_on_two_ranks_is_the_cpu_s():
    def figures(output):
        (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
        return json.loads(line[7:])

    (expected,) = map(figures, run_ranks(VERIFY, 1, ["cpu"]))
    for output in run_ranks(VERIFY, 2, [DEVICE], env=ON_DEVICE):
        np.testing.assert_allclose(figures(output), expected, atol=0.03)


CHECKED = (
    "smoke", "fp32", "head tf32", "head bf16", "fp16", "bf16", "compiled", "recomputed", "NHWC", "accumulated",
    "one rank", "two ranks", "sync_bn", "fp16 overflow", "resume",
)  # fmt: skip


@pytest.mark.distributed
def test_gpu_check_in_its_small_form(tmp_path):
    """What it would try on a GPU passes here, in the order of its weight, as far as the minutes carry."""
    told = ["--device", BF16_TYPE, "--small", "--minutes", "4", "--output", str(tmp_path / "report.json")]
    env = ON_DEVICE | {"SANDBOX_TYPE": BF16_TYPE, "SANDBOX_DEVICES": "2"}
    run_ranks(ROOT / "tools" / "gpu_check.py", 1, told, env=env, timeout=420, check=False)
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    done = {name: found for name, found in checks.items() if "not run" not in str(found.get("problem"))}
    assert {name: found for name, found in done.items() if not found["passed"]} == {}
    assert set(CHECKED) <= set(done)
