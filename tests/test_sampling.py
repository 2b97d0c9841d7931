"""The draw of classes: what is kept, how many, and that negatives are uniform."""

import numpy as np
import pytest

from utils.head.sampling import sample_classes

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.37, 0.5, 0.51, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("num_classes", [1, 2, 7, 1000])
@pytest.mark.parametrize("num_positive", [0, 1, 60])
def test_quota_positives_order(rate, num_classes, num_positive):
    """Sampling happens; more positives than the quota are all kept; none is fine."""
    rng = np.random.default_rng(num_positive)
    positive = rng.integers(0, num_classes, num_positive)
    before = positive.copy()
    ids = sample_classes(positive, num_classes, rate, seed=3, step=5, rank=1)
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all()
    assert len(ids) == max(int(rate * num_classes), len(np.unique(positive)))
    assert np.isin(positive, ids).all() and ((ids >= 0) & (ids < num_classes)).all()
    np.testing.assert_array_equal(positive, before)


def test_reproducible_from_seed_step_rank():
    args = (np.array([4, 5]), 10_000, 0.1)
    first = sample_classes(*args, seed=1, step=2, rank=3)
    np.testing.assert_array_equal(first, sample_classes(*args, seed=1, step=2, rank=3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        # About a tenth of two independent draws agrees: 100 of 1000, standard deviation 9.
        common = np.intersect1d(first, sample_classes(*args, *other)).size
        assert 50 < common < 150


@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_negatives_are_uniform(rate):
    """Every negative equally often (chi-square), pairs as often as in a draw without replacement."""
    num, draws = 40, 4000
    positive = np.array([0, 7, 8, 39])
    counts, pairs = np.zeros(num), 0
    for step in range(draws):
        ids = sample_classes(positive, num, rate, seed=0, step=step, rank=0)
        counts[ids] += 1
        pairs += np.isin([1, 38], ids).all()
    np.testing.assert_array_equal(counts[positive], draws)
    negatives = np.delete(counts, positive)
    kept, pool = int(rate * num) - 4, num - 4
    expected = draws * kept / pool
    chi2 = ((negatives - expected) ** 2 / (expected * (1 - kept / pool))).sum() * (pool - 1) / pool
    assert chi2 < 72  # 35 degrees of freedom: exceeded by chance once in 4,000 runs
    p_pair = kept * (kept - 1) / (pool * (pool - 1))
    assert abs(pairs - draws * p_pair) < 4 * np.sqrt(draws * p_pair * (1 - p_pair))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"1\.5"):
        sample_classes(np.array([0]), 10, 1.5, 0, 0, 0)
    with pytest.raises(ValueError, match="10"):
        sample_classes(np.array([10]), 10, 0.5, 0, 0, 0)
