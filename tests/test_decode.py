"""Decoding: the same pixels from both decoders, orientation ignored, damage refused."""

import struct

import cv2
import numpy as np
import pytest

import utils.decode
from utils.decode import DecodeError, decode_image, fit_image


def picture(height=40, width=32, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image, *options):
    return cv2.imencode(".jpg", image[..., ::-1] if image.ndim == 3 else image, list(options))[1].tobytes()


def with_orientation(encoded, orientation):
    """An EXIF segment saying that the picture lies on its side, with a thumbnail's end marker inside."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4) + b"\xff\xd9"
    segment = b"Exif\0\0" + tiff
    return encoded[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + encoded[2:]


def test_normalisation_of_all_values():
    image_NHWC = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(3, axis=3)
    found = utils.decode.normalise_images(image_NHWC)
    expected = ((image_NHWC.astype(np.float64) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
    assert found.dtype == np.float32 and found.shape == (2, 3, 8, 16) and np.abs(found - expected).max() < 1e-6


@pytest.fixture(params=["simplejpeg", "opencv"])
def decoder(request, monkeypatch):
    if request.param == "opencv":
        monkeypatch.setattr(utils.decode, "simplejpeg", None)
    return request.param


def test_pixels_agree_with_opencv(decoder):
    for options in ((), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_QUALITY, 30)):
        encoded = jpeg(picture(), *options)
        expected = cv2.imdecode(np.frombuffer(encoded, np.uint8), 1)[:, :, ::-1]
        assert np.abs(decode_image(encoded).astype(int) - expected).max() <= 1
        out = np.zeros((40, 32, 3), np.uint8)
        assert decode_image(encoded, out) is out and np.array_equal(out, decode_image(encoded))


def test_another_size_than_the_buffer(decoder):
    encoded = jpeg(picture())
    for shape in ((20, 16, 3), (80, 64, 3), (32, 40, 3)):
        found = decode_image(encoded, np.zeros(shape, np.uint8))
        assert np.array_equal(found, decode_image(encoded))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_ignored(decoder, orientation):
    encoded = jpeg(picture())
    assert np.array_equal(decode_image(with_orientation(encoded, orientation)), decode_image(encoded))


def test_grey_and_png(decoder):
    grey = picture()[:, :, 0]
    found = decode_image(jpeg(grey))
    assert found.shape == (40, 32, 3) and (found[..., :1] == found).all()
    for image in (picture(), grey):
        encoded = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()
        expected = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        assert np.array_equal(decode_image(encoded), expected)
        out = np.zeros((40, 32, 3), np.uint8)
        assert decode_image(encoded, out) is out and np.array_equal(out, expected)


def test_every_cut_is_refused(decoder):
    for encoded in (
        jpeg(picture()),
        with_orientation(jpeg(picture()), 6),
        cv2.imencode(".png", picture())[1].tobytes(),
    ):
        for stop in range(0, len(encoded), 3):
            with pytest.raises(DecodeError):
                decode_image(encoded[:stop])
        with pytest.raises(DecodeError):
            decode_image(encoded[:-1])


def test_other_damage(decoder):
    png = bytearray(cv2.imencode(".png", picture())[1].tobytes())
    png[60] ^= 1
    for bad in (b"", b"not an image", b"\xff\xd8\xff", bytes(png), b"GIF89a" + bytes(20)):
        with pytest.raises(DecodeError):
            decode_image(bad)


def test_fit():
    image = np.zeros((60, 40, 3), np.uint8)
    image[10:50] = 200
    assert (fit_image(image, (20, 20), "crop") == 200).all()  # the centre 40 x 40
    stretched = fit_image(image, (30, 20), "stretch")
    assert stretched.shape == (30, 20, 3) and (stretched[5:25] == 200).all() and (stretched[:5] == 0).all()
    assert np.array_equal(fit_image(image, (60, 40), "crop"), image)
    assert fit_image(image, (70, 90), "stretch").shape == (70, 90, 3)
