"""eval/metrics.py against hand-worked cases, a plain loop over thresholds and folds, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

import eval.metrics as metrics_module
from eval.metrics import FARS, accuracy_at, distance_metrics, pair_distances, roc_at, tar_at_far, verification_metrics


def loop_reference(embedding_ND, same_P, num_folds, far_target=1e-3):
    """The protocol as a loop over folds and thresholds, every count taken anew."""
    unit = embedding_ND.astype(np.float64)
    unit = unit / np.sqrt(np.einsum("ij,ij->i", unit, unit))[:, None]
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)

    def counts(threshold, index):
        accepted, actual = distance[index] < threshold, same_P[index]
        return int(np.sum(accepted & actual)), int(np.sum(accepted & ~actual)), int(actual.sum()), int((~actual).sum())

    def accuracy(threshold, index):
        tp, fp, _, different = counts(threshold, index)
        return (tp + different - fp) / len(index)

    accuracies, vals, fars = [], [], []
    for train, test in KFold(num_folds).split(distance):
        grid, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
        best = int(np.argmax([accuracy(t, train) for t in grid]))
        accuracies.append(accuracy(grid[best], test))
        far_train = [fp / different for _, fp, _, different in (counts(t, train) for t in fine)]
        threshold = np.interp(far_target, far_train, fine) if max(far_train) >= far_target else 0.0
        tp, fp, same, different = counts(threshold, test)
        vals.append(tp / same)
        fars.append(fp / different)
    return np.mean(accuracies), np.std(accuracies), np.mean(vals), np.std(vals), np.mean(fars), tuple(accuracies)


def random_pairs(num_pairs, seed, size=8, noise=0.8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    same_P = np.arange(num_pairs) % 2 == 0
    left = rng.normal(size=(num_pairs, size))
    right = np.where(same_P[:, None], left, 0) + noise * rng.normal(size=(num_pairs, size))
    return np.stack([left, right], 1).reshape(-1, size).astype(dtype), same_P


@pytest.mark.parametrize(
    ("num_pairs", "num_folds", "far"), [(60, 10, 1e-3), (63, 10, 0.05), (41, 3, 0.2), (200, 7, 0.013)]
)
def test_bit_equal_to_the_loop_over_thresholds_and_folds(num_pairs, num_folds, far):
    embedding_ND, same_P = random_pairs(num_pairs, seed=num_pairs)
    got = verification_metrics(embedding_ND, same_P, num_folds, far)
    wanted = loop_reference(embedding_ND, same_P, num_folds, far)
    assert (got.accuracy, got.accuracy_std, got.val, got.val_std, got.far, got.fold_accuracy) == wanted
    assert 0.5 < got.accuracy < 1  # the case is neither trivial nor hopeless


def at_angle_distance(distances):
    """Embeddings in the plane whose squared distances are the given ones: |1 - e^{ia}|^2 = 2 - 2 cos a."""
    angle = np.arccos(1 - np.asarray(distances) / 2)
    right = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.stack([np.tile([1.0, 0.0], (len(angle), 1)), right], 1).reshape(-1, 2)


def test_hand_worked_folds():
    # Two folds of three pairs. Fold 1 is judged at the threshold that is best for fold 2 and the other way round.
    distance = [0.205, 0.505, 1.005, 0.105, 0.805, 1.505]
    same = [True, True, False, True, False, False]
    got = verification_metrics(at_angle_distance(distance), np.array(same), num_folds=2)
    # Fold 2 alone is perfect from 0.11 on, fold 1 from 0.51 on (first best thresholds).
    assert got.fold_threshold == pytest.approx((0.11, 0.51))
    assert got.fold_accuracy == (1 / 3, 1.0)
    assert got.accuracy == pytest.approx(2 / 3)
    assert got.accuracy_std == pytest.approx(1 / 3)
    assert got.threshold == pytest.approx(0.51)
    assert got.auc == 1.0
    assert got.eer == 0.0


def test_val_is_reported_and_linear_between_grid_points():
    """The public code drops VAL, and today's scipy refuses its interpolation over repeated FAR values."""
    # The other fold's impostors lie at 1.0005 and 2.0005, so its FAR is 0 up to 1.000, 1/2 from 1.001, 1 from 2.001.
    # FAR 0.25 is half way between grid points 1.000 and 1.001: threshold 1.0005.
    distance = np.array([0.1, 1.0002, 1.0008, 1.9, 0.1, 0.2, 1.0005 - 1e-9, 2.0005])
    same = np.array([True, True, False, False, True, True, False, False])
    got = distance_metrics(distance, same, num_folds=2, far_target=0.25)
    # Fold 1 at 1.0005: both genuine accepted, no impostor. Fold 2 at the threshold of fold 1 (impostors 1.0008, 1.9):
    # also 1.0005, both genuine and the impostor just below it.
    assert got.val == 1.0
    assert got.val_std == 0.0
    assert got.far == pytest.approx(0.25)


def test_strictly_below_the_threshold_is_the_same_person():
    assert accuracy_at(np.array([0.5, 0.5]), np.array([True, False]), 0.5) == 0.5
    assert accuracy_at(np.array([0.5, 0.4]), np.array([False, True]), 0.5) == 1.0


def test_folds_of_one_class_and_sets_of_one_class():
    distance = np.concatenate([np.full(10, 0.3), np.full(10, 1.2005)])
    got = distance_metrics(distance, np.arange(20) < 10, num_folds=10)
    assert got.accuracy == 1.0
    assert got.val == 1.0  # over the five folds that hold genuine pairs
    assert got.far == 0.0
    alone = distance_metrics(np.full(10, 0.3), np.ones(10, bool))
    assert alone.accuracy == 1.0
    assert np.isnan([alone.val, alone.far, alone.auc, alone.eer]).all()


def test_fewer_pairs_than_folds_leave_one_out():
    embedding_ND, same_P = random_pairs(7, seed=3)
    got = verification_metrics(embedding_ND, same_P)
    assert got.num_folds == 7
    assert len(got.fold_accuracy) == 7


def test_auc_and_eer_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        distance, same = np.round(rng.random(200) * 4, 1), rng.random(200) < 0.4
        got = distance_metrics(distance, same, 2)
        assert got.auc == pytest.approx(roc_auc_score(same, -distance), abs=1e-12)
        fpr, tpr, _ = roc_curve(same, -distance, drop_intermediate=False)
        x = np.linspace(0, 1, 2_000_001)
        wanted = x[np.argmin(np.abs(1 - np.interp(x, fpr, tpr) - x))]
        assert got.eer == pytest.approx(wanted, abs=1e-5)


def test_scale_of_embeddings_and_dtype_do_not_matter():
    embedding_ND, same_P = random_pairs(50, seed=1, dtype=np.float64)
    scaled = embedding_ND * np.exp2(np.arange(100) % 5)[:, None]
    np.testing.assert_array_equal(pair_distances(embedding_ND), pair_distances(scaled))
    assert verification_metrics(embedding_ND, same_P) == verification_metrics(scaled, same_P)


def test_bad_embeddings_are_named():
    embedding_ND, same_P = random_pairs(20, seed=1)
    embedding_ND[13, 2] = np.nan
    with pytest.raises(ValueError, match="embedding 13 holds NaN"):
        verification_metrics(embedding_ND, same_P)
    with pytest.raises(ValueError, match="19 labels for 20 pairs"):
        verification_metrics(np.ones((40, 2)), same_P[:19])
    with pytest.raises(ValueError, match=r"shape \(41, 2\)"):
        verification_metrics(np.ones((41, 2)), same_P)
    with pytest.raises(ValueError, match="1 pairs in 10 folds"):
        verification_metrics(np.ones((2, 2)), [True])


def published(same_P, score_P):
    """What published tables do: scikit-learn's curve, highest FAR first, the first least distance in FAR."""
    fpr, tpr, _ = (np.flipud(part) for part in roc_curve(same_P, score_P))
    best = [min(zip(abs(fpr - far), range(len(fpr)), strict=True))[1] for far in FARS]
    return [(tpr[k], fpr[k]) for k in best]


def strictly(same_P, score_P):
    fpr, tpr, threshold = roc_curve(same_P, score_P, drop_intermediate=False)
    return [(tpr[fpr <= far][-1], fpr[fpr <= far][-1], threshold[fpr <= far][-1]) for far in FARS]


@pytest.mark.parametrize("whole_curve_pairs", [10, 1 << 17])
def test_tables_equal_scikit_learn_with_and_without_ties(monkeypatch, whole_curve_pairs):
    monkeypatch.setattr(metrics_module, "_WHOLE_CURVE_PAIRS", whole_curve_pairs)
    rng = np.random.default_rng(whole_curve_pairs)
    for trial in range(60):
        num_pairs = int(rng.integers(10, 3000))
        same_P = rng.random(num_pairs) < rng.choice([0.01, 0.1, 0.5])
        same_P[:2] = [True, False]
        score_P = rng.normal(size=num_pairs) + 2 * same_P
        if trial % 2:
            score_P = np.round(score_P, int(rng.integers(0, 3)))
        rows = tar_at_far(score_P, same_P)
        assert [(row.nearest, row.nearest_far) for row in rows] == published(same_P, score_P)
        assert [(row.strict, row.strict_far, row.threshold) for row in rows] == strictly(same_P, score_P)


def test_collinear_points_make_nearest_and_strict_differ():
    """By hand: of a straight run only its end is left, so the nearest point may lie above the FAR."""
    # Best first: 8 genuine, 9 impostors, 1 genuine, 1 impostor, all scores distinct. Corners: after the first score,
    # after the 8th (fps 0), after the 9th impostor (fps 9), after the genuine (9), after the last (10).
    same = [True] * 8 + [False] * 9 + [True, False]
    score = -np.arange(19.0)
    (row,) = tar_at_far(score, same, [0.6])
    assert (row.nearest, row.nearest_far) == (1.0, 0.9)
    assert (row.strict, row.strict_far) == (8 / 9, 0.6)
    assert row.threshold == -13.0  # the sixth impostor is the last that may pass
    (row,) = tar_at_far(score, same, [0.4])
    assert (row.nearest, row.nearest_far) == (8 / 9, 0.0)
    # Equally far from 0 and 0.9: the tie goes to the higher FAR, and there to the higher TAR.
    (row,) = tar_at_far(score, same, [0.45])
    assert (row.nearest, row.nearest_far) == (1.0, 0.9)


def test_ties_between_genuine_and_impostor_count_for_both():
    rows = tar_at_far([3.0, 3.0, 2.0, 1.0], [True, False, True, False], [0.4, 0.5])
    # Nobody can be accepted without the impostor of the same score.
    assert (rows[0].strict, rows[0].strict_far, rows[0].threshold) == (0.0, 0.0, np.inf)
    assert (rows[1].strict, rows[1].strict_far, rows[1].threshold) == (1.0, 0.5, 2.0)


def test_a_long_straight_run_needs_the_whole_curve(monkeypatch):
    """The part of the curve first taken holds no corner; the answer must still be the one of the whole."""
    monkeypatch.setattr(metrics_module, "_WHOLE_CURVE_PAIRS", 10)
    score = np.concatenate([np.full(5, 2.0), -np.arange(10_000.0), [-20_000.0]])
    same = np.concatenate([np.ones(5, bool), np.zeros(10_000, bool), [True]])
    assert [(row.nearest, row.nearest_far) for row in tar_at_far(score, same)] == published(same, score)


def test_roc_for_drawing_is_strict():
    rng = np.random.default_rng(4)
    same_P = rng.random(4000) < 0.3
    score_P = np.round(rng.normal(size=4000) + 1.5 * same_P, 2)
    far = np.append(np.logspace(-4, 0, 60), [0.25, 1.0])
    wanted = [row.strict for row in tar_at_far(score_P, same_P, far.tolist())]
    np.testing.assert_array_equal(roc_at(score_P, same_P, far), wanted)


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match="score 1 is NaN"):
        tar_at_far([1.0, np.nan, 0.0], [True, False, False])
    with pytest.raises(ValueError, match="0 genuine pairs of 2"):
        tar_at_far([1.0, 2.0], [False, False])
    with pytest.raises(ValueError, match=r"\(2,\) scores for \(3,\) labels"):
        tar_at_far([1.0, 2.0], [False, False, True])
