"""Angles of a batch to the class centres: what training looks like while it runs.

Shapes: G samples of all ranks.
"""

import math
from dataclasses import dataclass

import paddle


@dataclass(frozen=True)
class AngleStats:
    """Mean angle to the own class and to the nearest other one (degrees), and how often the own one is nearer."""

    theta_own: float
    theta_other: float
    accuracy: float


def log_angles(head) -> AngleStats:
    """Angles of the batch that ``head`` saw last. All ranks call it, before ``head.step``; the host waits once.

    The nearest other class is looked for among those that took part in the softmax.
    """
    own_G, other_G = (paddle.clip(each.astype("float64"), -1.0, 1.0) for each in head.last_cosines())
    figures = [paddle.acos(own_G).mean(), paddle.acos(other_G).mean(), (own_G > other_G).astype("float64").mean()]
    own, other, accuracy = paddle.stack(figures).numpy().tolist()
    return AngleStats(math.degrees(own), math.degrees(other), accuracy)
