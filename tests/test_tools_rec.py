"""tools/rec.py and tools/bin.py: what goes in comes out, damage is reported, outputs are whole or absent."""

import json

import cv2
import numpy as np
import pytest

from dataset import FaceRecordDataset
from eval.bins import load_bin, read_bin, save_bin
from mxnet_reader import recordio
from tests.mxnet_peer import ask_mxnet, needs_mxnet
from tools import bin as bin_tool
from tools.rec import commands as rec_tool

COUNTS = (3, 1, 2, 4)


def jpeg(seed, size=112, suffix=".jpg"):
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(small, (size, size)))[1].tobytes()


@pytest.fixture
def faces(tmp_path):
    root, seed = tmp_path / "faces", 0
    for person, count in enumerate(COUNTS):
        (root / f"p{person}").mkdir(parents=True)
        for image in range(count):
            suffix = ".png" if seed == 4 else ".jpg"
            (root / f"p{person}" / f"{image}{suffix}").write_bytes(jpeg(seed, suffix=suffix))
            seed += 1
    return root


def run(tool, *arguments):
    tool.main([str(argument) for argument in arguments])


def files_of(root):
    return [path.read_bytes() for path in sorted(root.rglob("*.*")) if path.name != "pairs.txt"]


def test_pack_keeps_bytes_and_unpack_gives_them_back(tmp_path, faces):
    run(rec_tool, "pack", faces, tmp_path / "out", "--workers", 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["property", "train.idx", "train.rec"]
    assert (tmp_path / "out" / "property").read_text() == "4,112,112\n"
    data = FaceRecordDataset(tmp_path / "out")
    assert data.keys.tolist() == list(range(1, 11)) and data.has_header and data.num_classes == 4
    assert [data.fetch(i) for i in range(10)] == list(zip(files_of(faces), np.repeat(range(4), COUNTS), strict=True))
    run(rec_tool, "unpack", tmp_path / "out", tmp_path / "un")
    names = sorted(str(path.relative_to(tmp_path / "un")) for path in (tmp_path / "un").rglob("*.*"))
    assert names[0] == "000000/00000001.jpg" and names[-1] == "000003/00000010.jpg" and len(names) == 10
    assert files_of(tmp_path / "un") == files_of(faces)


@needs_mxnet
def test_packed_set_in_the_real_mxnet(tmp_path, faces):
    """The header and identity records are where InsightFace's loaders look for them."""
    run(rec_tool, "pack", faces, tmp_path / "out")
    found = dict(ask_mxnet("read", str(tmp_path / "out" / "train.rec"), str(tmp_path / "out" / "train.idx")))
    (flag, label, *_), (_, first, *_) = ask_mxnet("unpack", [found[0], found[11]])
    assert flag == 2 and label.tolist() == [11, 15] and first.tolist() == [1, 4]
    assert sorted(found) == list(range(15))


def test_pack_resumes(tmp_path, faces, monkeypatch):
    """Interrupted after a few records: the second run goes on, and the result is what one run gives."""
    run(rec_tool, "pack", faces, tmp_path / "whole")
    monkeypatch.setattr("tools.rec.write.FLUSH_EVERY", 2)
    prepare, seen = rec_tool._prepare, []

    def interrupted(source, i, *options):
        if i == 7:
            raise KeyboardInterrupt
        return prepare(source, i, *options)

    monkeypatch.setattr(rec_tool, "_prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(rec_tool, "pack", faces, tmp_path / "out", "--workers", 1)
    assert not (tmp_path / "out" / "train.rec").exists()
    assert len((tmp_path / "out" / "train.idx.partial").read_text().splitlines()) in (6, 7)

    def counted(source, i, *options):
        seen.append(i)
        return prepare(source, i, *options)

    monkeypatch.setattr(rec_tool, "_prepare", counted)
    run(rec_tool, "pack", faces, tmp_path / "out", "--workers", 1)
    assert min(seen) in (6, 7)
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_pack_of_other_sizes(tmp_path, faces, capsys):
    (faces / "p0" / "0.jpg").write_bytes(jpeg(0, 130))
    with pytest.raises(SystemExit) as caught:
        run(rec_tool, "pack", faces, tmp_path / "out")
    error = capsys.readouterr().err
    assert caught.value.code == 1 and "130x130, 112x112 expected" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "train.rec").exists()
    run(rec_tool, "pack", faces, tmp_path / "out", "--resize", "stretch")
    assert FaceRecordDataset(tmp_path / "out")[0][0].shape == (112, 112, 3)
    with pytest.raises(SystemExit):
        run(rec_tool, "pack", faces, tmp_path / "out", "--resize", "stretch")
    assert "exists" in capsys.readouterr().err


def test_info_and_verify(tmp_path, faces, capsys):
    run(rec_tool, "pack", faces, tmp_path / "out")
    capsys.readouterr()
    run(rec_tool, "info", tmp_path / "out", "--labels", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["images"], found["classes"]) == (15, 10, 4)
    assert found["labels"] == {"classes": 4, "highest": 3} and found["images_a_class"] == {"least": 1, "most": 4}
    run(rec_tool, "verify", tmp_path / "out")
    assert "0 problems" in capsys.readouterr().out


def test_verify_reports_every_problem(tmp_path, capsys):
    good = jpeg(1)
    header = recordio.IRHeader
    items = [
        recordio.pack(header(0, 0.0, 0, 0), good),
        recordio.pack(header(0, 0.0, 1, 0), good[:-50]),  # cut image
        recordio.pack(header(0, 0.5, 2, 0), good),  # no class
        recordio.pack(header(0, 9.0, 3, 0), good),  # a class too many
        recordio.pack(header(0, 1.0, 4, 0), jpeg(2, 64)),  # another size
        b"short",
        recordio.pack(header(0, 1.0, 6, 0), good),  # its magic is spoiled below
        recordio.pack(header(0, 1.0, 7, 0), good),  # not in the index
        recordio.pack(header(0, 1.0, 8, 0), good),
    ]
    writer = recordio.MXIndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w")
    for key, item in enumerate(items):
        writer.write_idx(key, item)
    writer.close()
    (tmp_path / "property").write_text("2,112,112\n")
    lines = (tmp_path / "train.idx").read_text().splitlines()
    offset = int(lines[6].split("\t")[1])
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[offset] = 0
    (tmp_path / "train.rec").write_bytes(data)
    unknown = lines.pop(7).split("\t")[1]
    lines += ["8\t" + lines[-1].split("\t")[1], "20\t0"]
    (tmp_path / "train.idx").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit) as caught:
        run(rec_tool, "verify", tmp_path)
    output = capsys.readouterr().out
    assert caught.value.code == 1
    for key in (1, 2, 5, 6):
        assert f"key {key})" in output, key
    for part in (
        "label 9, but there are 2 classes",
        "image of 64x64",
        "key 8 occurs 2 times",
        "keys 0 and 20 have one",
    ):
        assert part in output, part
    assert f"is not in the index (offset {unknown})" in output
    assert "key 7)" not in output


def pairs_of(data):
    return sorted((data.fetch(i)[1], data.fetch(i)[0]) for i in range(len(data)))


def test_shuffle_merge_subset(tmp_path, faces, capsys):
    run(rec_tool, "pack", faces, tmp_path / "a")
    a = FaceRecordDataset(tmp_path / "a")
    run(rec_tool, "shuffle", tmp_path / "a", tmp_path / "s", "--seed", 1)
    shuffled = FaceRecordDataset(tmp_path / "s")
    assert shuffled.keys.tolist() == list(range(10)) and not shuffled.has_header
    assert pairs_of(shuffled) == pairs_of(a)
    assert [shuffled.fetch(i) for i in range(10)] != [a.fetch(i) for i in range(10)]
    run(rec_tool, "merge", tmp_path / "a", tmp_path / "s", tmp_path / "m")
    merged = FaceRecordDataset(tmp_path / "m")
    assert merged.num_classes == 8
    assert pairs_of(merged) == sorted(pairs_of(a) + [(label + 4, data) for label, data in pairs_of(a)])
    run(rec_tool, "merge", tmp_path / "a", tmp_path / "s", tmp_path / "shared", "--shared-labels")
    assert pairs_of(FaceRecordDataset(tmp_path / "shared")) == sorted(pairs_of(a) * 2)
    run(rec_tool, "subset", tmp_path / "m", tmp_path / "u", "--classes", "1,3-4", "--relabel")
    subset = FaceRecordDataset(tmp_path / "u")
    assert subset.num_classes == 3
    expected = [({1: 0, 3: 1, 4: 2}[label], data) for label, data in pairs_of(merged) if label in (1, 3, 4)]
    assert pairs_of(subset) == sorted(expected)
    run(rec_tool, "subset", tmp_path / "a", tmp_path / "v", "--max-per-class", 2)
    assert np.bincount([FaceRecordDataset(tmp_path / "v").fetch(i)[1] for i in range(7)]).tolist() == [2, 1, 2, 2]
    (tmp_path / "keys").write_text("3 9\n5\n")
    run(rec_tool, "subset", tmp_path / "a", tmp_path / "k", "--keys", tmp_path / "keys")
    assert pairs_of(FaceRecordDataset(tmp_path / "k")) == sorted(a.fetch(key - 1)[::-1] for key in (3, 5, 9))
    run(rec_tool, "subset", tmp_path / "a", tmp_path / "n", "--num-images", 4)
    assert len(FaceRecordDataset(tmp_path / "n")) == 4
    with pytest.raises(SystemExit):
        run(rec_tool, "subset", tmp_path / "a", tmp_path / "none", "--classes", "77")
    assert "no image" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [rec_tool, bin_tool])
def test_help_has_examples(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    commands = [line for line in capsys.readouterr().out.splitlines() if "python tools/" in line]
    assert len(commands) >= 4
    for command in {line.split()[2] for line in commands}:
        with pytest.raises(SystemExit) as caught:
            tool.main([command, "--help"])
        assert caught.value.code == 0 and "example: python tools/" in capsys.readouterr().out


def test_bin_from_lfw_pairs(tmp_path):
    for person, count in (("Anna_B", 3), ("Carl_D", 2)):
        for number in range(1, count + 1):
            path = tmp_path / "lfw" / person / f"{person}_{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number + len(person)))
    read = {path.name: path.read_bytes() for path in (tmp_path / "lfw").rglob("*.jpg")}
    (tmp_path / "pairs.txt").write_text("10\t1\nAnna_B\t1\t3\nAnna_B\t2\tCarl_D\t1\nCarl_D\t1\t2\n")
    run(bin_tool, "make", tmp_path / "lfw", tmp_path / "a.bin", "--pairs", tmp_path / "pairs.txt")
    encoded, same_P = read_bin(tmp_path / "a.bin")
    names = ["Anna_B_0001", "Anna_B_0003", "Anna_B_0002", "Carl_D_0001", "Carl_D_0001", "Carl_D_0002"]
    assert encoded == [read[f"{name}.jpg"] for name in names] and same_P.tolist() == [True, False, True]
    (tmp_path / "test.txt").write_text(
        "Anna_B/Anna_B_0001.jpg Anna_B/Anna_B_0003.jpg 1\nAnna_B/Anna_B_0002.jpg Carl_D/Carl_D_0001.jpg 0\n"
    )
    run(bin_tool, "make", tmp_path / "lfw", tmp_path / "b.bin", "--pairs", tmp_path / "test.txt")
    assert read_bin(tmp_path / "b.bin")[0] == encoded[:4]


def test_bin_from_a_folder_and_back(tmp_path, faces, capsys):
    run(bin_tool, "make", faces, tmp_path / "a.bin", "--num-pairs", 20)
    encoded, same_P = read_bin(tmp_path / "a.bin")
    person = {path.read_bytes(): path.parent.name for path in faces.rglob("*.*")}
    for pair, flag in enumerate(same_P):
        left, right = encoded[2 * pair : 2 * pair + 2]
        assert left != right and (person[left] == person[right]) == flag
    assert same_P.sum() == 10 and len({tuple(encoded[i : i + 2]) for i in range(0, 40, 2)}) == 20
    run(bin_tool, "unpack", tmp_path / "a.bin", tmp_path / "un")
    run(bin_tool, "make", tmp_path / "un", tmp_path / "b.bin", "--pairs", tmp_path / "un" / "pairs.txt")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    run(bin_tool, "show", tmp_path / "a.bin", tmp_path / "sheet.png", "--num-pairs", 20, "--columns", 5)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[:, :, ::-1]
    images, _ = load_bin(tmp_path / "a.bin")
    assert sheet.shape == (4 * 118, 5 * 230, 3)
    for pair in range(20):
        tile = sheet[pair // 5 * 118 :, pair % 5 * 230 :][:118, :230]
        assert np.array_equal(tile[3:115, 3:115], images[2 * pair])
        assert np.array_equal(tile[3:115, 115:227], images[2 * pair + 1])
        assert (tile[0, 0, 1] > tile[0, 0, 0]) == same_P[pair]  # green for one person
    with pytest.raises(SystemExit):
        run(bin_tool, "make", faces, tmp_path / "c.bin", "--num-pairs", 500)
    assert "pairs of one person" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["Anna 1", "a.jpg b.jpg 2", "no.jpg such.jpg 1"])
def test_bad_pairs(tmp_path, line, capsys):
    (tmp_path / "p.txt").write_text(f"10 300\n{line}\n")
    with pytest.raises(SystemExit):
        run(bin_tool, "make", tmp_path, tmp_path / "a.bin", "--pairs", tmp_path / "p.txt")
    error = capsys.readouterr().err
    assert "p.txt: line 2" in error and error.count("\n") == 1
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "a.bin", "x.png", "--num-pairs", 0], "--num-pairs 0: must be at least 1"),
        (["show", "a.bin", "x.png", "--columns", -2], "--columns -2"),
        (["show", "a.bin", "x.docx"], "x.docx: OpenCV cannot write this kind of picture"),
        (["make", ".", "b.bin", "--image-size", -5], "--image-size -5"),
        (["make", ".", "b.bin", "--quality", 101], "--quality 101: must be from 0 to 100"),
        (["make", ".", "b.bin", "--seed", -1], "--seed -1"),
    ],
)
def test_sizes_and_suffixes_that_make_no_sense(tmp_path, monkeypatch, capsys, arguments, told):
    save_bin(tmp_path / "a.bin", [jpeg(0), jpeg(1)], [True])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(bin_tool, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_nothing_is_left_of_a_pack_without_a_first_image(tmp_path):
    for person in "ab":
        (tmp_path / "faces" / person).mkdir(parents=True)
        (tmp_path / "faces" / person / "0.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(SystemExit):
        rec_tool.main(["pack", str(tmp_path / "faces"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]
