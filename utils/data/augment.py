"""Augmentations of uint8 RGB images [H, W, 3], each off unless named, all drawn from (seed, epoch, sample).

``build_augment({"photometric": {"probability": 0.5}, "erase": {}})`` gives ``augment(image, rng) -> image`` of the same
shape. They run in the order of ``AUGMENTATIONS``, whatever the order of the dictionary. Every one has a
``probability``; pixels that come from outside the image are ``fill`` (grey 127) or the nearest edge (``edge``).
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

from utils.errors import UserError

_GOLDEN, _MIX1, _MIX2 = (np.uint64(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def flips(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """One fair coin a sample, bool [n], from (seed, epoch, sample): the finaliser of splitmix64, vectorised."""
    with np.errstate(over="ignore"):
        base = np.uint64(seed % 2**64) * _MIX1 + np.uint64(epoch % 2**64) * _MIX2 + _GOLDEN
        value = _mix(np.asarray(samples, np.uint64) * _GOLDEN + _mix(base))
    return (value >> np.uint64(63)).astype(bool)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX1
    value = (value ^ (value >> np.uint64(27))) * _MIX2
    return value ^ (value >> np.uint64(31))


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of one sample in one epoch."""
    return np.random.Generator(np.random.PCG64((seed, epoch, sample, 0xA06)))


def crop(image: np.ndarray, rng: np.random.Generator, *, min_area: float = 0.6, max_aspect: float = 1.2) -> np.ndarray:
    """A random part of the image, resized back to the whole: area ``min_area``..1, aspect up to ``max_aspect``."""
    height, width = image.shape[:2]
    area, aspect = rng.uniform(min_area, 1), math.exp(rng.uniform(-1, 1) * math.log(max_aspect))
    part = _part(image, rng, height * math.sqrt(area / aspect), width * math.sqrt(area * aspect))
    return cv2.resize(image[part], (width, height))


def _part(image: np.ndarray, rng: np.random.Generator, height: float, width: float) -> tuple[slice, slice]:
    """A part of about this size, at least a pixel and at most the image, at a random place."""
    rows, columns = min(image.shape[0], max(1, round(height))), min(image.shape[1], max(1, round(width)))
    top, left = int(rng.integers(image.shape[0] - rows + 1)), int(rng.integers(image.shape[1] - columns + 1))
    return slice(top, top + rows), slice(left, left + columns)


def affine(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    shift: float = 0.05,
    scale: float = 0.1,
    rotation: float = 10.0,
    edge: bool = True,
    fill: int = 127,
) -> np.ndarray:
    """Shift (fraction of the side), scale (1 +- ``scale``) and rotation (+- degrees) about the centre."""
    height, width = image.shape[:2]
    angle, factor, right, down = rng.uniform(-1, 1, 4)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle * rotation, 1 + factor * scale)
    matrix[:, 2] += (right * shift * width, down * shift * height)
    border = cv2.BORDER_REPLICATE if edge else cv2.BORDER_CONSTANT
    return cv2.warpAffine(image, matrix, (width, height), borderMode=border, borderValue=(fill,) * 3)


def photometric(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
) -> np.ndarray:
    """Brightness (+- fraction of 255), contrast and saturation (1 +- fraction)."""
    brighter, steeper, stronger = rng.uniform(-1, 1, 3) * (brightness, contrast, saturation)
    table = (np.arange(256) - 127.5) * (1 + steeper) + 127.5 + brighter * 255
    image = cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8))
    if saturation:
        image = cv2.addWeighted(image, 1 + stronger, grey(image, rng), 1 - (1 + stronger), 0)
    return image


def grey(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three equal channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: np.ndarray, rng: np.random.Generator, *, min_sigma: float = 0.3, max_sigma: float = 1.5) -> np.ndarray:
    """Gaussian blur, standard deviation ``min_sigma``..``max_sigma`` pixels."""
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(min_sigma, max_sigma))


def lowres(
    image: np.ndarray, rng: np.random.Generator, *, min_scale: float = 0.25, max_scale: float = 0.9
) -> np.ndarray:
    """Down to a fraction ``min_scale``..``max_scale`` of the side and up again."""
    height, width = image.shape[:2]
    scale = rng.uniform(min_scale, max_scale)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    up = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC)[int(rng.integers(3))]
    return cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=up)


def erase(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    min_area: float = 0.02,
    max_area: float = 0.2,
    max_aspect: float = 3.0,
    noise: bool = False,
    fill: int = 127,
) -> np.ndarray:
    """A rectangle of ``min_area``..``max_area`` of the image filled with ``fill``, or with noise (``noise``)."""
    height, width = image.shape[:2]
    area = rng.uniform(min_area, max_area) * height * width
    aspect = math.exp(rng.uniform(-1, 1) * math.log(max_aspect))
    part, image = _part(image, rng, math.sqrt(area * aspect), math.sqrt(area / aspect)), image.copy()
    image[part] = rng.integers(0, 256, image[part].shape, dtype=np.uint8) if noise else fill
    return image


# In the order in which they run, each with its usual probability; the other defaults are the functions'.
AUGMENTATIONS = {
    "crop": (crop, 0.2),
    "affine": (affine, 1.0),
    "photometric": (photometric, 0.2),
    "grey": (grey, 0.1),
    "blur": (blur, 0.2),
    "lowres": (lowres, 0.2),
    "erase": (erase, 0.25),
}


def build_augment(chosen: dict[str, dict]) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """The chosen augmentations one after the other, each with its probability.

    Args:
        chosen: name -> parameters (None or {} for the defaults).

    Raises:
        UserError: an unknown name or parameter, or a value out of its range.
    """
    for name in chosen:
        if name not in AUGMENTATIONS:
            raise UserError(f"augment: {name!r} is not one of {', '.join(AUGMENTATIONS)}")
    steps = []
    for name in (name for name in AUGMENTATIONS if name in chosen):
        function, probability = AUGMENTATIONS[name]
        known = {"probability": probability, **(function.__kwdefaults__ or {})}
        given = chosen[name] or {}
        for parameter, value in given.items():
            if parameter not in known:
                raise UserError(f"augment.{name}: {parameter!r} is not one of {', '.join(known)}")
            _check(f"augment.{name}.{parameter}", parameter, value, known[parameter])
        parameters = {**known, **given}
        for low, high in (("min_area", "max_area"), ("min_scale", "max_scale"), ("min_sigma", "max_sigma")):
            if parameters.get(low, 0) > parameters.get(high, math.inf):
                raise UserError(f"augment: {low} {parameters[low]} exceeds {high} {parameters[high]}")
        steps.append((parameters.pop("probability"), functools.partial(function, **parameters)))

    def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for (probability, step), draw in zip(steps, rng.random(len(steps)), strict=True):
            if draw < probability:
                image = step(image, rng)
        return image

    return augment


_RANGES = {  # of a parameter, or of its name behind min_ and max_; 0..1 otherwise
    "area": (1e-4, 1),
    "aspect": (1, 100),
    "sigma": (0.01, 100),
    "min_scale": (0.01, 1),
    "max_scale": (0.01, 1),
    "scale": (0, 0.99),
    "rotation": (0, 180),
    "fill": (0, 255),
}


def _check(place: str, parameter: str, value: object, default: object) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{place}: {value!r}, true or false was expected")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{place}: {value!r}, a number was expected")
    low, high = _RANGES.get(parameter) or _RANGES.get(parameter.partition("_")[2], (0, 1))
    if not low <= value <= high:
        raise UserError(f"{place}: {value!r} is outside {low}..{high}")
