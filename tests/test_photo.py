"""utils/photos/photo.py: every kind of photo file against the pixels it was made of; cut files are refused."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from utils.decode import DecodeError
from utils.errors import UserError
from utils.photos.photo import decode_photo, read_photo, turn_upright


def smooth(height=40, width=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 4)


def encoded(image, kind, mode=None, **options):
    target = io.BytesIO()
    picture = Image.fromarray(image)
    picture = picture.quantize(256) if mode == "P" else picture.convert(mode) if mode else picture
    picture.save(target, kind, **options)
    return target.getvalue()


LOSSLESS = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
            ("WEBP", {"lossless": True})]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), LOSSLESS, ids=str)
def test_lossless_files_give_their_pixels(kind, options):
    np.testing.assert_array_equal(decode_photo(encoded(smooth(), kind, **options)), smooth())


@pytest.mark.parametrize(
    ("kind", "mode", "bound"),
    [("JPEG", None, 3), ("JPEG", "CMYK", 5), ("WEBP", None, 6), ("GIF", None, 12), ("PNG", "P", 12)],
)
def test_lossy_files_are_close_to_their_pixels(kind, mode, bound):
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    found = decode_photo(encoded(smooth(), kind, mode, **options))
    assert np.abs(found.astype(int) - smooth()).mean() < bound


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(kind, orientation):
    """The answer is Pillow's exif_transpose of the same bytes, and for the files without loss numpy's own turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    found = decode_photo(data)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 2  # two JPEG decoders differ by a level
    by_hand = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
               6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    np.testing.assert_array_equal(turn_upright(smooth(), orientation), by_hand[orientation](smooth()))
    if kind != "JPEG":
        np.testing.assert_array_equal(found, by_hand[orientation](smooth()))


def test_a_damaged_exif_block_turns_nothing():
    plain = encoded(smooth(), "JPEG")
    for body in (b"Exif\x00\x00", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00" + bytes(40)):
        block = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
        np.testing.assert_array_equal(decode_photo(plain[:2] + block + plain[2:]), decode_photo(plain))
    for nonsense in (0, 9, -1):
        np.testing.assert_array_equal(turn_upright(smooth(), nonsense), smooth())


def test_grey_and_sixteen_bits():
    grey = smooth()[..., 0]
    deep = grey.astype(np.uint16) * 257
    for pixels in (grey, deep):
        for suffix in (".png", ".tiff"):
            found = decode_photo(cv2.imencode(suffix, pixels)[1].tobytes())
            np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, axis=2))
    colour = cv2.imencode(".png", smooth()[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode_photo(colour), smooth())


def test_transparent_pixels_show_white_whatever_they_hide():
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 20:40], alpha[:, 40:] = 128, 255
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        found = decode_photo(encoded(np.dstack([smooth(), alpha]), kind, **options))
        expected = smooth() * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
        assert np.abs(found - expected).max() <= 1
    picture = Image.fromarray(smooth()).convert("P")
    target = io.BytesIO()
    picture.save(target, "GIF", transparency=picture.getpixel((5, 5)))
    assert (decode_photo(target.getvalue())[5, 5] == 255).all()


@pytest.mark.parametrize(
    ("kind", "options"), [*LOSSLESS, ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("WEBP", {})], ids=str
)
def test_cut_files_are_refused(kind, options):
    whole = encoded(smooth(), kind, **options)
    for share in (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(DecodeError):
            decode_photo(whole[: int(len(whole) * share)])


def test_what_is_no_photo_is_one_line(tmp_path):
    real = np.zeros((8, 8), np.float32)
    Image.fromarray(real).save(tmp_path / "float.tiff")
    (tmp_path / "text.jpg").write_text("no photo")
    for name, told in (("float.tiff", "floating-point pixels"), ("text.jpg", "starting with 6e6f2070")):
        with pytest.raises(UserError, match=f"{name}: not an image that can be decoded .*{told}"):
            read_photo(tmp_path / name)
