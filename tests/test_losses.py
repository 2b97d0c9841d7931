"""Margins against formulas written out in numpy and central differences, both in float64."""

import math

import numpy as np
import paddle
import pytest

from losses import MARGINS, AdaFace, CombinedMargin, MagFace, SphereFace, build_margin

pytestmark = pytest.mark.oldest

# Paddle 2.6 rounds Python numbers to float32 even beside float64 tensors.
TIGHT = 1e-12 if int(paddle.__version__.split(".")[0]) >= 3 else 1e-6
COS = np.array([-0.97, -0.8, -0.3, 0.0, 0.02, 0.4, 0.77, 0.9, 0.97])
NORM = np.array([5.0, 12.0, 20.0, 23.0, 30.0, 47.0, 60.0, 100.0, 130.0])

# name, parameters, psi(cos, norm) with logit = s * psi: each written from its paper, not from our code.
CASES = {
    "arcface": ({"m": 0.5}, lambda c, n: np.cos(np.arccos(c) + 0.5)),
    "arcface_1.2": ({"m": 1.2}, lambda c, n: np.cos(np.arccos(c) + 1.2)),
    "arcface_easy": ({"m": 1.2, "easy_margin": True}, lambda c, n: np.where(c > 0, np.cos(np.arccos(c) + 1.2), c)),
    "arcface_linear": (
        {"m": 0.5, "beyond_pi": "linear"},
        lambda c, n: np.where(c > np.cos(np.pi - 0.5), np.cos(np.arccos(c) + 0.5), c - np.sin(np.pi - 0.5) * 0.5),
    ),
    "cosface": ({"m": 0.35}, lambda c, n: c - 0.35),
    "combined": ({"m1": 0.9, "m2": 0.4, "m3": 0.15}, lambda c, n: np.cos(0.9 * np.arccos(c) + 0.4) - 0.15),
    "combined_m1": ({"m1": 1.35, "m2": 0.0, "m3": 0.0}, lambda c, n: np.cos(1.35 * np.arccos(c))),
    "combined_trap10": ({"m1": 1.0, "m2": 0.3, "m3": 0.2}, lambda c, n: np.cos(np.arccos(c) + 0.3) - 0.2),
    "softmax": ({}, lambda c, n: c),
    "adaface": (
        {"m": 0.4, "h": 0.333},
        lambda c, n: np.cos(np.arccos(c) - 0.4 * _quality(n)) - 0.4 - 0.4 * _quality(n),
    ),
    "magface": (
        {},
        lambda c, n: np.cos(np.arccos(c) + 0.45 + 0.35 * (np.clip(n, 10, 110) - 10) / 100),
    ),
}


def _quality(norm):
    return np.clip((np.clip(norm, 1e-3, 100) - 20.0) / (100.0 + 1e-3) * 0.333, -1, 1)


def margin_of(case: str, **more):
    return build_margin(case.split("_")[0], **CASES[case][0], **more)


def values(margin, cos, norm):
    target = margin.target(paddle.to_tensor(cos), paddle.to_tensor(norm))
    assert all(part.dtype == paddle.float64 for part in target)
    return [part.numpy() for part in target]


@pytest.mark.parametrize("case", CASES)
def test_logit_is_the_papers(case):
    """(1.0, 0.3, 0.2) is the true combination, neither of its margins is dropped."""
    logit, _, _ = values(margin_of(case, s=64.0), COS, NORM)
    np.testing.assert_allclose(logit, 64 * CASES[case][1](COS, NORM), rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("case", CASES)
def test_derivatives_by_central_differences(case):
    """The default gradient differentiates the margin. 0 and the kinks of piecewise forms are left out."""
    formula, h = CASES[case][1], 1e-6
    cos, norm = COS[COS != 0], NORM[COS != 0]
    _, d_cos, d_norm = values(margin_of(case, s=30.0), cos, norm)
    slope = 30 * (formula(cos + h, norm) - formula(cos - h, norm)) / (2 * h)
    np.testing.assert_allclose(d_cos, slope, rtol=1e-6, atol=1e-6)
    if case == "adaface":  # by definition no gradient flows through its norm
        np.testing.assert_array_equal(d_norm, 0.0)
    else:
        slope = 30 * (formula(cos, norm + h) - formula(cos, norm - h)) / (2 * h)
        np.testing.assert_allclose(d_norm, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_straight_through_shifts_only_the_logit(case):
    """arcface_torch's gradient is that of the plain scaled cosine at the shifted logit."""
    exact = values(margin_of(case, s=64.0), COS, NORM)
    through = values(margin_of(case, s=64.0, gradient="straight_through"), COS, NORM)
    np.testing.assert_array_equal(through[0], exact[0])
    np.testing.assert_array_equal(through[1], 64.0)
    np.testing.assert_array_equal(through[2], 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MARGINS)
def test_finite_at_the_ends(name, dtype):
    """cos = +-1, beyond it by rounding, and a norm of 0 give finite logits and derivatives."""
    cos = np.array([-1.0, -1.0000001, 1.0, 1.0000001, 1 - 1e-7, 0.3], dtype)
    norm = np.array([1.0, 20.0, 1.0, 200.0, 1.0, 0.0], dtype)
    for part in build_margin(name).target(paddle.to_tensor(cos), paddle.to_tensor(norm)):
        assert np.isfinite(part.numpy()).all() and str(part.dtype).endswith(dtype)


def test_beyond_pi_as_documented():
    """theta + m > pi: cos(theta + m) by default (it rises again), or the line cos - m sin(m)."""
    theta = np.array([np.pi - 0.1, np.pi - 0.49, np.pi - 0.51])
    logit, slope, _ = values(build_margin("arcface", s=1.0), np.cos(theta), np.ones(3))
    np.testing.assert_allclose(logit, np.cos(theta + 0.5), rtol=1e3 * TIGHT)
    assert slope[0] < 0 and slope[1] < 0 < slope[2]
    logit, slope, _ = values(build_margin("arcface", s=1.0, beyond_pi="linear"), np.cos(theta), np.ones(3))
    np.testing.assert_allclose(logit[:2], np.cos(theta[:2]) - 0.5 * np.sin(0.5), rtol=1e3 * TIGHT)
    np.testing.assert_array_equal(slope[:2], 1.0)


@pytest.mark.parametrize("m", [2, 3, 4, 1.35])
def test_sphereface_with_annealing(m):
    """A-Softmax with the norm inside; psi by the angle's piece, lambda by the fork's schedule; FD in cos and norm."""

    def logit_of(q, n):
        theta = np.arccos(q / n)
        k = np.floor(m * theta / np.pi)
        psi = (-1) ** k * np.cos(m * theta) - 2 * k
        return n * (blend * q / n + psi) / (1 + blend)

    margin = SphereFace(m=m)
    for iteration in (0, 3, 100_000):
        margin.load_state({"iteration": iteration})
        blend = max(5.0, 1000.0 / (1 + 0.12 * iteration))
        theta = np.linspace(0.07, 3.1, 23)
        norm = np.linspace(0.5, 9, 23)
        q, h = norm * np.cos(theta), 1e-6
        logit, d_q, d_n = values(margin, q, norm)
        np.testing.assert_allclose(logit, logit_of(q, norm), rtol=1e-10)
        np.testing.assert_allclose(d_q, (logit_of(q + h, norm) - logit_of(q - h, norm)) / 2 / h, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(d_n, (logit_of(q, norm + h) - logit_of(q, norm - h)) / 2 / h, rtol=1e-5, atol=1e-6)
    plain = SphereFace(m=4, s=30.0, lambda_base=0, lambda_min=0)
    assert plain.normalize_embedding and plain.blend == 0
    logit, _, _ = values(plain, np.cos(np.array([0.3, 1.0])), np.ones(2))
    np.testing.assert_allclose(logit, [30 * np.cos(1.2), 30 * (-np.cos(4.0) - 2)], rtol=1e-12)  # k = 0 and 1 by hand


def test_magface_regulariser():
    margin, h = MagFace(lambda_g=35.0), 1e-5
    norm = np.array([9.0, 10.5, 40.0, 109.0, 150.0])

    def by_hand(n):
        n = np.clip(n, 10, 110)
        return 35.0 * (n / 110**2 + 1 / n)

    loss, slope = (part.numpy() for part in margin.extra(paddle.to_tensor(norm)))
    np.testing.assert_allclose(loss, by_hand(norm), rtol=1e-12)
    np.testing.assert_allclose(slope, (by_hand(norm + h) - by_hand(norm - h)) / (2 * h), rtol=1e-5, atol=1e-9)
    assert build_margin("arcface").extra(paddle.to_tensor(norm)) is None


def test_adaface_statistics():
    """Running mean and (unbiased) deviation by hand; one sample leaves std, a broken batch leaves both."""
    margin = AdaFace(t_alpha=0.25)
    margin.observe(paddle.to_tensor(np.array([10.0, 20.0, 400.0])))  # 400 counts as 100
    mean, std = 0.75 * 20 + 0.25 * 130 / 3, 0.75 * 100 + 0.25 * np.std([10, 20, 100], ddof=1)
    assert margin.state() == pytest.approx({"mean": mean, "std": std})
    margin.observe(paddle.to_tensor(np.array([30.0])))
    assert margin.state() == pytest.approx({"mean": 0.75 * mean + 0.25 * 30, "std": std})
    before = margin.state()
    margin.observe(paddle.to_tensor(np.array([np.nan, 3.0])))
    assert margin.state() == before
    fresh = AdaFace()
    fresh.load_state(before)
    assert fresh.state() == before


def test_adaface_angle_stays_inside():
    """A good image near theta = 0 cannot pass below 1e-3: constant there, so no slope."""
    margin = AdaFace()
    margin.load_state({"mean": 20.0, "std": 1.0})  # norm 100: k = 1
    logit, slope, _ = values(margin, np.array([math.cos(0.2), math.cos(1.0)]), np.array([100.0, 100.0]))
    np.testing.assert_allclose(logit, 64 * (np.cos([1e-3, 0.6]) - 0.8), rtol=1e-12)
    np.testing.assert_allclose(slope, [0.0, 64 * math.sin(0.6) / math.sin(1.0)], rtol=1e-12)


def test_interclass_filtering():
    margin = build_margin("arcface", interclass_threshold=0.4)
    q = np.array([[-0.9, 0.4, 0.41], [0.0, 0.39, 1.0]])
    for given in (q, paddle.to_tensor(q)):
        kept, mask = (np.asarray(part) for part in margin.others(given))
        np.testing.assert_array_equal(kept, [[-0.9, 0.4, 0], [0, 0.39, 0]])
        np.testing.assert_array_equal(mask, [[1, 1, 0], [1, 1, 0]])
    assert margin.changes_others and not build_margin("arcface").changes_others


@pytest.mark.parametrize("over", ["batch", "sample"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal(over, gamma):
    """(1 - p)^gamma L with p = exp(-L), L the batch mean (ronghuaiyang) or each sample's; slope by differences."""

    def by_hand(ce):
        level = ce.mean() if over == "batch" else ce
        return np.mean((1 - np.exp(-level)) ** gamma * level)

    margin = build_margin("softmax", focal_gamma=gamma, focal_over=over)
    ce, h = np.array([0.03, 0.7, 2.0, 30.0]), 1e-6
    loss, slope = margin.reduce(paddle.to_tensor(ce))
    assert loss.ndim == 0 and loss.item() == pytest.approx(by_hand(ce), rel=1e-12)
    numeric = [(by_hand(ce + h * e) - by_hand(ce - h * e)) / (2 * h) for e in np.eye(4)]
    np.testing.assert_allclose(slope.numpy(), numeric, rtol=1e-6)
    loss, slope = margin.reduce(paddle.to_tensor(np.zeros(2)))
    assert np.isfinite(slope.numpy()).all() and loss.item() == 0


def test_linear_logits():
    margin = build_margin("linear")
    assert not margin.normalize_weight and not margin.normalize_embedding and margin.scale == 1
    logit, d_q, d_norm = values(margin, np.array([-130.0, 7.0]), np.array([1.0, 2.0]))
    assert logit.tolist() == [-130.0, 7.0] and d_q.tolist() == [1, 1] and d_norm.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("arcfase", {}, "'arcfase' is not one of"),
        ("arcface", {"margin": 0.5}, "arcface"),
        ("arcface", {"s": 0}, "s: 0"),
        ("arcface", {"m": 4.0}, "4.0"),
        ("arcface", {"gradient": "torch"}, "'torch'"),
        ("arcface", {"interclass_threshold": 1.5}, "1.5"),
        ("arcface", {"focal_gamma": -1}, "-1"),
        ("arcface", {"beyond_pi": "up"}, "'up'"),
        ("combined", {"m1": 0}, "m1: 0"),
        ("combined", {"m1": 2.0, "beyond_pi": "linear"}, "linear"),
        ("sphereface", {"m": 0.5}, "0.5"),
        ("sphereface", {"interclass_threshold": 0.4}, "interclass_threshold"),
        ("linear", {"interclass_threshold": 0.4}, "linear"),
        ("magface", {"l_a": 200}, "200"),
        ("adaface", {"m": 3.0}, "3.0"),
    ],
)
def test_bad_parameters_are_named(name, params, words):
    with pytest.raises(ValueError, match=words):
        build_margin(name, **params)


def test_defaults_are_the_papers():
    margin = CombinedMargin()
    assert (margin.scale, margin.m1, margin.m2, margin.m3, margin.gradient) == (64.0, 1.0, 0.5, 0.0, "exact")
    assert build_margin("cosface").m3 == 0.4 and build_margin("adaface").m == 0.4
