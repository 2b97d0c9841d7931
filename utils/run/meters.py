"""Cadence, rates between two log lines, loss spikes."""

import contextlib
import math
import time

import numpy as np


def due(step: int, every: int) -> bool:
    """Whether something done every so many updates is to be done after update ``step`` (counted from 1)."""
    return every > 0 and step % every == 0


class Meter:
    """Rates and means between two log lines."""

    def __init__(self):
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

    def __init__(self, threshold: float, warm: int = 20):
        self.threshold, self.warm = threshold, warm
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def observe(self, loss: float) -> bool:
        """Whether this loss is a spike; spikes and non-finite losses do not move the running values."""
        if not math.isfinite(loss):
            return False
        excess = loss - self.mean
        if self.count >= self.warm and excess > self.threshold * math.sqrt(self.variance) and excess > self.mean / 2:
            return True
        weight = max(0.02, 1 / (self.count + 1))
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
