"""Labels that are no class numbers are refused at the start or numbered anew; several sets are one."""

import json
import pickle

import cv2
import numpy as np
import pytest

from dataset import FaceRecordDataset, build_source, build_train_loader, check_labels, count_classes, save_identities
from mxnet_reader import recordio
from tools.rec import commands as rec_tool
from utils.data import labels as labels_module
from utils.data.labels import Relabelled, copy_identities
from utils.errors import UserError


def jpeg(value):
    return cv2.imencode(".jpg", np.full((16, 16, 3), value % 256, np.uint8))[1].tobytes()


def make_list(folder, labels, line="{path}\t{label}"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, label in enumerate(labels):
        (folder / f"{n}.jpg").write_bytes(jpeg(9 * n))
        lines.append(line.format(path=f"{n}.jpg", label=label, n=n))
    (folder / "a.lst").write_text("\n".join(lines) + "\n")
    return folder / "a.lst"


def make_rec(folder, labels, declared=None, as_arrays=False):
    folder.mkdir(parents=True)
    writer = recordio.MXIndexedRecordIO(folder / "train.idx", folder / "train.rec", "w")
    for key, label in enumerate(labels):
        label = [float(label), 1.0] if as_arrays else float(label)
        writer.write_idx(key, recordio.pack(recordio.IRHeader(0, label, key, 0), jpeg(9 * key)))
    writer.close()
    if declared is not None:
        (folder / "property").write_text(f"{declared},16,16\n")
    return folder


GAPS = {
    "gaps": ([0, 1000, 2000], r"labels from 0 to 2000 \(3 different ones\); that is 2001 classes"),
    "from one": ([1, 2, 3, 4, 5], r"labels from 1 to 5 .*labels start at 0"),
    "card numbers": ([110101199003070000, 110101199003070001], "labels from 110101199003070000 to"),
    "longer": ([0, 12345678901234567890123], "labels from 0 to 12345678901234567890123"),
    "many": ([0, 69003071], "that is 69003072 classes"),
    "one": ([0, 0, 0], "all 3 images have one label"),
}


@pytest.mark.parametrize("kind", GAPS)
def test_labels_of_lists(tmp_path, kind):
    labels, message = GAPS[kind]
    path = make_list(tmp_path, labels)
    source = build_source("list", list_file=path)
    with pytest.raises(UserError, match=message) as caught:
        count_classes(source, path, None)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(str(path)) and ("data.relabel=true" in said or kind == "one")
    renumbered = build_source("list", list_file=path, relabel=True)
    assert count_classes(renumbered, path, None) == len(set(labels))
    assert renumbered.identities == sorted(set(labels))
    assert [renumbered.identities[label] for _, label in renumbered.fetch_many(np.arange(len(labels)))] == labels
    assert [renumbered[i][1] for i in range(len(labels))] == [sorted(set(labels)).index(label) for label in labels]
    again = pickle.loads(pickle.dumps(renumbered))
    assert again.fetch(0) == renumbered.fetch(0)


def test_what_is_fine_or_meant(tmp_path):
    good = build_source("list", list_file=make_list(tmp_path / "a", [2, 0, 1, 1]))
    assert count_classes(good, "a", None) == 3 and good.labels.tolist() == [2, 0, 1, 1]
    gaps = build_source("list", list_file=make_list(tmp_path / "b", [0, 2]))
    assert count_classes(gaps, "b", 3) == 3  # asked for: one class without images
    with pytest.raises(UserError, match=r"label 2 of record 1 is not in \[0, 2\)"):
        count_classes(gaps, "b", 2)
    with pytest.raises(UserError, match=r"data\.num_classes: 9, but the data \(a, b\) has 3 identities"):
        count_classes(good, ("a", "b"), 9)
    with pytest.raises(UserError, match=r"b: labels from 0 to 2 .*data\.relabel=true"):
        count_classes(gaps, "b", 85742)  # what a recipe says about its own data


@pytest.mark.parametrize("as_arrays", [False, True])
def test_labels_of_records(tmp_path, as_arrays):
    data = FaceRecordDataset(make_rec(tmp_path / "a", [1, 2, 3, 4, 5], 5, as_arrays))
    assert data.read_labels().tolist() == [1, 2, 3, 4, 5] and data.read_labels(np.array([3])).tolist() == [4]
    with pytest.raises(
        UserError, match=r"label 5 of record 4 is not in \[0, 5\).*labels start at 0.*data\.relabel=true"
    ):
        check_labels(data, "a")
    assert count_classes(build_source("rec", root=tmp_path / "a", relabel=True), "a", None) == 5
    data = FaceRecordDataset(make_rec(tmp_path / "b", [0, 1000, 2000], None, as_arrays))
    with pytest.raises(UserError, match="that is 2001 classes"):
        check_labels(data, "b")
    make_rec(tmp_path / "c", [0, 1, 7], 3, as_arrays)
    renumbered = build_source("rec", root=tmp_path / "c", relabel=True)
    loader = build_train_loader(renumbered, 3, image_size=16)
    ((_, label),) = list(loader)
    assert sorted(label.numpy().tolist()) == [0, 1, 2] and renumbered.identities == [0, 1, 7]


def test_a_large_set_is_judged_by_a_sample(tmp_path, monkeypatch):
    """Only what the sample proves is refused; renumbering reads all labels once and keeps them."""
    monkeypatch.setattr("dataset.EXACT", 50)
    monkeypatch.setattr(labels_module, "EXACT", 50)
    monkeypatch.setattr(labels_module, "SAMPLE", 60)
    good = FaceRecordDataset(make_rec(tmp_path / "a", np.arange(400) % 200, 200))
    check_labels(good, "a")
    few = FaceRecordDataset(make_rec(tmp_path / "b", np.arange(400) % 4 * 1000, 3001))
    with pytest.raises(UserError, match=r"in a sample of 60 \(4 different ones\); that is 3001 classes"):
        check_labels(few, "b")
    late = FaceRecordDataset(make_rec(tmp_path / "c", [*([0, 1] * 199), 0, 2], 2))
    with pytest.raises(UserError, match=r"label 2 of record 399"):
        check_labels(late, "c")
    renumbered = Relabelled(few)
    assert renumbered.num_classes == 4 and (tmp_path / "b" / ".train.labels").is_file()
    monkeypatch.setattr(FaceRecordDataset, "_read_labels", None)
    again = FaceRecordDataset(tmp_path / "b")
    assert again.read_labels().tolist() == (np.arange(400) % 4 * 1000).tolist()


@pytest.mark.parametrize("label", [1e30, float("inf"), float("nan"), -1.0, 2.0**62])
def test_labels_that_no_int64_holds(tmp_path, label):
    writer = recordio.MXIndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w")
    writer.write_idx(0, recordio.pack(recordio.IRHeader(0, label, 1, 0), jpeg(1)))
    writer.close()
    data = FaceRecordDataset(tmp_path)
    for read in (data.read_labels, lambda: data[0]):
        with pytest.raises(UserError, match=r"train\.rec: label .* is not a class number.*key 0"):
            read()


def test_labels_of_split_and_damaged_records(tmp_path):
    magic = 0xCED7230A
    payload = recordio.pack(recordio.IRHeader(0, 2.0, magic | magic << 32, 0), jpeg(0))
    bad = recordio.pack(recordio.IRHeader(0, 0.5, 1, 0), jpeg(1))
    writer = recordio.MXIndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w")
    writer.write_idx(0, payload)
    writer.write_idx(1, recordio.pack(recordio.IRHeader(0, 7.0, 1, 0), jpeg(1)))
    writer.write_idx(2, bad)
    writer.close()
    data = FaceRecordDataset(tmp_path)
    assert data.read_labels(np.array([0, 1])).tolist() == [2, 7]
    with pytest.raises(UserError, match=r"train\.rec: label 0\.5 is not a class number.*key 2"):
        data.read_labels()


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("1\ta/x y.jpg\t3\n1\tb.jpg\t0\n", ["a/x y.jpg", "b.jpg"], [3, 0]),  # InsightFace
        ("1\ta.jpg\t3\t0\t0\t112\t112\n", ["a.jpg"], [3]),
        ("0\t3\ta.jpg\n1\t0.000000\tb b.jpg\n", ["a.jpg", "b b.jpg"], [3, 0]),  # im2rec
        ("7\t2.0\t0.5\t1.5\ta.jpg\n", ["a.jpg"], [2]),
        ("a b.jpg\t1\n", ["a b.jpg"], [1]),
        ("a b.jpg 1\r\n\r\nc.jpg   0", ["a b.jpg", "c.jpg"], [1, 0]),
        ("\ufeffa.jpg 1\n", ["a.jpg"], [1]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_of_all_tools(tmp_path, text, names, labels, encoding):
    (tmp_path / "a.lst").write_bytes(text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = build_source("list", list_file=tmp_path / "a.lst")
    assert [str(source.path(i).relative_to(tmp_path)) for i in range(len(source))] == names
    assert source.labels.tolist() == labels


@pytest.mark.parametrize(
    ("line", "message"),
    [("b.jpg -1", "label -1 is no class number"), ("b.jpg 1.5", "'path label' was expected"), ("b.jpg", "'path label'"),
     ("0\tb.jpg\t1", "not aligned"), ("b.jpg nan", "'path label'"), ("1\tb.jpg\t-3", "label -3 is no class number")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.lst").write_text(f"a.jpg 0\n{line}\n")
    with pytest.raises(UserError, match=rf"a\.lst: line 2: .*{message}"):
        build_source("list", list_file=tmp_path / "a.lst")


def test_folders_as_people_have_them(tmp_path):
    for name in ("anna/0.jpg", "anna/1.JPEG", "bert/camera/x.jfif", "bert/camera/y.gif", ".ipynb_checkpoints/0.jpg",
                 "@eaDir/0.jpg", "__MACOSX/anna/0.jpg", "anna/._0.jpg", "lost.jpg", "bert/notes.txt"):  # fmt: skip
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(jpeg(1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.jpg").write_bytes(jpeg(1))
    (tmp_path / "set" / "carl").symlink_to(tmp_path / "other", target_is_directory=True)
    data = build_source("folder", root=tmp_path / "set")
    assert data.identities == ["anna", "bert", "carl"] and data.labels.tolist() == [0, 0, 1, 1, 2]
    passed, deeper = data.notes
    assert "4 hidden (.ipynb_checkpoints)" in passed and "1 images outside of identity folders (lost.jpg)" in passed
    assert "1 files that are no images (bert/notes.txt)" in passed
    assert "2 images lie deeper than <identity>/<image> (bert/camera/x.jfif) and are taken" in deeper
    (tmp_path / "up" / "set" / "anna").mkdir(parents=True)
    (tmp_path / "up" / "set" / "anna" / "0.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match=r"all images lie in folders of one folder; set the root to .*up/set"):
        build_source("folder", root=tmp_path / "up")


def test_property_with_a_mark(tmp_path):
    make_rec(tmp_path / "a", [0, 1])
    (tmp_path / "a" / "property").write_bytes(b"\xef\xbb\xbf2,16,16\r\n")
    assert FaceRecordDataset(tmp_path / "a").num_classes == 2


def test_mapping_is_stored_and_goes_along(tmp_path):
    source = build_source("list", list_file=make_list(tmp_path, [70, 5, 70]), relabel=True)
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    out.mkdir()
    assert copy_identities(run, out) is None  # no run
    (run / "config.yaml").write_text("{}")
    assert copy_identities(run, out) is None  # nothing renumbered
    save_identities(run, source)
    for model in (run, run / "backbone.pdparams", run / "checkpoints" / "step_1" / "head.safetensors"):
        assert copy_identities(model, out) == out / "labels.json"
        assert json.loads((out / "labels.json").read_text()) == {"identities": [5, 70]}
        (out / "labels.json").unlink()


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"), (b"<!DOCTYPE html><html>", "HTML page"),
     (b"\x1f\x8b\x08\x00", "gzip"), (b"", "no image bytes"), (jpeg(3)[:-30], "damaged JPEG")],
)  # fmt: skip
def test_files_that_are_no_images_are_named(tmp_path, data, said):
    path = make_list(tmp_path, [0, 1])
    (tmp_path / "1.jpg").write_bytes(data)
    with pytest.raises(UserError, match=rf"1\.jpg: .*{said}"):
        build_source("list", list_file=path)[1]


def run(*arguments):
    rec_tool.main([str(argument) for argument in arguments])


def test_pack_refuses_and_renumbers(tmp_path, capsys):
    path = make_list(tmp_path / "in", [0, 1000, 2000])
    with pytest.raises(SystemExit):
        run("pack", path, tmp_path / "out", "--image-size", 0)
    error = capsys.readouterr().err
    assert "2001 classes" in error and "give --relabel" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    run("pack", path, tmp_path / "out", "--image-size", 0, "--relabel")
    data = FaceRecordDataset(tmp_path / "out")
    assert data.num_classes == 3 and data.read_labels().tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"identities": [0, 1000, 2000]}
    assert data.identities == [0, 1000, 2000]
    for bad in ("-5", "x", "99999"):
        with pytest.raises(SystemExit):
            run("pack", path, tmp_path / "other", "--image-size", bad)


def test_merge_without_property_and_with_gaps(tmp_path, capsys):
    make_rec(tmp_path / "a", [0, 1, 2], 3)
    make_rec(tmp_path / "b", [0, 1])  # no property: as large as its images, as many classes as its labels
    run("merge", tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    merged = FaceRecordDataset(tmp_path / "ab")
    assert (
        merged.read_labels().tolist() == [0, 1, 2, 3, 4] and merged.num_classes == 5 and merged.image_size == (16, 16)
    )
    make_rec(tmp_path / "c", [1, 2, 9], 10)
    with pytest.raises(SystemExit):
        run("merge", tmp_path / "a", tmp_path / "c", tmp_path / "ac")
    assert "give --relabel" in capsys.readouterr().err
    run("merge", tmp_path / "a", tmp_path / "c", tmp_path / "ac", "--relabel")
    assert FaceRecordDataset(tmp_path / "ac").read_labels().tolist() == [0, 1, 2, 3, 4, 5]
    run("subset", tmp_path / "ac", tmp_path / "s", "--classes", "1,4")
    assert "2 of 6 classes have images" in capsys.readouterr().err
    (tmp_path / "keys.txt").write_bytes("\ufeff1\r\n4\r\n".encode())
    run("subset", tmp_path / "ac", tmp_path / "k", "--keys", tmp_path / "keys.txt", "--relabel")
    assert FaceRecordDataset(tmp_path / "k").read_labels().tolist() == [0, 1]
    assert json.loads((tmp_path / "k" / "labels.json").read_text()) == {"identities": [1, 4]}
