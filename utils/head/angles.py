"""Angles of a batch to the class centres: what training looks like while it runs.

Shapes: B batch of a rank, G of all ranks, D embedding size, K local classes looked at.
"""

import math
from dataclasses import dataclass

import numpy as np
import paddle

from utils import distributed
from utils.vectors import scale_to_unit

MAX_ANGLE_ROWS = 16384  # classes of a rank that ``angle_stats`` looks for the nearest other class among


@dataclass(frozen=True)
class AngleStats:
    """Mean angle to the own class and to the nearest other one (degrees), and how often the own one is nearer."""

    theta_own: float
    theta_other: float
    accuracy: float


def log_angles(head, embedding_BD: paddle.Tensor, label_B) -> AngleStats:
    """Angles of the batch that ``head`` saw last. All ranks call it, before ``head.step``; the host waits once.

    The nearest other class is looked for among those that took part in the softmax, which has their cosines already.
    Where it has none (logits that are no cosines, or filtered ones) ``angle_stats`` computes them.
    """
    cosines = head.last_cosines()
    if cosines is None:
        return angle_stats(embedding_BD, label_B, head)
    own_G, other_G = (paddle.clip(each.astype("float64"), -1.0, 1.0) for each in cosines)
    figures = [paddle.acos(own_G).mean(), paddle.acos(other_G).mean(), (own_G > other_G).astype("float64").mean()]
    own, other, accuracy = paddle.stack(figures).numpy().tolist()
    return AngleStats(math.degrees(own), math.degrees(other), accuracy)


def angle_stats(embedding_BD: paddle.Tensor, label_B: paddle.Tensor, head) -> AngleStats:
    """Angles of a batch of all ranks to the class centres of ``head``. All ranks call it; nothing changes.

    The own class is exact; the nearest other one is looked for among at most ``MAX_ANGLE_ROWS`` evenly spaced classes
    of each rank.
    """
    start, num_local = head.shard.start, head.shard.num_local
    embedding_GD = scale_to_unit(distributed.all_gather_rows(embedding_BD.detach().astype("float32")).numpy())
    label_G = distributed.gather_host(np.asarray(label_B)).reshape(-1) - start
    ids_K = np.arange(0, num_local, -(-num_local // MAX_ANGLE_ROWS))
    cosine_GK = paddle.matmul(
        paddle.to_tensor(embedding_GD), paddle.to_tensor(scale_to_unit(head.rows(ids_K))), transpose_y=True
    ).numpy()
    cosine_GK[label_G[:, None] == ids_K[None, :]] = -2.0
    best_2G = np.full((2, len(label_G)), -2.0, np.float32)
    best_2G[1] = cosine_GK.max(axis=1)
    mine = np.flatnonzero((label_G >= 0) & (label_G < num_local))
    if len(mine):
        best_2G[0, mine] = (embedding_GD[mine] * scale_to_unit(head.rows(label_G[mine]))).sum(axis=1)
    own_G, other_G = np.clip(distributed.all_reduce_max(paddle.to_tensor(best_2G)).numpy(), -1.0, 1.0)
    degrees = np.degrees(np.arccos([own_G, other_G], dtype=np.float64))
    return AngleStats(float(degrees[0].mean()), float(degrees[1].mean()), float((own_G > other_G).mean()))
