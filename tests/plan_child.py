"""One measured training process for tests/test_plan.py: prints its peak bytes above what it held after the imports.

python -m tests.plan_child CLASSES RATE BATCH BACKBONE ACCUMULATE
"""

import sys

import numpy as np
import paddle
import threadpoolctl  # noqa: F401  (an import of the head, so that it does not count)

from backbones import build_backbone
from losses import build_margin
from partial_fc import PartialFC
from utils.system import peak_bytes, reset_peak


def main() -> None:
    classes, rate, batch, name, accumulate = sys.argv[1:6]
    classes, batch, accumulate = int(classes), int(batch), int(accumulate)
    paddle.set_device("cpu")
    base = reset_peak()
    backbone = build_backbone(name)
    backbone.train()
    optimizer = paddle.optimizer.Momentum(0.01, 0.9, backbone.parameters())
    head = PartialFC(classes, backbone.embedding_size, build_margin("arcface"), float(rate), num_threads=2)
    rng = np.random.default_rng(0)
    for _ in range(3):
        labels = [paddle.to_tensor(rng.integers(0, classes, batch)) for _ in range(accumulate)]
        head.prepare(labels)
        for label in labels:
            image = paddle.to_tensor(rng.standard_normal([batch, 3, 112, 112], dtype=np.float32))
            (head(backbone(image), label) / accumulate).backward()
        optimizer.step()
        optimizer.clear_grad()
        head.step(0.01)
    print("peak", peak_bytes() - base)


if __name__ == "__main__":
    main()
