"""The learning rate as a pure function of the update number: nothing to save, nothing that can drift.

t is the update (0 is the first), w the warm-up length, T the total, all in updates; e = t / updates an epoch.

    warm-up, t < w     base * (t + 1) / w            from the very first update
    poly               base * (1 - (t - w) / (T - w)) ** power, never below min_lr
    cosine             min_lr + (base - min_lr) / 2 * (1 + cos(pi * (t - w) / (T - w)))
    multistep          base * gamma ** (number of milestones <= e)
    step               base * gamma ** (number of milestones with milestone - 1 <= floor(e)): arcface-Paddle's rule
    constant           base
"""

import math
from dataclasses import dataclass

from utils.errors import UserError

NAMES = ("poly", "cosine", "multistep", "step", "constant")


def scaled_lr(lr: float, lr_batch: int | None, global_batch: int) -> float:
    """Linear scaling: ``lr`` is meant for ``lr_batch`` images an update; None takes ``lr`` as it is."""
    return lr if lr_batch is None else lr * global_batch / lr_batch


@dataclass(frozen=True)
class LrSchedule:
    """``schedule(t)`` is the learning rate of update t. Updates beyond T keep the last value."""

    name: str
    base_lr: float
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int = 0
    power: float = 1.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"schedule.name: {self.name!r} is not one of {', '.join(NAMES)}")
        if self.steps_per_epoch < 1 or self.total_steps < 1:
            counts = f"{self.steps_per_epoch} an epoch, {self.total_steps} in all"
            raise UserError(f"a schedule needs at least one update: {counts}")

    def __call__(self, step: float) -> float:
        base, step = self.base_lr, min(max(step, 0), self.total_steps - 1)
        if step < self.warmup_steps:
            return base * (step + 1) / self.warmup_steps
        # The share of the way from the end of the warm-up to the end of training, in [0, 1).
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        match self.name:
            case "poly":
                return max(self.min_lr, base * (1 - done) ** self.power)
            case "cosine":
                return self.min_lr + (base - self.min_lr) / 2 * (1 + math.cos(math.pi * done))
            case "multistep":
                # Compared in updates: milestone * steps_per_epoch is exact where step / steps_per_epoch would round.
                return base * self.gamma ** sum(step >= m * self.steps_per_epoch for m in self.milestones)
            case "step":
                epoch = math.floor(step / self.steps_per_epoch)
                return base * self.gamma ** sum(m - 1 <= epoch for m in self.milestones)
        return base
