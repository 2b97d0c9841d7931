"""Train and evaluation mode of layers."""

import contextlib

import paddle


@contextlib.contextmanager
def evaluating(layer: paddle.nn.Layer):
    """``layer`` in evaluation mode and without gradients inside; afterwards each of its parts in the mode it had."""
    training = [part for part in layer.sublayers(include_self=True) if part.training]
    layer.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
