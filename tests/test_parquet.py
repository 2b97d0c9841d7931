"""Parquet files, written by pyarrow as the package datasets writes them, become record sets."""

import json

import cv2
import numpy as np
import pytest

from dataset import FaceRecordDataset
from tools.rec import commands as rec_tool

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def jpeg(value, suffix=".jpg"):
    return cv2.imencode(suffix, np.full((16, 16, 3), value, np.uint8))[1].tobytes()


IMAGES = [jpeg(10 * n, ".png" if n == 2 else ".jpg") for n in range(7)]


def structs(images):
    return pyarrow.array([{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)])


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def run(*arguments):
    rec_tool.main([str(argument) for argument in arguments] + ["--image-size", "0"])


def test_rows_keep_order_bytes_and_labels(tmp_path):
    labels = [2, 0, 1, 1, 0, 2, 2]
    write(tmp_path / "in" / "train-0.parquet", image=structs(IMAGES[:4]), label=pyarrow.array(labels[:4]))
    write(tmp_path / "in" / "train-1.parquet", image=structs(IMAGES[4:]), label=pyarrow.array(labels[4:]))
    run("pack", tmp_path / "in", tmp_path / "out", "--workers", 3)
    data = FaceRecordDataset(tmp_path / "out")
    assert [data.fetch(i) for i in range(7)] == list(zip(IMAGES, labels, strict=True)) and data.num_classes == 3
    write(tmp_path / "b.parquet", jpg=pyarrow.array(IMAGES), cls=pyarrow.array(labels, pyarrow.int16()))
    run("pack", tmp_path / "b.parquet", tmp_path / "b")
    assert (tmp_path / "b" / "train.rec").read_bytes() == (tmp_path / "out" / "train.rec").read_bytes()


def test_names_and_large_numbers_are_numbered(tmp_path):
    people = ["carl", "anna", "bert", "anna", "carl", "bert", "anna"]
    for name, column in (("a", pyarrow.array(people)), ("d", pyarrow.array(people).dictionary_encode())):
        write(tmp_path / f"{name}.parquet", image=structs(IMAGES), person=column)
        run("pack", tmp_path / f"{name}.parquet", tmp_path / name)
        data = FaceRecordDataset(tmp_path / name)
        assert [data.identities[data.fetch(i)[1]] for i in range(7)] == people == [str(p) for p in people]
    numbers = [10**17, 5, 10**17, 5, 7, 7, 7]
    path = write(tmp_path / "n.parquet", image=structs(IMAGES), label=pyarrow.array(numbers))
    with pytest.raises(SystemExit):
        run("pack", path, tmp_path / "n")
    run("pack", path, tmp_path / "n", "--relabel")
    data = FaceRecordDataset(tmp_path / "n")
    assert [data.fetch(i)[1] for i in range(7)] == [2, 0, 2, 0, 1, 1, 1]
    assert json.loads((tmp_path / "n" / "labels.json").read_text()) == {"identities": [5, 7, 10**17]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": structs(IMAGES)}, "no column label, labels"),
        ({"picture_": structs(IMAGES), "label": pyarrow.array([0] * 7)}, "no column image, img"),
        ({"image": structs([*IMAGES[:5], None, b"x"]), "label": pyarrow.array([0, 1] * 3 + [0])},
         r"row 5: no image bytes"),
        ({"image": structs([*IMAGES[:6], b"x"]), "label": pyarrow.array([0, 1] * 3 + [0])}, r"row 6: 1 bytes"),
        ({"image": structs(IMAGES), "label": pyarrow.array([0, None] * 3 + [0])}, "row 1: no label"),
        ({"image": structs(IMAGES), "label": pyarrow.array([0.5] * 7)}, "holds double; whole numbers or names"),
        ({"image": structs(IMAGES), "label": pyarrow.array([0, 1, 2, -1, 0, 0, 0])}, "label -1 is no class number"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, capsys, columns, message):
    import re

    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(SystemExit):
        run("pack", path, tmp_path / "out")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a.parquet: " in error and re.search(message, error), error
    assert not (tmp_path / "out" / "train.rec").exists()


def test_no_parquet(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit):
        run("pack", tmp_path / "a.parquet", tmp_path / "out")
    assert "a.parquet: not a Parquet file" in capsys.readouterr().err
