"""Shared pytest set-up: the repository root is importable, GPU tests skip without a GPU."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_collection_modifyitems(items):
    """Skip ``gpu`` tests where no GPU can be used; paddle is imported only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import paddle

    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
