"""Encoded image bytes to RGB pixels, or an error: never wrong pixels, never None.

simplejpeg where it is installed (it releases the GIL and refuses damaged data), OpenCV for PNG and as a fallback.
Orientation tags are ignored: mxnet ignores them, and aligned faces are upright. Images are uint8 [H, W, 3], RGB.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import describe_bytes

try:
    import simplejpeg
except ImportError:  # pragma: no cover - tested by setting the name to None
    simplejpeg = None

JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
PIXEL_SCALE, PIXEL_SHIFT = 2 / 255, -1.0  # grey levels 0..255 to what networks take, -1..1


def normalise_images(image_NHWC: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1, contiguous."""
    image_NCHW = np.ascontiguousarray(image_NHWC.transpose(0, 3, 1, 2), np.float32)
    image_NCHW *= np.float32(PIXEL_SCALE)
    image_NCHW += np.float32(PIXEL_SHIFT)
    return image_NCHW


class DecodeError(ValueError):
    """Bytes that are not a whole image."""


def decode_image(encoded: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """Decode JPEG, PNG or what else OpenCV reads; grey becomes three equal channels.

    Args:
        encoded: the file's bytes.
        out: contiguous uint8 [H, W, 3] to decode into if the image has exactly that size.

    Returns:
        uint8 [H, W, 3] RGB: ``out`` itself if it was given and the size agrees, else a new array.

    Raises:
        DecodeError: empty, cut or damaged data, naming what is wrong.
    """
    if simplejpeg is not None:
        if out is not None:
            try:  # nearly always a JPEG of the right size: no look at it before
                if simplejpeg.decode_jpeg(encoded, buffer=out).shape == out.shape:
                    return out
            except ValueError:  # damaged, larger than the buffer, another colour space or format: found out below
                pass
        if encoded[:3] == JPEG_START:
            try:
                if simplejpeg.decode_jpeg_header(encoded)[2] not in ("CMYK", "YCCK"):  # which it does not turn into RGB
                    return simplejpeg.decode_jpeg(encoded)
            except ValueError as error:
                raise DecodeError(f"damaged JPEG of {len(encoded)} bytes: {error}") from error
    encoded = bytes(encoded)
    check_whole(encoded)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f"OpenCV cannot decode {len(encoded)} bytes: {error.err}") from error
    if image is None:
        kind = describe_bytes(encoded[:1024])
        if kind.endswith("picture"):
            raise DecodeError(f"{kind} of {len(encoded)} bytes that cannot be decoded: damaged, empty or too large")
        found = f"{len(encoded)} bytes starting with {encoded[:4].hex()}"
        raise DecodeError(f"{found} are not a known image: {kind}")
    fits = out is not None and out.shape == image.shape
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out if fits else None)


def read_image(path: str | os.PathLike, size: int | None = None) -> np.ndarray:
    """uint8 RGB [H, W, 3] of an image file, pixels as stored; stretched to a square where a size is given.

    Photos of people may lie on their side: ``utils.photos.photo.read_photo``.

    Raises:
        UserError: no such file, or not a whole image.
    """
    try:
        image = decode_image(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; an image is needed") from None
    except DecodeError as error:
        raise UserError(f"{path}: not an image that can be decoded ({error})") from error
    return image if size is None else fit_image(image, (size, size), "stretch")


def check_whole(encoded: bytes) -> None:
    """Refuse a JPEG without its end marker or a PNG whose chunks do not add up; OpenCV would fill in grey.

    Raises:
        DecodeError: the data is cut or damaged.
    """
    if not encoded:
        raise DecodeError("no image bytes")
    if encoded[:3] == JPEG_START:
        start = _first_scan(encoded)
        if start is None or encoded.find(b"\xff\xd9", start) < 0:
            raise DecodeError(f"JPEG of {len(encoded)} bytes is cut: no end marker")
    elif encoded[:8] == PNG_START:
        position = 8
        while True:
            length = int.from_bytes(encoded[position : position + 4], "big")
            kind, stop = encoded[position + 4 : position + 8], position + 12 + length
            if len(kind) < 4 or stop > len(encoded):
                raise DecodeError(f"PNG of {len(encoded)} bytes is cut at byte {position}")
            if zlib.crc32(encoded[position + 4 : stop - 4]) != int.from_bytes(encoded[stop - 4 : stop], "big"):
                raise DecodeError(f"PNG chunk {kind!r} at byte {position} fails its checksum")
            if kind == b"IEND":
                return
            position = stop


def _first_scan(encoded: bytes) -> int | None:
    """Offset of the first start-of-scan segment (a thumbnail in an EXIF segment has markers of its own)."""
    position = 2
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xDA:
            return position
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
        else:
            position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def face_file(
    encoded: bytes, size: tuple[int, int] | None, mode: str | None, quality: int, name: Callable[[], object]
) -> bytes:
    """The file's own bytes if they are a whole JPEG or PNG of (height, width) ``size``, else a JPEG of that size.

    Args:
        size: None takes any.
        mode: of ``fit_image``; ``no`` refuses other sizes.
        quality: of a JPEG that is made.
        name: what to call the image in an error.

    Raises:
        DecodeError: it is damaged.
        UserError: it has another size, and ``mode`` is ``no``.
    """
    image = decode_image(encoded)
    fits = size in (None, image.shape[:2])
    if fits and encoded.startswith((JPEG_START, b"\x89PNG")):
        return encoded
    if not fits and mode == "no":
        found = "x".join(map(str, image.shape[:2]))
        raise UserError(f"{name()}: {found}, {size[0]}x{size[1]} expected; align it, or give --resize")
    image = image if fits else fit_image(image, size, mode)
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def fit_image(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize to (height, width): ``stretch`` as it is, ``crop`` after cutting the centre to the same proportions."""
    height, width = size
    if mode == "crop":
        scale = min(image.shape[0] / height, image.shape[1] / width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
        image = image[top : top + rows, left : left + columns]
    if image.shape[:2] == size:
        return np.ascontiguousarray(image)
    shrinks = image.shape[0] > height and image.shape[1] > width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
