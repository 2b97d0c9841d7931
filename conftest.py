"""Shared pytest set-up: the repository root is importable, tests of a GPU or of the test device skip without one."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Looked at before any test module imports Paddle, which sets the variable to a folder of its own.
ON_TEST_DEVICE = "CUSTOM_DEVICE_ROOT" in os.environ

# The environment of the oldest Paddle has neither PyTorch nor ONNX; none of its tests is in these files.
_NEEDS = (
    ("test_convert", "onnx"),
    ("test_export", "onnx"),
    ("test_openvino", "onnx"),
    ("test_quantize", "nncf"),
    ("test_tools_onnx", "onnx"),
    ("test_train_update", "torch"),
)
collect_ignore = [f"tests/{name}.py" for name, package in _NEEDS if importlib.util.find_spec(package) is None]


def pytest_collection_modifyitems(items):
    """Skip ``gpu`` tests where no GPU can be used; paddle is imported only if there are any."""
    if not ON_TEST_DEVICE:
        for item in items:
            if item.get_closest_marker("device"):
                item.add_marker(pytest.mark.skip(reason="the test device is not loaded; run make test-device"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import paddle

    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
