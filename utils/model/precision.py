"""Reduced precision of the backbone, and the decision to skip an update.

Paddle switches ``auto_cast`` and its ``GradScaler`` off on CPU with a warning, and its scaler decides on each rank for
itself, so that ranks would part. Here reduced precision on CPU is an error, and ``LossScaler`` takes one decision of
all ranks.
"""

import contextlib
import math

import paddle

from utils.errors import UserError
from utils.system import BF16_CAPABILITY

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def check_precision(precision: str, device: str, capability: tuple[int, int] | None = None) -> None:
    """UserError if this precision cannot be had on this device (``capability``: of a GPU)."""
    if precision == "fp32":
        return
    found, remedy = None, "fp32" if precision == "fp16" else "fp16"
    if device == "cpu":
        found, remedy = "cpu, where Paddle silently computes in fp32", "fp32 or run on a GPU (run.device=gpu)"
    elif precision == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        card = f"a GPU of compute capability {capability[0]}.{capability[1]}"
        found = f"{card}, where Paddle computes in fp32 with a warning"
    elif not device.startswith("gpu"):  # plug-ins: only trying tells
        with autocast(precision):
            product = paddle.matmul(paddle.ones([2, 2]), paddle.ones([2, 2]))
        if not str(product.dtype).endswith(DTYPES[precision]):
            found = f"{device}, where Paddle computes in fp32"
    if found is not None:
        raise UserError(f"run.precision: {precision} asked for on {found}; set run.precision={remedy}")


def autocast(precision: str) -> contextlib.AbstractContextManager:
    """Context in which the backbone's forward runs (O1: matrix products and convolutions reduced, weights float32).

    PReLU is reduced too: it only scales and its kernels exist; in float32 it would double the traffic of the largest
    activations. Its slopes stay float32 parameters with float32 gradients.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return paddle.amp.auto_cast(enable=True, dtype=DTYPES[precision], level="O1", custom_white_list={"prelu"})


class LossScaler:
    """Dynamic loss scale for fp16, and the count of skipped updates for every precision.

    A skipped update halves the scale; ``growth_interval`` good ones in a row double it. For fp32 and bf16 the scale is
    1 and stays.
    """

    def __init__(self, precision: str, scale: float = 65536.0, max_skips: int = 50, growth_interval: int = 2000):
        self.dynamic = precision == "fp16"
        self.precision = precision
        self.scale = scale if self.dynamic else 1.0
        self.max_skips, self.growth_interval = max_skips, growth_interval
        self.good_steps = self.skips_in_row = self.skips = 0

    def update(self, skipped: bool) -> None:
        """Take note of an update. All ranks must pass the same decision.

        Raises:
            UserError: ``max_skips`` updates in a row were skipped.
        """
        if not skipped:
            self.skips_in_row = 0
            self.good_steps += 1
            if self.dynamic and self.good_steps >= self.growth_interval:
                self.scale, self.good_steps = min(self.scale * 2, 2.0**32), 0
            return
        self.skips += 1
        self.skips_in_row += 1
        self.good_steps = 0
        if self.dynamic:
            self.scale = max(self.scale / 2, math.ldexp(1.0, -20))
        if self.skips_in_row >= self.max_skips:
            advice = "use run.precision=bf16, " if self.dynamic else ""
            raise UserError(
                f"{self.skips_in_row} updates in a row had non-finite gradients (run.precision={self.precision}, "
                f"loss scale {self.scale:g}); {advice}lower optim.lr, lengthen schedule.warmup_epochs or look at "
                "the records named in train.log"
            )

    def state(self) -> dict:
        """JSON-able."""
        return {name: getattr(self, name) for name in ("scale", "good_steps", "skips_in_row", "skips")}

    def load_state(self, state: dict) -> None:
        """Restore ``state``; the scale only if this run scales too."""
        for name in self.state():
            if name != "scale" or self.dynamic:
                setattr(self, name, state[name])
