"""utils/photos/align.py against Umeyama's SVD, linear least squares and a face put down by a known transform."""

import cv2
import numpy as np
import pytest
from scipy.optimize import linprog

from benchmarks.align import least_largest_distance
from utils.photos.align import ARCFACE_TEMPLATE, align_face, similarity_transform

TEMPLATE = np.array(ARCFACE_TEMPLATE)


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


@pytest.mark.parametrize(
    "landmark",
    [np.ones((5, 2)), np.full((5, 2), np.nan), np.ones((4, 2)), 1e30 * TEMPLATE, -1e6 * TEMPLATE, 1e-9 * TEMPLATE],
)
def test_landmarks_that_define_nothing(landmark):
    with pytest.raises(ValueError, match="landmarks"):
        similarity_transform(landmark, TEMPLATE)


@pytest.mark.parametrize("scale", [-1000.0, 1000.0])
def test_a_face_far_off_is_black_and_takes_no_memory(scale):
    assert not align_face(np.full((20, 30, 3), 255, np.uint8), scale * TEMPLATE + 50.0).any()


def place(size, scale, turn=0.3, shift=(90.0, 40.0)):
    """Landmarks of a template put into a photo at ``scale``, and the matrix that takes template to photo."""
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.array(ARCFACE_TEMPLATE) @ matrix.T + shift, matrix


def area_means(photo, matrix, shift):
    """Each pixel of the crop as the mean of 40 x 40 bilinear samples spread over it, float64: no skipping."""
    step = (np.arange(40) + 0.5) / 40 - 0.5
    y, x = np.mgrid[0:112, 0:112]
    total = np.zeros((112, 112))
    for dy in step:
        for dx in step:
            place_x = matrix[0, 0] * (x + dx) + matrix[0, 1] * (y + dy) + shift[0]
            place_y = matrix[1, 0] * (x + dx) + matrix[1, 1] * (y + dy) + shift[1]
            total += cv2.remap(photo, place_x.astype(np.float32), place_y.astype(np.float32), cv2.INTER_LINEAR)
    return total / 1600


@pytest.mark.parametrize("scale", [2.0, 3.7, 9.0])
def test_a_large_face_is_averaged_and_not_skipped_through(scale):
    """Against area means: fine noise keeps its mean only; without averaging the warp is 2 to 9 times farther."""
    rng = np.random.default_rng(3)
    side = int(112 * scale * 1.4) + 60
    coarse = cv2.resize(rng.integers(60, 200, (9, 9)).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    photo = np.clip(coarse.astype(int) + rng.integers(-55, 56, coarse.shape), 0, 255).astype(np.uint8)
    shift = (40.0 * scale, 10.0)
    landmark, matrix = place(112, scale, shift=shift)
    expected = area_means(photo, matrix, shift)
    inside = (slice(8, -8), slice(8, -8))
    averaged = np.abs(align_face(photo, landmark)[inside] - expected[inside]).mean()
    skipping = np.abs(align_face(photo, landmark, antialias=False)[inside] - expected[inside]).mean()
    assert averaged < 0.55 * skipping


@pytest.mark.parametrize("scale", [2.0, 3.0, 5.5])
def test_averaging_moves_nothing(scale):
    """A ramp (in floating point) stays where it is to a thirtieth of a pixel, whatever the corner of the part."""
    ramp = np.tile(np.arange(900, dtype=np.float32), (900, 1))
    for shift in ((150.0, 40.0), (151.3, 41.8), (149.0, 43.0)):
        landmark, matrix = place(112, scale, turn=0.1, shift=shift)
        y, x = np.mgrid[4:108, 4:108]
        expected = matrix[0, 0] * x + matrix[0, 1] * y + shift[0]
        assert np.abs(align_face(ramp, landmark)[4:108, 4:108] - expected).max() < scale / 30


def test_a_small_face_is_the_plain_warp_and_a_face_outside_is_black():
    photo = np.random.default_rng(0).integers(1, 256, (300, 300, 3), dtype=np.uint8)
    landmark, _ = place(112, 1.9, turn=0.0, shift=(10.0, 10.0))
    np.testing.assert_array_equal(align_face(photo, landmark), align_face(photo, landmark, antialias=False))
    assert not align_face(photo, np.array(ARCFACE_TEMPLATE) * 4 + 5000).any()
    assert not align_face(photo, np.array(ARCFACE_TEMPLATE) * 4 - 5000).any()


def test_the_least_largest_distance_beside_a_linear_program():
    """What benchmarks/align.py calls out of reach; there a distance is its largest component in 360 directions."""
    rng = np.random.default_rng(2)
    angle = np.arange(360) * np.pi / 180
    for scale in (0.5, 2.0, 6.0):
        landmark = np.array(ARCFACE_TEMPLATE) * 2 + rng.normal(size=(5, 2)) * scale
        (x, y), (u, v) = landmark[[0, 1, 3, 4]].T, np.array(ARCFACE_TEMPLATE)[[0, 1, 3, 4]].T
        rows, limits = [], []
        for cosine, sine in zip(np.cos(angle), np.sin(angle), strict=True):
            for k in range(4):  # cosine (a x - b y + s - u) + sine (b x + a y + t - v) <= distance
                rows.append([cosine * x[k] + sine * y[k], sine * x[k] - cosine * y[k], cosine, sine, -1])
                limits.append(cosine * u[k] + sine * v[k])
        solved = linprog([0, 0, 0, 0, 1], rows, limits, bounds=[(None, None)] * 5)
        assert solved.success
        assert least_largest_distance(landmark) == pytest.approx(solved.fun, rel=1e-3)
