"""What an update needs to know on the host before it starts: the labels of all ranks and the classes that take part.

Legend: C classes, N local classes, S rows of the update, B samples of this rank, G of all ranks, T of them with their
class on this shard.
"""

from dataclasses import dataclass, replace

import numpy as np
import paddle

from utils.errors import UserError
from utils.head.sampling import sample_classes


@dataclass(frozen=True)
class Targets:
    """Where the classes of one micro-batch's samples lie among the rows of the update, on this shard."""

    label_G: np.ndarray  # global ids, int64
    row_T: np.ndarray  # positions in the rows of the update, ascending
    col_T: np.ndarray  # their samples


@dataclass(frozen=True)
class Draw:
    """The classes of one update and its labels; made on the host alone, while the update before may still run."""

    number: int  # of the update it is for: what it was seeded by
    ids_S: np.ndarray | None  # sorted local ids of the rows; None: all
    num_rows: int  # S
    kept_labels: np.ndarray  # sorted global ids of all ranks' labels
    start: int  # global id of the first local class
    num_local: int  # N
    micro: tuple[Targets, ...]  # of its micro-batches, in order

    def targets(self, label_G: np.ndarray) -> Targets:
        """Of a batch whose labels are all in the draw."""
        local_G = label_G - self.start
        col_T = np.flatnonzero((local_G >= 0) & (local_G < self.num_local))
        row_T = local_G[col_T] if self.ids_S is None else np.searchsorted(self.ids_S, local_G[col_T])
        order = np.argsort(row_T, kind="stable")
        return Targets(label_G, row_T[order], col_T[order])


def draw_classes(shard, micro_labels: list[np.ndarray], *, sample_rate: float, seed: int, number: int, sampled=None):
    """The ``Draw`` of update ``number``, which keeps the positives of all its micro-batches.

    Args:
        shard: ``partial_fc.ClassShard``.
        micro_labels: checked labels [G] of all ranks, one array a micro-batch.
        sampled: global ids to use instead of a random draw (positives are added).
    """
    kept = np.unique(np.concatenate(micro_labels))
    positive_P = kept[(kept >= shard.start) & (kept < shard.stop)]
    ids = None
    if sampled is not None:
        given = checked_labels(sampled, shard.num_classes)
        ids = np.union1d(given[(given >= shard.start) & (given < shard.stop)], positive_P) - shard.start
    elif sample_rate < 1:
        ids = sample_classes(
            positive_P - shard.start, shard.num_local, sample_rate=sample_rate, seed=seed, step=number, rank=shard.rank
        )
    if ids is not None and len(ids) == shard.num_local:
        ids = None
    num_rows = shard.num_local if ids is None else len(ids)
    bare = Draw(number, ids, num_rows, kept, shard.start, shard.num_local, micro=())
    return replace(bare, micro=tuple(bare.targets(label_G) for label_G in micro_labels))


def checked_labels(label, num_classes: int) -> np.ndarray:
    """``host_labels``; UserError if one is no class."""
    label = host_labels(label)
    wrong = label[(label < 0) | (label >= num_classes)]
    if wrong.size:
        raise UserError(f"label: {wrong[0]} must lie in [0, {num_classes})")
    return label


def host_labels(label) -> np.ndarray:
    """Flat int64 ids of integers of any shape, a new array; a tensor on a device is read back, and the host waits."""
    label = label.numpy() if isinstance(label, paddle.Tensor) else np.asarray(label)
    if label.dtype.kind not in "iu":
        raise UserError(f"label: {label.dtype} values are not class ids; integers are needed")
    return label.reshape(-1).astype(np.int64)
