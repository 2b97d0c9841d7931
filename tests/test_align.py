"""utils/photos/align.py against Umeyama's SVD, linear least squares and a face put down by a known transform."""

import cv2
import numpy as np
import pytest

from utils.photos.align import ARCFACE_TEMPLATE, align_face, similarity_transform


def umeyama(source, target):
    """Least-squares similarity by SVD (Umeyama 1991), reflections excluded."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    covariance = (target - target_mean).T @ (source - source_mean) / len(source)
    u, d, vt = np.linalg.svd(covariance)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / ((source - source_mean) ** 2).sum(1).mean()
    return np.hstack([scale * rotation, (target_mean - scale * rotation @ source_mean)[:, None]])


def test_equal_to_the_svd_even_where_a_reflection_would_fit_better():
    rng = np.random.default_rng(0)
    for trial in range(200):
        source, target = rng.normal(size=(5, 2)) * 50, rng.normal(size=(5, 2)) * 50
        if trial % 4 == 0:
            target = source * [-1, 1] + rng.normal(size=(5, 2))
        got = similarity_transform(source, target)
        np.testing.assert_allclose(got, umeyama(source, target), atol=1e-10)
        # a x - b y + tx, b x + a y + ty: linear in (a, b, tx, ty).
        x, y = source.T
        one, zero = np.ones(5), np.zeros(5)
        matrix = np.vstack([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
        a, b, tx, ty = np.linalg.lstsq(matrix, target.T.reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(got, [[a, -b, tx], [b, a, ty]], atol=1e-9)


def test_brings_back_a_face_put_down_turned_and_scaled():
    rng = np.random.default_rng(1)
    face = cv2.resize(rng.integers(0, 256, (7, 7, 3)).astype(np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
    turn = 1.3 * np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    matrix = np.hstack([turn, [[60.0], [20.0]]])
    crop = cv2.warpAffine(face, matrix, (260, 260), flags=cv2.INTER_CUBIC)
    landmark = np.array(ARCFACE_TEMPLATE) @ turn.T + [60, 20]
    back = align_face(crop, landmark)
    assert np.abs(back[8:-8, 8:-8].astype(int) - face[8:-8, 8:-8]).mean() < 2
    half = align_face(crop, landmark, 56)
    assert np.abs(half[4:-4, 4:-4].astype(int) - cv2.resize(face, (56, 56))[4:-4, 4:-4]).mean() < 12
    assert align_face(crop[..., 0], landmark).shape == (112, 112)


def test_outside_the_crop_is_black():
    assert align_face(np.full((20, 20, 3), 255, np.uint8), np.array(ARCFACE_TEMPLATE))[80:, 80:].max() == 0


@pytest.mark.parametrize("landmark", [np.ones((5, 2)), np.full((5, 2), np.nan), np.ones((4, 2))])
def test_landmarks_that_define_nothing(landmark):
    with pytest.raises(ValueError, match="landmarks"):
        similarity_transform(landmark, np.array(ARCFACE_TEMPLATE))
