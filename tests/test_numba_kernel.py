"""utils/head/numba_kernel.py by itself; tests/test_partial_fc.py holds it equal to the other kernels."""

import numpy as np
import paddle
import pytest

pytest.importorskip("numba")

from losses import build_margin
from partial_fc import PartialFC
from utils.head import numba_kernel
from utils.head.numba_kernel import NumbaKernel, NumbaPass


def exponentials(z_RG, inv_R1, targets=(), top_G=None):
    """(terms, sums, shift) of the fused pass; the arguments are left alone."""
    z_RG, num_samples = z_RG.copy(), z_RG.shape[1]
    row_t, col_t = (np.array([pair[axis] for pair in targets], np.int64) for axis in (0, 1))
    shift_G = np.full(num_samples, -1e30, np.float32) if top_G is None else top_G.copy()
    sum_G, bits_G = np.zeros(num_samples, np.float32), np.empty(num_samples, np.int32)
    numba_kernel._exponentials(z_RG, inv_R1, row_t, col_t, shift_G, sum_G, bits_G)
    return z_RG, sum_G, shift_G


def test_exponentials_against_float64():
    """From the maximum down to where a float32 is none, targets left out, rows of different length."""
    rng = np.random.default_rng(0)
    z_RG = np.concatenate([np.linspace(-120, 0, 4001), rng.uniform(-20, 9, 999)]).astype(np.float32).reshape(1000, 5)
    inv_R1 = rng.uniform(0.25, 1, (1000, 1)).astype(np.float32)
    targets = [(3, 0), (3, 2), (700, 4)]
    found, sum_G, shift_G = exponentials(z_RG, inv_R1, targets)
    scaled = z_RG * inv_R1
    for at in targets:
        scaled[at] = -np.inf
    np.testing.assert_array_equal(shift_G, scaled.max(0))
    expected = np.exp((scaled - shift_G).astype(np.float64))
    normal = expected > 2 * np.finfo(np.float32).tiny
    np.testing.assert_allclose(found[normal], (expected * inv_R1)[normal], rtol=3e-7)
    assert (found[~normal] <= 4 * np.finfo(np.float32).tiny).all() and all(found[at] == 0 for at in targets)
    np.testing.assert_allclose(sum_G, expected.sum(0), rtol=1e-5)
    raised = shift_G + 1
    np.testing.assert_array_equal(exponentials(z_RG, inv_R1, targets, raised)[2], raised)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays(value):
    """Found by whoever looks at sums and gradients, as in numpy: inf - inf is NaN."""
    z_RG = np.zeros((4, 3), np.float32)
    z_RG[1, 2] = value
    found, sum_G, _ = exponentials(z_RG, np.ones((4, 1), np.float32))
    assert np.isnan(found[1, 2]) and np.isnan(sum_G[2])
    assert np.isfinite(found[:, :2]).all() and np.isfinite(sum_G[:2]).all()


@pytest.mark.parametrize(
    ("margin", "options", "covered"),
    [
        ({}, {}, True),
        ({}, {"update": "sampled"}, True),
        ({}, {"optimizer": "adamw"}, False),
        ({}, {"dtype": "float64"}, False),
        ({"interclass_threshold": 0.1}, {}, False),
    ],
    ids=["default", "sampled", "adamw", "float64", "interclass"],
)
def test_auto_takes_it_for_many_classes_and_it_leaves_the_rest_to_numpy(margin, options, covered, monkeypatch):
    monkeypatch.setattr("utils.head.kernel.NUMBA_CLASSES", 20)
    assert not isinstance(PartialFC(19, 8, build_margin("arcface"))._kernel, NumbaKernel)
    head = PartialFC(20, 8, build_margin("arcface", **margin), 0.5, **options)
    assert isinstance(head._kernel, NumbaKernel)
    used, real = [], head._kernel.begin
    head._kernel.begin = lambda **given: used.append(real(**given)) or used[-1]
    dtype = options.get("dtype", "float32")
    head(paddle.ones([3, 8], dtype), paddle.to_tensor([1, 2, 2])).item()
    assert [isinstance(each, NumbaPass) for each in used] == [covered]
