"""How often an update goes between host and device, and how many Paddle calls it makes around the backbone.

Counted on CPU with the kernel that accelerators run: every call from Python into Paddle (functions, tensor methods and
operators) outside the backbone's own forward and backward, what a call does inside not counted again. Not counted is
what asks for no kernel (``FREE``). Clipping is off: on CPU it is a call a tensor, on a device one for all.
"""

import contextlib

import numpy as np
import paddle
import pytest

import train
from config import load_config
from losses import build_margin
from partial_fc import PartialFC
from utils.run.steps import Feed

pytestmark = pytest.mark.oldest
READS = ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__array__", "__index__")
FREE = ("no_grad", "enable_grad", "is_grad_enabled", "get_device", "clear_gradient", "data_ptr", "detach")
ARCFACE = {"name": "arcface"}
CONFIG = """
run: {output: OUTPUT, device: cpu, seed: 3, batch_size: 4, epochs: 9, hang_timeout: 0}
data: {kind: synthetic, num_classes: 60, num_images: 64, num_threads: 1, flip: false}
model: {network: iresnet50, width: 4, input_size: 32, embedding_size: 16}
optim: {lr: 0.01, clip_norm: 0.0}
log: {tensorboard: false}
"""


class Counter:
    """Outermost Paddle calls, uploads (numpy arrays made tensors of the device) and reads while ``on``."""

    def __init__(self, monkeypatch):
        self.names, self.uploads, self.reads, self.depth, self.on = [], 0, [], 0, False
        modules = [paddle, paddle._C_ops, paddle.nn.functional, paddle.linalg, paddle.tensor, paddle.utils.dlpack]
        for owner in [paddle.Tensor, *modules]:
            for name in dir(owner):
                function = getattr(owner, name)
                plain = not isinstance(function, type) and callable(function)
                hidden = name.startswith("_") and owner is not paddle._C_ops and name not in OPERATORS
                if plain and not hidden and name not in FREE:
                    monkeypatch.setattr(owner, name, self._wrapped(name, function), raising=False)

    def _wrapped(self, name, function):
        def call(*args, **kwargs):
            if not self.on:
                return function(*args, **kwargs)
            if self.depth == 0:
                self.names.append(name)
                if name in READS and not (name == "__array__" and args[0].dtype == paddle.int64):  # labels: host memory
                    self.reads.append(name)
                to_host = name == "to_tensor" and "place" in kwargs
                from_host = name == "set_value" and not isinstance(args[1], paddle.Tensor)
                self.uploads += (name == "to_tensor" and not to_host) or from_host
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return call

    @contextlib.contextmanager
    def paused(self, pause=True):
        """Not counted inside (the backbone); ``pause=False``: counted again (the head in the backbone's backward)."""
        before, self.on = (self.on, self.depth), self.on and not pause
        if not pause:
            self.on, self.depth = True, 0
        try:
            yield
        finally:
            self.on, self.depth = before


class Never:
    """No signal."""

    received, agreed = None, False


OPERATORS = (
    *READS, "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__",
    "__pow__", "__neg__", "__getitem__", "__setitem__", "__gt__", "__lt__", "__eq__", "__ge__", "__le__", "_slice",
)  # fmt: skip


def build(tmp_path, chunk_rows, rate, margin):
    path = tmp_path / "counted.yaml"
    path.write_text(CONFIG.replace("OUTPUT", str(tmp_path / "run")))
    run = train.build(load_config(path))
    run.head = PartialFC(
        60, 16, build_margin(**margin), rate, backend="paddle", chunk_rows=chunk_rows, weight_decay=5e-4
    )
    return run


def count(monkeypatch, tmp_path, chunk_rows, rate=1.0, micro=1, with_angles=False, margin=ARCFACE):
    """The third update's counter: what is made once is made by then, and rows lag behind where rate is below 1."""
    run = build(tmp_path, chunk_rows, rate, margin)
    run.accumulation = micro
    feed = Feed(run, Never)
    with monkeypatch.context() as patch:
        counter = Counter(patch)
        forward, backward, head = run.replica.model.forward, paddle.Tensor.backward, run.head._backward

        def apart(function, pause):
            def call(*args, **kwargs):
                if not counter.on and pause:
                    return function(*args, **kwargs)
                with counter.paused(pause) if pause or counting[0] else contextlib.nullcontext():
                    return function(*args, **kwargs)

            return call

        counting = [False]
        patch.setattr(run.replica.model, "forward", apart(forward, True))
        patch.setattr(paddle.Tensor, "backward", apart(backward, True))
        patch.setattr(run.head, "_backward", apart(head, False))
        for index in range(3):
            batches = feed.next()
            counter.on = counting[0] = index == 2
            done = train.update(run, batches, 0.01, with_angles, feed.ahead)
            run.progress.step += 1
        counter.on = False
        assert not done.skipped and (done.angles is not None) == with_angles
    run.log.close()
    run.loader.close()
    return counter


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_an_update_uploads_once_reads_once_and_calls_little(rate, monkeypatch, tmp_path):
    """At most 500 calls around iresnet50 for one chunk of classes and 35 for each further one."""
    one, six = (count(monkeypatch, tmp_path, chunk, rate) for chunk in (60, 10 if rate == 1 else 5))
    for counter in (one, six):
        assert counter.uploads == 1, "what the head needs of the host"
        assert counter.reads == ["numpy"], "loss, norm and finiteness"
    assert len(one.names) <= 500, f"{len(one.names)} calls"
    assert (len(six.names) - len(one.names)) / 5 <= 35, f"{len(one.names)} calls, then {len(six.names)}"
    assert {"squared_l2_norm", "merged_momentum_"} <= set(one.names) and "index_put_" in one.names


def test_micro_batches_and_logged_lines(monkeypatch, tmp_path):
    """Three micro-batches go up in the same vector; a logged line reads once more and uploads nothing."""
    parts = count(monkeypatch, tmp_path, 20, 0.5, micro=3)
    assert parts.uploads == 1 and parts.reads == ["numpy"]
    for margin in (ARCFACE, {"name": "linear"}, {**ARCFACE, "interclass_threshold": 0.2}):
        logged = count(monkeypatch, tmp_path, 20, 0.5, with_angles=True, margin=margin)
        assert logged.uploads == 1 and logged.reads == ["numpy", "numpy"], margin


def test_the_counter_counts(monkeypatch):
    """One of each kind, and nothing twice."""
    counter = Counter(monkeypatch)
    counter.on = True
    x = paddle.to_tensor(np.ones(3, np.float32))
    y = (x * x).sum()
    float(y)
    paddle.linalg.norm(x)
    counter.on = False
    assert counter.names == ["to_tensor", "__mul__", "sum", "__float__", "norm"]
    assert counter.uploads == 1 and counter.reads == ["__float__"]
