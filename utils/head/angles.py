"""Angles of a batch to the class centres: what training looks like while it runs.

Shapes: B batch of a rank, G of all ranks, D embedding size, K local classes looked at.
"""

from dataclasses import dataclass

import numpy as np
import paddle

from utils import distributed

MAX_ANGLE_ROWS = 16384  # classes of a rank that the nearest other class is looked for among


@dataclass(frozen=True)
class AngleStats:
    """Mean angle to the own class and to the nearest other one (degrees), and how often the own one is nearer."""

    theta_own: float
    theta_other: float
    accuracy: float


def angle_stats(embedding_BD: paddle.Tensor, label_B: paddle.Tensor, head) -> AngleStats:
    """Angles of a batch of all ranks to the class centres of ``head``. All ranks call it; nothing changes.

    The own class is exact; the nearest other one is looked for among at most ``MAX_ANGLE_ROWS`` evenly spaced classes
    of each rank.
    """
    start, num_local = head.shard.start, head.shard.num_local
    embedding_GD = _unit(distributed.all_gather_rows(embedding_BD.detach().astype("float32")).numpy())
    label_G = distributed.all_gather_rows(label_B.astype("int64")).numpy() - start
    ids_K = np.arange(0, num_local, -(-num_local // MAX_ANGLE_ROWS))
    cosine_GK = paddle.matmul(
        paddle.to_tensor(embedding_GD), paddle.to_tensor(_unit(head.rows(ids_K))), transpose_y=True
    ).numpy()
    cosine_GK[label_G[:, None] == ids_K[None, :]] = -2.0
    best_2G = np.full((2, len(label_G)), -2.0, np.float32)
    best_2G[1] = cosine_GK.max(axis=1)
    mine = np.flatnonzero((label_G >= 0) & (label_G < num_local))
    if len(mine):
        best_2G[0, mine] = (embedding_GD[mine] * _unit(head.rows(label_G[mine]))).sum(axis=1)
    own_G, other_G = np.clip(distributed.all_reduce_max(paddle.to_tensor(best_2G)).numpy(), -1.0, 1.0)
    degrees = np.degrees(np.arccos([own_G, other_G], dtype=np.float64))
    return AngleStats(float(degrees[0].mean()), float(degrees[1].mean()), float((own_G > other_G).mean()))


def _unit(vector_ND: np.ndarray) -> np.ndarray:
    return vector_ND / np.maximum(np.linalg.norm(vector_ND, axis=1, keepdims=True), 1e-12)
