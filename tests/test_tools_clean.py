"""tools/clean.py as a command: record sets and folders in, CSV files, key list and page out."""

import csv
import itertools
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset import FaceRecordDataset
from eval.bins import save_bin
from mxnet_reader import recordio
from tests.eval_data import ProjectionEmbedder, faces, write_ijb
from tools.clean import against, command, reading
from tools.rec import commands as rec
from tools.sources import open_source
from utils.errors import UserError

COLUMNS = {
    "outliers.csv": "key,label,nearest,cos_own,cos_nearest",
    "same_person.csv": "label_a,label_b,cos",
    "several_people.csv": "label,parts,cos",
    "duplicates.csv": "key_a,key_b,cos",
    "overlap.csv": "label,set,image,cos",
}


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def network():
    """What the stand-in network embeds well: no constant part, as a trained one has none."""
    embedder = ProjectionEmbedder()
    embedder.matrix = np.random.default_rng(5).normal(size=(432, 48))
    embedder.embedding_size = 48
    return embedder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, network):
    monkeypatch.setattr(command, "load_embedder", lambda *args, **kwargs: network)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Twenty labels of eight images: key 40 + 3 k; and what is wrong with them."""
    folder = tmp_path_factory.mktemp("data set.x")
    images, person = faces(21, 8, noise=45)
    label = person.copy()
    label[person == 20] = 19  # 19 holds two people
    label[4:8] = 20  # person 0 under the labels 0 and 20
    label[25], label[90] = 7, 2  # persons 3 and 11
    images[33] = images[39]  # the same picture twice
    images[50] = images[48][:, ::-1]  # and mirrored
    keys = 40 + 3 * np.arange(len(images))
    order = np.random.default_rng(0).permutation(len(images))
    record = recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    for i in order.tolist():
        header = recordio.IRHeader(0, float(label[i]), int(keys[i]), 0)
        record.write_idx(int(keys[i]), recordio.pack(header, png(images[i])))
    record.close()
    (folder / "property").write_text("21,112,112\n")
    return folder, images, keys


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments):
    command.main([str(argument) for argument in arguments])


def fail(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 1 and len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    """A .bin set: new pictures of persons 5 and 6 of the data set, and people that are not in it."""
    images, person = faces(21, 12, noise=45)
    mine = [k for k in range(len(images)) if person[k] in (5, 6)]
    strangers, _ = faces(6, 4, noise=45, seed=44)
    pictures = [images[k] for k in mine[8:12] + mine[20:24]] + list(strangers)
    groups = [range(first, first + 4) for first in range(0, len(pictures), 4)]
    same = [(a, b) for group in groups for a, b in itertools.pairwise(group)]
    other = [(group[0], groups[k - 1][1]) for k, group in enumerate(groups)]
    path = tmp_path_factory.mktemp("test") / "t set.bin"
    pairs = same + other
    save_bin(path, [png(pictures[k]) for pair in pairs for k in pair], [True] * len(same) + [False] * len(other))
    return path


def test_everything_is_found(planted, test_set, tmp_path, capsys):
    folder, _, keys = planted
    output = tmp_path / "out put"
    run(folder, "--model", "m", "--output", output, "--shown", "3")
    told = capsys.readouterr().out
    for name, columns in COLUMNS.items():
        assert (output / name).read_text().splitlines()[0] == columns
    outliers = read(output / "outliers.csv")
    assert {(int(row["key"]), row["label"], row["nearest"]) for row in outliers} == {
        (int(keys[25]), "7", "3"), (int(keys[90]), "2", "11")
    }  # fmt: skip
    assert all(float(row["cos_nearest"]) > float(row["cos_own"]) for row in outliers)
    assert [(row["label_a"], row["label_b"]) for row in read(output / "same_person.csv")] == [("0", "20")]
    assert [(row["label"], row["parts"]) for row in read(output / "several_people.csv")] == [("19", "2")]
    parts = read(output / "parts.csv")
    assert {int(row["key"]) for row in parts if row["part"] == "2"} in (
        set(keys[152:160].tolist()),
        set(keys[160:].tolist()),
    )
    pairs = {tuple(sorted((int(row["key_a"]), int(row["key_b"])))) for row in read(output / "duplicates.csv")}
    assert pairs == {(int(keys[33]), int(keys[39])), (int(keys[48]), int(keys[50]))}
    assert not read(output / "overlap.csv")
    assert "2 images closer to another identity, 1 pairs" in told
    kept = {int(line) for line in (output / "keep.txt").read_text().split()}
    assert len(kept) == len(keys) - 2 - 4 - 8 - 2 and not kept & {int(keys[25]), int(keys[90])}
    assert len(kept & {int(keys[33]), int(keys[39])}) == 1
    page = (output / "page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 + 1 + 1 + 2 and "data:image/jpeg;base64," in page and "http" not in page
    rec.main(["subset", str(folder), str(tmp_path / "clean"), "--keys", str(output / "keep.txt"), "--relabel"])
    assert len(FaceRecordDataset(tmp_path / "clean")) == len(kept)


def test_the_images_are_read_once(planted, tmp_path, monkeypatch, network):
    folder, _, keys = planted
    reads = []
    get_item = FaceRecordDataset.__getitem__
    monkeypatch.setattr(FaceRecordDataset, "__getitem__", lambda self, i: (reads.append(i), get_item(self, i))[1])
    run(folder, "--model", "m", "--output", tmp_path / "o", "--shown", "0")
    assert sorted(reads) == list(range(len(keys)))
    before, reads[:] = network.calls, []
    run(folder, "--model", "m", "--output", tmp_path / "o", "--shown", "0")  # nothing is embedded again
    assert not reads and network.calls == before


def test_an_interrupted_reading_goes_on(planted, tmp_path, monkeypatch):
    folder, _, keys = planted
    monkeypatch.setitem(reading.embed_to_file.__kwdefaults__, "chunk", 50)
    failing = ProjectionEmbedder(fail_after=3)
    failing.matrix, failing.embedding_size = np.random.default_rng(5).normal(size=(432, 48)), 48
    monkeypatch.setattr(command, "load_embedder", lambda *args, **kwargs: failing)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "--model", "m", "--output", tmp_path / "o")
    failing.fail_after, failing.calls = None, 0
    run(folder, "--model", "m", "--output", tmp_path / "o")
    assert 0 < failing.calls <= 2 * (len(keys) // 50)  # one chunk of four was done
    run(folder, "--model", "m", "--output", tmp_path / "p")
    assert (tmp_path / "o/outliers.csv").read_text() == (tmp_path / "p/outliers.csv").read_text()
    assert (tmp_path / "o/keep.txt").read_text() == (tmp_path / "p/keep.txt").read_text()


def test_test_sets_of_every_kind(planted, test_set, tmp_path, capsys):
    folder, images, keys = planted
    everybody, person = faces(21, 12, noise=45)
    album = tmp_path / "al,bum"
    for k in np.flatnonzero(np.isin(person, (8,))).tolist()[8:]:
        path = album / "some body.1" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(everybody[k]))
    (album / "copy.png").write_bytes(png(images[100]))  # one of the data set's own pictures
    write_ijb(tmp_path / "IJBX", target="ijbx")
    run(folder, "--model", "m", "--output", tmp_path / "o", "--against", album, f"{test_set},{tmp_path / 'IJBX'}")
    rows = read(tmp_path / "o/overlap.csv")
    found = {(row["label"], row["set"]) for row in rows}
    assert ("12", "al,bum") in found  # the copy: person 100 // 8
    copy = next(row for row in rows if row["image"] == "copy.png")
    assert float(copy["cos"]) > 0.5
    own = {label for label, name in found if name == "t set.bin"}
    assert own <= {"5", "6"}
    kept = {int(line) for line in (tmp_path / "o/keep.txt").read_text().split()}
    assert not kept & set(keys[96:104].tolist())
    run(folder, "--model", "m", "--output", tmp_path / "o", "--against", album, "--drop", "outliers")
    kept = {int(line) for line in (tmp_path / "o/keep.txt").read_text().split()}
    assert len(kept) == len(keys) - 2


def test_images_of_a_bin_set_count_once(tmp_path):
    images, _ = faces(3, 2)
    encoded = [png(image) for image in images]
    pairs = [(0, 1, True), (1, 0, True), (2, 3, True), (0, 4, False), (5, 2, False)]
    save_bin(tmp_path / "x.bin", [encoded[k] for a, b, _ in pairs for k in (a, b)], [same for _, _, same in pairs])
    found = against.open_test_set(tmp_path / "x.bin", "x")
    assert list(found.names_M) == [["0", "3", "6"], ["1", "2"], ["4", "9"], ["5"], ["7"], ["8"]]
    assert found.person_M[0] == found.person_M[1] and found.person_M[2] == found.person_M[3]
    assert len(set(found.person_M.tolist())) == 4
    np.testing.assert_array_equal(found.get(2, 112), images[2])


def test_templates_of_one_subject_are_one_person(tmp_path):
    content = write_ijb(tmp_path / "I", target="i")
    found = against.open_test_set(tmp_path / "I", "I")
    person = content["template"] // 1000
    same = found.person_M[:, None] == found.person_M[None]
    np.testing.assert_array_equal(same, person[:, None] == person[None])


def test_folders_and_lists(planted, tmp_path, capsys):
    folder, _, _ = planted
    rec.main(["unpack", str(folder), str(tmp_path / "faces")])
    run(tmp_path / "faces", "--model", "m", "--output", tmp_path / "o")
    rows = read(tmp_path / "o/outliers.csv")
    assert {(row["label"], row["nearest"]) for row in rows} == {("7", "3"), ("2", "11")}
    source = open_source(tmp_path / "faces")
    assert {int(row["key"]) for row in rows} <= set(source.keys.tolist())
    lines = [f"{source.path(i).relative_to(tmp_path)} {source.labels[i]}" for i in range(len(source))]
    (tmp_path / "all.lst").write_text("\n".join(lines))
    run(tmp_path / "all.lst", "--model", "m", "--output", tmp_path / "p")
    assert read(tmp_path / "p/outliers.csv") == rows


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_utf8(tmp_path):
    images, person = faces(3, 4)
    for k, image in enumerate(images):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/faces/Jos\xe9%d" % person[k]))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / os.fsdecode(b"\xe9%d.png" % k)).write_bytes(png(image))
    run(tmp_path / "faces", "--model", "m", "--output", tmp_path / "o", "--against", tmp_path / "faces")
    assert len(read(tmp_path / "o" / "overlap.csv")) == 12


def test_bad_input_is_one_line(planted, tmp_path, capsys):
    folder, images, _ = planted
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/faces.rec").write_bytes(b"")
    (tmp_path / "wide/a").mkdir(parents=True)
    (tmp_path / "wide/a/1.png").write_bytes(png(images[0][:90]))
    (tmp_path / "bad/a").mkdir(parents=True)
    (tmp_path / "bad/a/1.png").write_bytes(png(images[0])[:-30])
    (tmp_path / "bad.bin").write_bytes(b"\x80\x04N.")
    before = sorted(path.name for path in tmp_path.iterdir())
    usual = ["--model", "m", "--output", tmp_path / "o"]
    for arguments, told in (
        ([tmp_path / "nowhere", *usual], "nowhere: no such data set"),
        ([tmp_path / "empty", *usual], "empty: no images in its folders"),
        ([tmp_path / "other", *usual], "give --prefix faces"),
        ([tmp_path / "wide", *usual], "1.png: 112x90 pixels; square aligned crops were expected, give --resize"),
        ([tmp_path / "bad", *usual], "1.png: PNG"),
        ([folder, "--model", "m", "--output", tmp_path / "file"], "file: is a file; name a folder"),
        ([folder, *usual, "--drop", "outlier"], "--drop 'outlier': choose from"),
        ([folder, *usual, "--against", tmp_path / "none.bin"], "none.bin"),
        ([folder, *usual, "--against", tmp_path / "bad.bin"], "bad.bin: holds a NoneType"),
        ([folder, *usual, "--against", tmp_path / "nothing"], "nothing: no such file or folder"),
        ([folder, *usual, "--against", tmp_path / "empty"], "empty: no images in it"),
    ):
        assert told in fail(capsys, *arguments), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_label_that_is_none(tmp_path):
    class Negative:
        keys = np.arange(2)

        def __len__(self):
            return 2

        def describe(self, i):
            return f"sample {i}"

        def __getitem__(self, i):
            return np.zeros((112, 112, 3), np.uint8), -1

    with pytest.raises(UserError, match="label -1; class numbers"):
        reading.read_source(Negative(), tmp_path, ProjectionEmbedder(), tmp_path / "o")
