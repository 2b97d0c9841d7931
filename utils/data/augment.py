"""Augmentations of uint8 RGB images [H, W, 3], each off unless named, all drawn from (seed, epoch, sample).

``build_augment({"photometric": {"probability": 0.5}, "erase": {}})`` gives ``augment(image, rng) -> image`` of the same
shape. They run in the order of ``AUGMENTATIONS``, whatever the order of the dictionary. Every one has a
``probability``; pixels that come from outside the image are ``fill`` (grey 127) or the nearest edge (``edge``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

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


def _border(edge: bool) -> int:
    return cv2.BORDER_REPLICATE if edge else cv2.BORDER_CONSTANT


@dataclass(frozen=True)
class Crop:
    """A random part of the image, resized back to the whole: area ``min_area``..1, aspect up to ``max_aspect``."""

    probability: float = 0.2
    min_area: float = 0.6
    max_aspect: float = 1.2

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        area, aspect = rng.uniform(self.min_area, 1), math.exp(rng.uniform(-1, 1) * math.log(self.max_aspect))
        rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
        columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        return cv2.resize(image[top : top + rows, left : left + columns], (width, height))


@dataclass(frozen=True)
class Affine:
    """Shift (fraction of the side), scale (1 +- ``scale``) and rotation (+- degrees) about the centre."""

    probability: float = 1.0
    shift: float = 0.05
    scale: float = 0.1
    rotation: float = 10.0
    edge: bool = True
    fill: int = 127

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        angle, factor, right, down = rng.uniform(-1, 1, 4)
        matrix = cv2.getRotationMatrix2D(
            ((width - 1) / 2, (height - 1) / 2), angle * self.rotation, 1 + factor * self.scale
        )
        matrix[:, 2] += (right * self.shift * width, down * self.shift * height)
        return cv2.warpAffine(
            image, matrix, (width, height), borderMode=_border(self.edge), borderValue=(self.fill,) * 3
        )


@dataclass(frozen=True)
class Photometric:
    """Brightness (+- fraction of 255), contrast and saturation (1 +- fraction)."""

    probability: float = 0.2
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        brightness, contrast, saturation = rng.uniform(-1, 1, 3)
        gain = 1 + contrast * self.contrast
        table = (np.arange(256) - 127.5) * gain + 127.5 + brightness * self.brightness * 255
        image = cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8))
        if self.saturation:
            grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            weight = 1 + saturation * self.saturation
            image = cv2.addWeighted(image, weight, grey, 1 - weight, 0)
        return image


@dataclass(frozen=True)
class Blur:
    """Gaussian blur, standard deviation ``min_sigma``..``max_sigma`` pixels."""

    probability: float = 0.2
    min_sigma: float = 0.3
    max_sigma: float = 1.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cv2.GaussianBlur(image, (0, 0), rng.uniform(self.min_sigma, self.max_sigma))


@dataclass(frozen=True)
class LowResolution:
    """Down to a fraction ``min_scale``..``max_scale`` of the side and up again."""

    probability: float = 0.2
    min_scale: float = 0.25
    max_scale: float = 0.9

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        scale = rng.uniform(self.min_scale, self.max_scale)
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        up = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC)[int(rng.integers(3))]
        return cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=up)


@dataclass(frozen=True)
class Grey:
    """Three equal channels."""

    probability: float = 0.1

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


@dataclass(frozen=True)
class Erase:
    """A rectangle of ``min_area``..``max_area`` of the image filled with ``fill``, or with noise (``noise``)."""

    probability: float = 0.25
    min_area: float = 0.02
    max_area: float = 0.2
    max_aspect: float = 3.0
    noise: bool = False
    fill: int = 127

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        area = rng.uniform(self.min_area, self.max_area) * height * width
        aspect = math.exp(rng.uniform(-1, 1) * math.log(self.max_aspect))
        rows = min(height, max(1, round(math.sqrt(area * aspect))))
        columns = min(width, max(1, round(math.sqrt(area / aspect))))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        image = image.copy()
        patch = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8) if self.noise else self.fill
        image[top : top + rows, left : left + columns] = patch
        return image


AUGMENTATIONS = {
    "crop": Crop,
    "affine": Affine,
    "photometric": Photometric,
    "grey": Grey,
    "blur": Blur,
    "lowres": LowResolution,
    "erase": Erase,
}


@dataclass(frozen=True)
class Augment:
    """The chosen augmentations one after the other, each with its probability."""

    steps: list[Callable]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for step, draw in zip(self.steps, rng.random(len(self.steps)), strict=True):
            if draw < step.probability:
                image = step(image, rng)
        return image


def build_augment(chosen: dict[str, dict]) -> Augment:
    """Augmentations by name.

    Args:
        chosen: name -> parameters (None or {} for the defaults).

    Raises:
        UserError: an unknown name or parameter, or a value out of its range.
    """
    for name, parameters in chosen.items():
        if name not in AUGMENTATIONS:
            raise UserError(f"augment: {name!r} is not one of {', '.join(AUGMENTATIONS)}")
        known = {field.name: field.default for field in fields(AUGMENTATIONS[name])}
        for parameter, value in (parameters or {}).items():
            if parameter not in known:
                raise UserError(f"augment.{name}: {parameter!r} is not one of {', '.join(known)}")
            _check(f"augment.{name}.{parameter}", parameter, value, known[parameter])
    steps = [kind(**(chosen[name] or {})) for name, kind in AUGMENTATIONS.items() if name in chosen]
    for step in steps:
        for low, high in (("min_area", "max_area"), ("min_scale", "max_scale"), ("min_sigma", "max_sigma")):
            if getattr(step, low, 0) > getattr(step, high, math.inf):
                raise UserError(f"augment: {low} {getattr(step, low)} exceeds {high} {getattr(step, high)}")
    return Augment(steps)


def _check(place: str, parameter: str, value: object, default: object) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{place}: {value!r}, true or false was expected")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{place}: {value!r}, a number was expected")
    low, high = {
        "probability": (0, 1),
        "min_area": (1e-4, 1),
        "max_area": (1e-4, 1),
        "max_aspect": (1, 100),
        "min_sigma": (0.01, 100),
        "max_sigma": (0.01, 100),
        "min_scale": (0.01, 1),
        "max_scale": (0.01, 1),
        "scale": (0, 0.99),
        "rotation": (0, 180),
        "fill": (0, 255),
    }.get(parameter, (0, 1))
    if not low <= value <= high:
        raise UserError(f"{place}: {value!r} is outside {low}..{high}")
