"""Photos as people have them to upright RGB pixels: turned, transparent, grey, 16-bit, CMYK; a cut file is an error."""

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from utils.decode import JPEG_START, DecodeError, check_whole, decode_image
from utils.errors import UserError
from utils.files import HEIC_BRANDS

BACKGROUND = 255  # white, as behind a passport picture: what shows through transparent pixels


def read_photo(path: str | Path) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a photo, upright by its EXIF orientation (mirrored ones too).

    JPEG, PNG, WebP, GIF and TIFF (the first picture of several), BMP, PNM and what else Pillow reads. Grey becomes
    three equal channels, 16 bits are scaled to 8, CMYK becomes RGB, transparent pixels show white.

    Raises:
        UserError: no image, a cut or damaged one, pixels whose range is unknown (floating point); names the file.
        OSError: the file cannot be read.
    """
    try:
        return decode_photo(Path(path).read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: not an image that can be decoded ({error})") from error


def decode_photo(encoded: bytes) -> np.ndarray:
    """``read_photo`` of a file's bytes.

    Raises:
        DecodeError: as ``UserError`` there, without a file's name.
    """
    if encoded[:3] == JPEG_START:  # decoded by the training reader's decoder, which refuses damage and is the fastest
        return turn_upright(decode_image(encoded), _jpeg_orientation(encoded))
    check_whole(encoded)
    if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIC_BRANDS:
        raise DecodeError("a HEIC photo, which is not read here; save it as JPEG or PNG")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            pixels = _to_rgb(image)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Image.UnidentifiedImageError:
        raise DecodeError(f"{len(encoded)} bytes starting with {encoded[:4].hex()} are not a known image") from None
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too many pixels for a photo ({error})") from None
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plugins raise what their parsers stumble over: struct.error, IndexError, ...
        raise DecodeError(f"damaged image of {len(encoded)} bytes: {type(error).__name__}: {error}") from error
    # Pillow turns TIFF upright by itself and drops the tag as it loads; the tag that is left is still to be obeyed.
    return turn_upright(pixels, orientation)


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 1 upright, 2-4 and the like mirrored or upside down, 5-8 with axes exchanged.

    Numbers outside 1 ... 8 mean nothing and change nothing.
    """
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
        grey = np.asarray(image).astype(np.int64)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
            raise DecodeError(f"grey values {grey.min()} ... {grey.max()}; 8 or 16 bits were expected")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise DecodeError("floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, (BACKGROUND,) * 3 + (255,)), above)
    return np.asarray(image.convert("RGB"))


def _jpeg_orientation(encoded: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 where there is none or where its EXIF block is damaged.

    Not by ``Image.open``, which refuses photos of more than 179 million pixels.
    """
    exif = Image.Exif()
    try:
        exif.load(JpegImageFile(io.BytesIO(encoded)).info.get("exif", b""))
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # an EXIF block that cannot be parsed says nothing about the pixels, which are whole
        return 1
