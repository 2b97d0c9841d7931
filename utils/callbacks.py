"""What happens on a cadence: flags of all ranks, meters, spikes, angles, signals.

Shapes: B batch of a rank, G of all ranks, D embedding size, K local classes looked at.
"""

import contextlib
import math
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import paddle

from utils import distributed

MAX_ANGLE_ROWS = 16384  # classes of a rank that the nearest other class is looked for among


def due(step: int, every: int) -> bool:
    """Whether something done every so many updates is to be done after update ``step`` (counted from 1)."""
    return every > 0 and step % every == 0


def agree(*flags: bool) -> tuple[bool, ...]:
    """Each flag is true on every rank if it is on one; one collective for all of them. All ranks call it."""
    if distributed.get_world_size() == 1:
        return tuple(bool(flag) for flag in flags)
    reduced = distributed.all_reduce_max(paddle.to_tensor([int(bool(flag)) for flag in flags], dtype="int32"))
    return tuple(bool(value) for value in reduced.tolist())


class StopSignal:
    """SIGTERM and SIGINT ask the run to save and end after the update at hand; as a context manager it puts back."""

    def __init__(self):
        self.received: str | None = None  # by this rank
        self.agreed = False  # by all ranks, see fetch
        self._before = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        # Paddle's launcher sends SIGTERM several times; every one means the same.
        self.received = signal.Signals(number).name


class Meter:
    """Rates and means between two log lines."""

    def __init__(self):
        self.start = time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Begin a new span."""
        self._since, self._images, self._waited, self._paused = time.monotonic(), 0, 0.0, 0.0
        self._losses: list[float] = []

    def add(self, num_images: int, waited: float, loss: float) -> None:
        """One update: images of all ranks, seconds waited for data, loss."""
        self._images += num_images
        self._waited += waited
        if math.isfinite(loss):
            self._losses.append(loss)

    @contextlib.contextmanager
    def paused(self):
        """Time that is no training (verification, the copy for a save)."""
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def read(self) -> tuple[float, float, float]:
        """(images a second, share of waiting, mean loss) since ``reset``."""
        span = max(1e-9, time.monotonic() - self._since - self._paused)
        return self._images / span, self._waited / span, float(np.mean(self._losses)) if self._losses else math.nan


class SpikeDetector:
    """A loss far above its running mean: by ``threshold`` running standard deviations and by half the mean.

    The first ``warm`` losses only teach it.
    """

    def __init__(self, threshold: float, warm: int = 20, decay: float = 0.98):
        self.threshold, self.warm, self.decay = threshold, warm, decay
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def observe(self, loss: float) -> bool:
        """Whether this loss is a spike; spikes and non-finite losses do not move the running values."""
        if not math.isfinite(loss):
            return False
        excess = loss - self.mean
        if self.count >= self.warm and excess > self.threshold * math.sqrt(self.variance) and excess > self.mean / 2:
            return True
        weight = max(1 - self.decay, 1 / (self.count + 1))
        self.mean += weight * excess
        self.variance = (1 - weight) * (self.variance + weight * excess**2)
        self.count += 1
        return False

    def state(self) -> dict:
        """JSON-able."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load_state(self, state: dict) -> None:
        """Restore ``state``."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]


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


def peak_memory_mb() -> float:
    """Peak of this process: allocated on the GPU, resident on CPU."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
