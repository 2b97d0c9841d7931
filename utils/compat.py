"""Differences between Paddle 2.6 and 3.x, all of them in this file."""

import paddle


def paddle_version() -> tuple[int, int]:
    """(major, minor) of the installed Paddle, e.g. (3, 3)."""
    major, minor = paddle.__version__.split(".")[:2]
    return int(major), int(minor)
