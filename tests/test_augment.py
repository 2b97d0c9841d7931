"""Augmentations: seeded, off by default, each doing what its name says."""

import cv2
import numpy as np
import pytest

from utils.data.augment import AUGMENTATIONS, build_augment, flips, sample_rng
from utils.errors import UserError


def picture(size=48):
    small = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def many(chosen, count=200, image=None):
    image = picture() if image is None else image
    augment = build_augment(chosen)
    return [augment(image.copy(), sample_rng(0, 0, sample)) for sample in range(count)]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_seeded_shaped_and_with_its_probability(name):
    image = picture()
    kept = image.copy()
    first, second = (many({name: {"probability": 0.5}}, image=image) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.shape == image.shape and a.dtype == np.uint8 for a in first)
    changed = sum(not np.array_equal(a, image) for a in first)
    assert 70 < changed < 130  # 200 fair coins
    assert all(np.array_equal(a, image) for a in many({name: {"probability": 0}}, image=image))
    assert np.array_equal(image, kept)
    always = many({name: {"probability": 1}}, 40)
    assert len({a.tobytes() for a in always}) > (0 if name == "grey" else 30)


def test_another_seed_epoch_or_sample_gives_another_draw():
    augment = build_augment({"affine": {"probability": 1}})
    results = {
        augment(picture(), sample_rng(*place)).tobytes() for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }
    assert len(results) == 4


def test_photometric_by_hand():
    parameters = {"probability": 1, "brightness": 0.2, "contrast": 0, "saturation": 0}
    shifts = [
        np.unique(a.astype(int) - 120).tolist()
        for a in many({"photometric": parameters}, image=np.full((4, 4, 3), 120, np.uint8))
    ]
    assert all(len(shift) == 1 for shift in shifts)
    assert -51 <= min(shifts)[0] < -40 and 40 < max(shifts)[0] <= 51  # 0.2 x 255
    parameters = {"probability": 1, "brightness": 0, "contrast": 0.5, "saturation": 0}
    two = np.array([[[77] * 3, [177] * 3]], np.uint8)  # 50 below and above the middle
    gaps = [int(a[0, 1, 0]) - int(a[0, 0, 0]) for a in many({"photometric": parameters}, image=two)]
    assert 48 <= min(gaps) < 60 and 140 < max(gaps) <= 152
    parameters = {"probability": 1, "brightness": 0, "contrast": 0, "saturation": 1.0}
    colourful = [np.ptp(a.astype(int), axis=2).max() for a in many({"photometric": parameters})]
    assert min(colourful) < np.ptp(picture().astype(int), axis=2).max() / 3


def test_grey_blur_and_low_resolution():
    assert all((a == a[..., :1]).all() for a in many({"grey": {"probability": 1}}, 3))
    sharp = np.zeros((48, 48, 3), np.uint8)
    sharp[::2] = 255
    for name in ("blur", "lowres"):
        parameters = {"probability": 1} | ({"min_sigma": 1.0} if name == "blur" else {"max_scale": 0.4})
        for a in many({name: parameters}, 20, sharp):
            assert np.abs(np.diff(a.astype(int), axis=0)).mean() < 200


def test_erase_area():
    areas = [
        (a == 3).all(axis=2).mean()
        for a in many({"erase": {"probability": 1, "min_area": 0.1, "max_area": 0.2, "fill": 3}})
    ]
    assert 0.08 < min(areas) < 0.13 and 0.17 < max(areas) < 0.23
    noisy = many({"erase": {"probability": 1, "noise": True}}, 2)
    assert len(np.unique(noisy[0])) > 50


def test_affine_shift_moves_and_scale_keeps_the_centre():
    dot = np.zeros((49, 49, 3), np.uint8)
    dot[24, 24] = 255
    off = {"probability": 1, "shift": 0, "scale": 0, "rotation": 0}
    assert all(np.array_equal(a, dot) for a in many({"affine": off}, 5, dot))
    assert all(a[24, 24, 0] > 120 for a in many({"affine": off | {"rotation": 180}}, 20, dot))
    moved = [
        np.argwhere(a[..., 0] == a[..., 0].max())[0] - 24 for a in many({"affine": off | {"shift": 0.2}}, 200, dot)
    ]
    assert 8 <= np.abs(moved).max() <= 10  # 0.2 x 49 pixels


def test_order_does_not_depend_on_the_dictionary():
    one, other = ({"erase": {}, "affine": {}}, {"affine": {}, "erase": {}})
    assert all(np.array_equal(a, b) for a, b in zip(many(one, 20), many(other, 20), strict=True))


def test_flips_are_fair_and_depend_on_everything():
    samples = np.arange(100_000)
    found = flips(0, 0, samples)
    assert abs(found.mean() - 0.5) < 0.01
    assert np.array_equal(found[500:700], flips(0, 0, np.arange(500, 700)))
    for other in (flips(1, 0, samples), flips(0, 1, samples)):
        assert abs((found == other).mean() - 0.5) < 0.01
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"sharpen": {}}, "'sharpen' is not one of crop"),
        ({"blur": {"sigma": 1}}, "augment.blur: 'sigma' is not one of"),
        ({"blur": {"probability": 2}}, "augment.blur.probability: 2 is outside 0..1"),
        ({"blur": {"min_sigma": 3, "max_sigma": 1}}, "min_sigma 3 exceeds max_sigma 1"),
        ({"erase": {"noise": 1}}, "true or false"),
        ({"erase": {"fill": "red"}}, "a number was expected"),
    ],
)
def test_bad_choices(chosen, message):
    with pytest.raises(UserError, match=message):
        build_augment(chosen)
