"""eval/templates.py against hand-worked templates and plain loops."""

import numpy as np
import pytest

import eval.templates as templates_module
from eval.templates import pool_templates, score_pairs


def loop_pool(feature_ND, template_N, media_N):
    ids, rows = np.unique(template_N), []
    for template in ids:
        index = np.flatnonzero(template_N == template)
        means = [feature_ND[index[media_N[index] == m]].astype(np.float64).mean(0) for m in np.unique(media_N[index])]
        total = np.sum(means, axis=0)
        rows.append(total / np.sqrt(total @ total))
    return ids, np.array(rows)


def test_hand_worked_with_shared_media_sparse_ids_and_shuffled_rows():
    # Template 187955: media 5 has (2, 0) and (0, 2), mean (1, 1); media 9 has (3, 0). Sum (4, 1).
    # Template 12: media 5 again, (0, 7), another medium there; media 1 has (3, 0), (5, 0), mean (4, 0). Sum (4, 7).
    feature = np.array([[3, 0], [2, 0], [0, 7], [5, 0], [0, 2], [3, 0]], np.float32)
    template = np.array([187955, 187955, 12, 12, 187955, 12])
    media = np.array([9, 5, 5, 1, 5, 1])
    ids, pooled = pool_templates(feature, template, media)
    assert ids.tolist() == [12, 187955]
    np.testing.assert_allclose(pooled, [np.array([4, 7]) / 65**0.5, np.array([4, 1]) / 17**0.5], rtol=1e-15)
    score = score_pairs(ids, pooled, np.array([12, 187955]), np.array([187955, 187955]))
    np.testing.assert_allclose(score, [23 / (65 * 17) ** 0.5, 1.0], rtol=1e-15)


@pytest.mark.parametrize("rows_per_block", [1, 7, 1024])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_to_the_loop_whatever_the_block(monkeypatch, rows_per_block, dtype):
    monkeypatch.setattr(templates_module, "_ROWS_PER_BLOCK", rows_per_block)
    rng = np.random.default_rng(rows_per_block)
    for ids in ([3, 99, 187955, 5], [8], rng.integers(-50, 10**15, 40)):  # the last: too large for one combined key
        template, media = rng.choice(ids, 300), rng.choice([0, 4, -3, 2**61 if len(ids) > 4 else 9], 300)
        feature = rng.normal(size=(300, 9)).astype(dtype)
        got_ids, got = pool_templates(feature, template, media)
        wanted_ids, wanted = loop_pool(feature, template, media)
        np.testing.assert_array_equal(got_ids, wanted_ids)
        np.testing.assert_allclose(got, wanted, atol=1e-15)


def test_order_of_rows_does_not_matter_and_nothing_is_changed(tmp_path):
    rng = np.random.default_rng(0)
    feature, template, media = rng.normal(size=(500, 16)), rng.integers(0, 40, 500), rng.integers(0, 4, 500)
    np.save(tmp_path / "f.npy", feature)
    ids, pooled = pool_templates(np.load(tmp_path / "f.npy", mmap_mode="r"), template, media)
    order = rng.permutation(500)
    before = feature[order].copy()
    again_ids, again = pool_templates(before, template[order], media[order])
    np.testing.assert_array_equal(ids, again_ids)
    np.testing.assert_allclose(pooled, again, atol=1e-15)
    np.testing.assert_array_equal(before, feature[order])


def test_transform_sees_rows_and_their_indices():
    stored = np.arange(24.0).reshape(6, 2, 2)
    weight = np.array([1, 2, 3, 4, 5, 6.0])
    template, media = np.array([1, 1, 2, 2, 1, 2]), np.array([0, 0, 0, 1, 1, 1])
    got = pool_templates(stored, template, media, lambda rows, index: rows.sum(1) * weight[index][:, None])
    wanted = loop_pool(stored.sum(1) * weight[:, None], template, media)
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-15)


def test_lists_and_ids_of_text():
    ids, pooled = pool_templates([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], ["b", "a", "b"], ["x", "x", "y"])
    assert ids.tolist() == ["a", "b"]
    np.testing.assert_allclose(pooled, [[0, 1], [0.5**0.5, 0.5**0.5]], rtol=1e-15)
    np.testing.assert_allclose(score_pairs(ids, pooled, ["a"], ["b"]), [0.5**0.5], rtol=1e-15)
    with pytest.raises(ValueError, match="pair 0 names template c"):
        score_pairs(ids, pooled, ["c"], ["b"])


def test_zero_template_stays_zero_and_bad_values_are_named():
    feature = np.array([[1.0, 0], [-1.0, 0], [1.0, 1.0]])
    ids, pooled = pool_templates(feature, np.array([4, 4, 6]), np.array([0, 1, 0]))
    assert pooled[0].tolist() == [0, 0]
    assert score_pairs(ids, pooled, [4], [6]).tolist() == [0.0]
    feature[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"template 6 \(1 of 2\) holds NaN"):
        pool_templates(feature, np.array([4, 4, 6]), np.array([0, 1, 0]))
    with pytest.raises(ValueError, match=r"3 features, \(2,\) template ids"):
        pool_templates(feature, np.array([4, 4]), np.array([0, 1, 0]))
    with pytest.raises(ValueError, match="at least one image"):
        pool_templates(np.empty((0, 4)), np.array([], int), np.array([], int))


@pytest.mark.parametrize("ids_are_large", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_rectangle_path_equals_row_products(monkeypatch, ids_are_large, swap):
    monkeypatch.setattr(templates_module, "_RECTANGLE_PAIRS", 100)
    monkeypatch.setattr(templates_module, "_SCORES_PER_BLOCK", 900)
    monkeypatch.setattr(templates_module, "_PAIRS_PER_CHUNK", 777)
    calls = []
    rectangle = templates_module._score_rectangle
    monkeypatch.setattr(templates_module, "_score_rectangle", lambda *a: calls.append(1) or rectangle(*a))
    rng = np.random.default_rng(0)
    ids = rng.permutation(5000)[:120] * (10**12 if ids_are_large else 1)
    feature = rng.normal(size=(120, 16))
    row_left, row_right = rng.integers(0, 30, 4000), rng.integers(20, 120, 4000)  # ten templates are on both sides
    if swap:
        row_left, row_right = row_right, row_left
    got = score_pairs(ids, feature, ids[row_left], ids[row_right])
    assert calls
    np.testing.assert_allclose(got, (feature[row_left] * feature[row_right]).sum(1), atol=1e-13)


def test_few_pairs_are_row_products_bit_by_bit():
    rng = np.random.default_rng(0)
    feature, left, right = rng.normal(size=(50, 64)), rng.integers(0, 50, 3000), rng.integers(0, 50, 3000)
    got = score_pairs(np.arange(50), feature, left, right)
    np.testing.assert_array_equal(got, np.sum(feature[left] * feature[right], -1))


@pytest.mark.parametrize("unknown", [5, -1, 10**9, 10**17])
def test_unknown_templates_are_named(unknown):
    left = np.array([2, 4, unknown, unknown])
    with pytest.raises(ValueError, match=f"pair 2 names template {unknown}, which has no image"):
        score_pairs(np.array([4, 2]), np.eye(2), left, np.array([2, 2, 2, 2]))


def test_bad_pairs():
    with pytest.raises(ValueError, match=r"\(1,\) left and \(2,\) right"):
        score_pairs(np.array([1, 2]), np.eye(2), np.array([1]), np.array([1, 2]))
    with pytest.raises(ValueError, match="not unique"):
        score_pairs(np.array([1, 1]), np.eye(2), np.array([1]), np.array([1]))
    with pytest.raises(ValueError, match="2 template ids for features of shape"):
        score_pairs(np.array([1, 2]), np.eye(3), np.array([1]), np.array([1]))
