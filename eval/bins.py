"""Verification ``.bin`` sets: pairs of encoded faces in a pickle, read without trusting it.

P pairs; images are uint8 [2P, H, W, 3] RGB, image 2i and 2i+1 are pair i; ``same_P`` is bool.
"""

import os
import pickle
from collections.abc import Sequence

import numpy as np

from utils.decode import DecodeError, decode_image, fit_image
from utils.errors import UserError
from utils.files import written_whole
from utils.weights.safe_pickle import load_bin_pickle


def read_bin(path: str | os.PathLike) -> tuple[list[bytes], np.ndarray]:
    """(2P encoded images, same_P bool) of a ``.bin`` file, not decoded.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a verification set, or it holds more than data.
    """
    path = os.fspath(path)
    value = load_bin_pickle(path)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise UserError(f"{path}: a pair (images, same) was expected, found a {type(value).__name__}")
    images, same = value
    if not isinstance(images, (list, tuple)):
        raise UserError(f"{path}: a list of images was expected, found a {type(images).__name__}")
    if not isinstance(same, (list, tuple, np.ndarray)) or (isinstance(same, np.ndarray) and same.ndim != 1):
        raise UserError(f"{path}: a list of pair labels was expected, found a {type(same).__name__}")
    if len(images) != 2 * len(same):
        raise UserError(f"{path}: {len(images)} images for {len(same)} pairs; two images a pair were expected")
    if len(same) == 0:
        raise UserError(f"{path}: no pairs in it")
    for pair, flag in enumerate(same):
        if not (isinstance(flag, (bool, int, float, np.generic)) and flag in (0, 1, -1)):
            raise UserError(f"{path}: the label of pair {pair} is {flag!r}, True or False (1, or 0 or -1) was expected")
    encoded = []
    for number, image in enumerate(images):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = image.tobytes()
        if not isinstance(image, bytes):
            raise UserError(f"{path}: image {number} is a {type(image).__name__}, encoded bytes were expected")
        encoded.append(image)
    return encoded, np.array([bool(flag == 1) for flag in same])


def load_bin(path: str | os.PathLike, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [2P, H, W, 3] RGB, same_P bool), each image brought to ``size`` (height, width) if it is given.

    Raises:
        OSError: the file cannot be read.
        UserError: not a verification set, an image that does not decode, or sizes that differ.
    """
    encoded, same_P = read_bin(path)
    images = None
    for number, data in enumerate(encoded):
        try:
            image = decode_image(data, out=None if images is None else images[number])
        except DecodeError as error:
            raise UserError(f"{os.fspath(path)}: image {number} (pair {number // 2}): {error}") from error
        if size is not None and image.shape[:2] != tuple(size):
            image = fit_image(image, tuple(size), "stretch")
        if images is None:
            images = np.empty((len(encoded), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            found, expected = image.shape[:2], images.shape[1:3]
            raise UserError(f"{os.fspath(path)}: image {number} is {found}, image 0 is {expected}; give a size")
        if image.base is not images:
            images[number] = image
    return images, same_P


def save_bin(path: str | os.PathLike, encoded: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a ``.bin`` set in the common layout, a pickle (protocol 4, as Python writes since 3.8), in one piece.

    Raises:
        UserError: two images a pair are not what was given.
    """
    if len(encoded) != 2 * len(same):
        raise UserError(f"{os.fspath(path)}: {len(encoded)} images for {len(same)} pairs")
    value = ([bytes(image) for image in encoded], [bool(flag) for flag in same])
    with written_whole(path) as aside, open(aside, "wb") as file:
        pickle.dump(value, file, protocol=4)
