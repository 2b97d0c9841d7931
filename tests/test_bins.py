"""Verification sets: every writer's dialect reads alike; what is no set says so."""

import gzip
import pickle

import cv2
import numpy as np
import pytest

from eval.bins import load_bin, read_bin, save_bin
from utils.errors import UserError

SAME = [True, False, True]


def picture(seed, size=(24, 20)):
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def encode(image, suffix=".png"):
    return cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image)[1]


IMAGES = np.stack([picture(seed) for seed in range(6)])
ENCODED = [encode(image) for image in IMAGES]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_dialects(tmp_path, protocol):
    """Bytes, arrays (n, 1) and (n,) of cv2.imencode, labels as bools or numbers; PNG pixels are exact RGB."""
    path = tmp_path / "a.bin"
    for bins in (
        [image.tobytes() for image in ENCODED],
        [image.reshape(-1, 1) for image in ENCODED],
        [image.reshape(-1) for image in ENCODED],
        tuple(image.tobytes() for image in ENCODED),
    ):
        for flags in (SAME, [1, 0, 1], tuple(SAME)):
            path.write_bytes(pickle.dumps((bins, flags), protocol))
            images, same_P = load_bin(path)
            assert images.dtype == np.uint8 and np.array_equal(images, IMAGES)
            assert same_P.dtype == bool and same_P.tolist() == SAME


@pytest.mark.parametrize("kind", [bool, np.int8, np.int64, np.uint8, np.float32, np.float64])
def test_numpy_labels(tmp_path, kind):
    """Arrays of flags, lists of numpy scalars, and -1 for two people where the kind has it."""
    minus = [1, -1, 1] if np.dtype(kind).kind in "if" else [1, 0, 1]
    images = [image.tobytes() for image in ENCODED]
    for flags in (np.array(SAME, kind), [kind(flag) for flag in SAME], np.array(minus, kind), minus):
        (tmp_path / "a.bin").write_bytes(pickle.dumps((images, flags), 2))
        assert read_bin(tmp_path / "a.bin")[1].tolist() == SAME
    (tmp_path / "a.bin").write_bytes(pickle.dumps((images, np.array([1.0, 0.5, 1.0])), 2))
    with pytest.raises(UserError, match=r"the label of pair 1 is .*0\.5"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (gzip.compress(b"x" * 100, mtime=0), "gzip"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (bytes(600), "zeros"),
    ],
)
def test_files_of_another_kind_are_named_for_what_they_are(tmp_path, content, told):
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"lfw\.bin.*{told}") as caught:
        read_bin(tmp_path / "lfw.bin")
    assert "\n" not in str(caught.value)


def test_save_and_read_back(tmp_path):
    save_bin(tmp_path / "a.bin", [image.tobytes() for image in ENCODED], SAME)
    encoded, same_P = read_bin(tmp_path / "a.bin")
    assert encoded == [image.tobytes() for image in ENCODED] and same_P.tolist() == SAME
    assert pickle.loads((tmp_path / "a.bin").read_bytes()) == (encoded, SAME)  # what every other reader does
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(ValueError, match="5 images for 3 pairs"):
        save_bin(tmp_path / "b.bin", encoded[:5], SAME)


def test_jpeg_grey_and_sizes(tmp_path):
    grey = np.full((24, 20), 77, np.uint8)
    jpeg = encode(picture(0), ".jpg").tobytes()
    save_bin(tmp_path / "a.bin", [jpeg, encode(grey, ".jpg").tobytes()], [False])
    images, _ = load_bin(tmp_path / "a.bin")
    assert np.array_equal(images[0], cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[:, :, ::-1])
    assert np.abs(images[1].astype(int) - 77).max() <= 1
    save_bin(tmp_path / "b.bin", [jpeg, encode(picture(1, (30, 30))).tobytes()], [False])
    with pytest.raises(UserError, match=r"b\.bin: image 1 is \(30, 30\), image 0 is \(24, 20\)"):
        load_bin(tmp_path / "b.bin")
    assert load_bin(tmp_path / "b.bin", size=(16, 12))[0].shape == (2, 16, 12, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([b"x"], "a pair"),
        (b"bytes", "a pair"),
        (([b"x", b"y"], [True], [True]), "a pair"),
        ((b"xy", [True]), "a list of images"),
        (([b"x", b"y"], True), "a list of pair labels"),
        (([b"x", b"y", b"z"], [True]), "3 images for 1 pairs"),
        (([], []), "no pairs"),
        (([b"x", b"y"], [2]), "label of pair 0 is 2"),
        (([b"x", 7], [True]), "image 1 is a int"),
        (([b"x", b"y"], [True]), r"image 0 \(pair 0\)"),
    ],
)
def test_what_is_no_set(tmp_path, value, message):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=rf"a\.bin: .*{message}"):
        load_bin(tmp_path / "a.bin")


def test_cut_image_is_named(tmp_path):
    jpeg = encode(picture(0), ".jpg").tobytes()
    save_bin(tmp_path / "a.bin", [jpeg, jpeg, jpeg, jpeg[:-40]], [True, False])
    with pytest.raises(UserError, match=r"a\.bin: image 3 \(pair 1\): damaged JPEG"):
        load_bin(tmp_path / "a.bin")


def test_empty_and_missing_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        load_bin(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError):
        load_bin(tmp_path / "none.bin")
