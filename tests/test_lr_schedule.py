"""Learning rates against hand-worked values and PyTorch's own schedulers."""

import math

import pytest

from utils.model.schedule import LrSchedule, scaled_lr


def curve(schedule, count):
    return [schedule(step) for step in range(count)]


def test_warmup_starts_with_the_first_update():
    """The first update is warmed up too, and the base rate is reached exactly."""
    schedule = LrSchedule("poly", 0.1, 10, 100, warmup_steps=4)
    assert curve(schedule, 5) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_poly_by_hand():
    schedule = LrSchedule("poly", 1.0, 5, 10, warmup_steps=2, power=2.0)
    expected = [0.5, 1.0] + [(1 - k / 8) ** 2 for k in range(8)]
    assert curve(schedule, 10) == pytest.approx(expected)
    assert schedule(10) == schedule(9) > 0, "beyond the end the last value stays"


def test_cosine_equals_torch():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert curve(LrSchedule("cosine", 0.3, 10, 50, min_lr=0.01), 50) == pytest.approx(expected, rel=1e-9)


def test_multistep_equals_torch_by_epoch():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.1)
    schedule = LrSchedule("multistep", 0.1, 7, 49, milestones=(3, 5))
    for epoch in range(7):
        assert [schedule(epoch * 7 + k) for k in range(7)] == pytest.approx([optimizer.param_groups[0]["lr"]] * 7)
        optimizer.step()
        reference.step()


def test_step_is_arcface_paddles_formula():
    """lr * 0.1 ** len([m for m in [8, 14] if m - 1 <= epoch]), by epoch."""
    schedule = LrSchedule("step", 0.1, 3, 48, milestones=(8, 14))
    for epoch in range(16):
        expected = 0.1 * 0.1 ** len([m for m in (8, 14) if m - 1 <= epoch])
        assert curve(schedule, 48)[epoch * 3 : epoch * 3 + 3] == pytest.approx([expected] * 3)


def test_fractional_milestones_fall_on_updates():
    schedule = LrSchedule("multistep", 1.0, 10, 30, milestones=(0.5,), gamma=0.5)
    assert (schedule(4), schedule(5)) == (1.0, 0.5)


def test_linear_scaling():
    assert scaled_lr(0.1, 512, 1024) == pytest.approx(0.2)
    assert scaled_lr(0.1, None, 1024) == 0.1


def test_no_updates_and_unknown_names_are_errors():
    with pytest.raises(ValueError, match="at least one update"):
        LrSchedule("poly", 0.1, 0, 0)
    with pytest.raises(ValueError, match="'polly'"):
        LrSchedule("polly", 0.1, 1, 1)


@pytest.mark.parametrize("name", ["poly", "cosine", "multistep", "step", "constant"])
def test_never_negative_never_nan(name):
    schedule = LrSchedule(name, 0.1, 3, 30, warmup_steps=5, milestones=(2, 4))
    assert all(math.isfinite(value) and 0 <= value <= 0.1 + 1e-12 for value in curve(schedule, 40))
