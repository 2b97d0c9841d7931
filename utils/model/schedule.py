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
        if self.name not in _SHAPES:
            raise UserError(f"schedule.name: {self.name!r} is not one of {', '.join(_SHAPES)}")
        if self.steps_per_epoch < 1 or self.total_steps < 1:
            raise UserError(
                f"a schedule needs at least one update: {self.steps_per_epoch} an epoch, {self.total_steps} in all"
            )

    def __call__(self, step: float) -> float:
        step = min(max(step, 0), self.total_steps - 1)
        if step < self.warmup_steps:
            return self.base_lr * (step + 1) / self.warmup_steps
        return _SHAPES[self.name](self, step)

    def _done(self, step: float) -> float:
        """Share of the way from the end of the warm-up to the end of training, in [0, 1)."""
        return (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)

    def _poly(self, step: float) -> float:
        return max(self.min_lr, self.base_lr * (1 - self._done(step)) ** self.power)

    def _cosine(self, step: float) -> float:
        return self.min_lr + (self.base_lr - self.min_lr) / 2 * (1 + math.cos(math.pi * self._done(step)))

    def _multistep(self, step: float) -> float:
        # Compared in updates: milestone * steps_per_epoch is exact where step / steps_per_epoch would round.
        return self.base_lr * self.gamma ** sum(step >= m * self.steps_per_epoch for m in self.milestones)

    def _step(self, step: float) -> float:
        epoch = math.floor(step / self.steps_per_epoch)
        return self.base_lr * self.gamma ** sum(m - 1 <= epoch for m in self.milestones)

    def _constant(self, step: float) -> float:
        return self.base_lr


_SHAPES = {
    "poly": LrSchedule._poly,
    "cosine": LrSchedule._cosine,
    "multistep": LrSchedule._multistep,
    "step": LrSchedule._step,
    "constant": LrSchedule._constant,
}
