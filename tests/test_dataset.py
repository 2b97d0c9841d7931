"""The other sources: folder, list, CelebA, MNIST, synthetic; and the dictionary of kinds."""

import gzip
import pickle

import cv2
import numpy as np
import pytest

import dataset
from dataset import SOURCES, FolderDataset, build_source, build_train_loader
from utils.errors import UserError


def picture(seed, height=16, width=16):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height))


def save(path, seed, height=16, width=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture(seed, height, width)[:, :, ::-1])


def make_folder(root):
    for seed, name in enumerate(("bert/2.png", "bert/10.png", "anna/x.png", "carl/a.png", "carl/b.PNG")):
        save(root / name, seed)
    (root / "empty").mkdir()
    (root / "anna" / "notes.txt").write_text("not an image")
    return root


def test_folder(tmp_path):
    data = build_source("folder", root=make_folder(tmp_path))
    assert data.identities == ["anna", "bert", "carl"] and data.num_classes == 3
    assert data.labels.tolist() == [0, 1, 1, 2, 2] and data.keys.tolist() == [0, 1, 2, 3, 4]
    image, label = data[0]
    assert label == 0 and np.array_equal(image, picture(2))
    assert data.path(1).name == "10.png" and "bert" in data.describe(1)


def test_list(tmp_path):
    make_folder(tmp_path / "images")
    lines = ["images/anna/x.png 4", "images/bert/2.png\t0", "", "images/carl/a.png   4"]
    (tmp_path / "train.lst").write_text("\n".join(lines))  # no newline at the end
    data = build_source("list", list_file=tmp_path / "train.lst")
    assert data.labels.tolist() == [4, 0, 4] and data.num_classes == 5
    assert np.array_equal(data[1][0], picture(0)) and np.array_equal(data[2][0], picture(3))
    save(tmp_path / "images" / "with blank.png", 9)
    (tmp_path / "b.lst").write_text("with blank.png 1\n")
    data = build_source("list", list_file=tmp_path / "b.lst", root=tmp_path / "images")
    assert np.array_equal(data[0][0], picture(9))


def test_images_that_a_list_names_in_vain(tmp_path):
    """Told before anything is read: list, line, path, how many, and the folder that paths start from."""
    make_folder(tmp_path / "faces")
    (tmp_path / "a.lst").write_text("anna/x.png 0\n\nx/1.png 1\nbert/2.png 0\nx/2.png 1\n")
    with pytest.raises(
        UserError, match=r"a\.lst: line 3: .*faces/x/1\.png: no such file, as 2 of 4 .* set data\.root="
    ):
        build_source("list", list_file=tmp_path / "a.lst", root=tmp_path / "faces")
    (tmp_path / "b.lst").write_text("anna/x.png 0\nbert 1\n")
    with pytest.raises(UserError, match=r"b\.lst: line 2: .*faces/bert: no such file, as 1 of 2 "):
        build_source("list", list_file=tmp_path / "b.lst", root=tmp_path / "faces")


def test_of_a_long_list_a_sample_is_looked_for(tmp_path, monkeypatch):
    """A folder that is gone is found; one that goes later is told by the read."""
    monkeypatch.setattr(dataset, "FILES_CHECKED", 10)
    monkeypatch.setattr(dataset, "FILES_AT_ONCE", 3)
    make_folder(tmp_path / "faces")
    there, gone = ["anna/x.png 0"] * 95, ["x/1.png 1"] * 9
    (tmp_path / "a.lst").write_text("\n".join([*there, *gone, *there]))
    with pytest.raises(UserError, match=r"a\.lst: line 101: .*no such file, as 1 of 10 "):
        build_source("list", list_file=tmp_path / "a.lst", root=tmp_path / "faces")
    (tmp_path / "b.lst").write_text("\n".join([*there, "x/1.png 1"]))
    data = build_source("list", list_file=tmp_path / "b.lst", root=tmp_path / "faces")
    with pytest.raises(UserError, match=r"faces/x/1\.png: no such file, but .*b\.lst lists it; .* set data\.root="):
        data[95]


def test_celeba(tmp_path):
    (tmp_path / "identity_CelebA.txt").write_text("000001.jpg 2880\n000002.jpg 17\n000003.jpg 2880\n")
    for n in (1, 2, 3):
        save(tmp_path / "img_align_celeba" / f"{n:06d}.jpg", n, 218, 178)
    data = build_source("celeba", root=tmp_path)
    assert data.labels.tolist() == [1, 0, 1] and data.num_classes == 2 and data.identities.tolist() == [17, 2880]
    assert data[0][0].shape == (218, 178, 3)
    with pytest.raises(UserError, match="218x178, 112x112 expected"):
        next(iter(build_train_loader(data, 3)))
    assert next(iter(build_train_loader(data, 3, resize="crop")))[0].shape == [3, 3, 112, 112]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_mnist(tmp_path, packed, dot):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    for name, array in ((f"train-images{dot}idx3-ubyte", images), (f"train-labels{dot}idx1-ubyte", labels)):
        data = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        path = tmp_path / (name + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(data) if packed else data)
    source = build_source("mnist", root=tmp_path)
    assert len(source) == 5 and source.num_classes == 10
    for i in range(5):
        image, label = source[i]
        assert label == labels[i] and np.array_equal(image, np.repeat(images[i][:, :, None], 3, axis=2))
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        build_source("mnist", root=tmp_path, split="test")
    with pytest.raises(UserError, match="'val'"):
        build_source("mnist", root=tmp_path, split="val")


def test_damaged_mnist(tmp_path):
    header = bytes((0, 0, 8, 3)) + np.array([2, 28, 28], ">i4").tobytes()
    for data in (header + bytes(100), header[:9], b"text"):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
        with pytest.raises(UserError, match="train-images-idx3-ubyte"):
            build_source("mnist", root=tmp_path)


def test_synthetic():
    data = build_source("synthetic", num_classes=7, num_images=30, image_size=20, seed=3)
    again = build_source("synthetic", num_classes=7, num_images=30, image_size=20, seed=3)
    other = build_source("synthetic", num_classes=7, num_images=30, image_size=20, seed=4)
    for i in range(30):
        image, label = data[i]
        assert image.shape == (20, 20, 3) and image.dtype == np.uint8 and label == i % 7
        assert np.array_equal(image, again[i][0]) and not np.array_equal(image, other[i][0])

    def distance(a, b):
        return np.abs(data[a][0].astype(int) - data[b][0].astype(int)).mean()

    assert max(distance(0, 7), distance(1, 15)) < 20 < min(distance(0, 1), distance(2, 3))  # classes can be learnt
    assert not np.array_equal(data[0][0], data[7][0])
    assert len(build_source("synthetic", num_classes=10**6, num_images=10**7)) == 10**7


def test_sources_travel(tmp_path):
    data = pickle.loads(pickle.dumps(FolderDataset(make_folder(tmp_path))))
    assert np.array_equal(data[0][0], picture(2))


def test_errors_are_named(tmp_path):
    with pytest.raises(UserError, match="'tape' is not one of rec, folder"):
        build_source("tape")
    with pytest.raises(UserError, match=r"data\.kind folder: .*'rot'"):
        build_source("folder", rot=tmp_path)
    with pytest.raises(UserError, match="no images"):
        build_source("folder", root=tmp_path)
    with pytest.raises(FileNotFoundError):
        build_source("folder", root=tmp_path / "none")
    (tmp_path / "a.lst").write_text("a.png 1\nb.png one\n")
    with pytest.raises(UserError, match=r"a\.lst: line 2: 'b.png one'"):
        build_source("list", list_file=tmp_path / "a.lst")
    save(tmp_path / "a" / "x.jpg", 0)
    cut = tmp_path / "a" / "x.jpg"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"x\.jpg: damaged JPEG"):
        build_source("folder", root=tmp_path)[0]
    with pytest.raises(UserError, match="num_classes=0"):
        build_source("synthetic", num_classes=0, num_images=5)
    assert set(SOURCES) >= {"rec", "folder", "list", "celeba", "mnist", "synthetic"}
