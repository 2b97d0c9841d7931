"""Differences between Paddle 2.6 and 3.x, all of them in this file."""

import numpy as np
import paddle


def paddle_version() -> tuple[int, int]:
    """(major, minor) of the installed Paddle, e.g. (3, 3)."""
    major, minor = paddle.__version__.split(".")[:2]
    return int(major), int(minor)


def share_numpy(array: np.ndarray) -> paddle.Tensor:
    """A CPU tensor on the array's own memory (DLPack); it keeps the array alive. Paddle 2.6 takes capsules only."""
    from paddle.utils import dlpack

    return dlpack.from_dlpack(array.__dlpack__())
