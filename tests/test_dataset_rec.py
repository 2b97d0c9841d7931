"""FaceRecordDataset: every InsightFace layout gives the right image set, and damage ends in a named error."""

import os
import struct
import subprocess
import warnings

import cv2
import numpy as np
import pytest

from dataset import FaceRecordDataset
from mxnet_reader import MissingKeyError, RecordError, recordio
from mxnet_reader.file import RecordFile
from mxnet_reader.format import MAGIC_BYTES, encode_record
from mxnet_reader.index import RecordIndex
from mxnet_reader.insightface import find_layout
from mxnet_reader.rebuild import open_index
from tests.mxnet_peer import PYTHON, ask_mxnet, needs_mxnet

LABELS = [0, 0, 1, 1, 1, 2]
Header = recordio.IRHeader


def picture(seed, size=32):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def encode(seed, suffix=".jpg", size=32):
    return cv2.imencode(suffix, picture(seed, size)[:, :, ::-1])[1].tobytes()


JPEGS = [encode(seed) for seed in range(len(LABELS))]


def identity_records(id2=0):
    """(key, payload) of the header and of three identities, labels [first key, last key + 1]."""
    count = len(LABELS)
    header = (0, recordio.pack(Header(2, [count + 1, count + 4], 0, id2), b""))
    ranges = [(1, 3), (3, 6), (6, 7)]
    people = [(count + 1 + n, recordio.pack(Header(2, pair, count + 1 + n, 0), b"")) for n, pair in enumerate(ranges)]
    return header, people


def layout(kind):
    """(records in file order, image keys expected in order, labels expected)."""
    count = len(LABELS)
    header, people = identity_records(id2=int(kind == "recbuilder"))
    if kind == "face2rec2":
        images = [(n + 1, recordio.pack(Header(2, [LABELS[n], 1.0], n + 1, 0), JPEGS[n])) for n in range(count)]
        return [*images, header, *people], list(range(1, count + 1)), LABELS
    if kind == "recbuilder":
        images = [(n + 1, recordio.pack(Header(0, LABELS[n], n + 1, 0), JPEGS[n])) for n in range(count)]
        return [*images, *people, header], list(range(1, count + 1)), LABELS
    order = [3, 0, 5, 1, 4, 2]
    if kind == "seqrec":  # keys 0..N-1, the id of an image need not be its key
        images = [(place, recordio.pack(Header(0, LABELS[n], n + 100, 0), JPEGS[n])) for place, n in enumerate(order)]
        return images, list(range(count)), [LABELS[n] for n in order]
    if kind == "im2rec":
        return (
            [(n, recordio.pack(Header(0, LABELS[n], n, 0), JPEGS[n])) for n in order],
            order,
            [LABELS[n] for n in order],
        )
    assert kind == "pack-label"
    images = [(n, recordio.pack(Header(3, [LABELS[n], 0.25, -7.0], n, 0), JPEGS[n])) for n in order]
    return images, order, [LABELS[n] for n in order]


KINDS = ("face2rec2", "recbuilder", "seqrec", "im2rec", "pack-label")


def write(folder, records, property_text="3,32,32\n"):
    writer = recordio.MXIndexedRecordIO(folder / "train.idx", folder / "train.rec", "w")
    for key, payload in records:
        writer.write_idx(key, payload)
    writer.close()
    if property_text is not None:
        (folder / "property").write_text(property_text)
    return FaceRecordDataset(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(tmp_path, kind):
    records, keys, labels = layout(kind)
    data = write(tmp_path, records)
    assert data.keys.dtype == np.int64 and data.keys.tolist() == keys and len(data) == 6
    assert data.num_classes == 3 and data.has_header == (kind in ("face2rec2", "recbuilder"))
    payload_of = dict(records)
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        image, found = data[i]
        assert found == label and type(found) is int
        _, encoded = recordio.unpack(payload_of[key])
        assert np.array_equal(image, cv2.imdecode(np.frombuffer(encoded, np.uint8), 1)[:, :, ::-1])
    assert data[-1][1] == labels[-1]
    with pytest.raises(IndexError):
        data[6]


@needs_mxnet
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_mxnets(tmp_path, kind):
    records, _, _ = layout(kind)
    data = write(tmp_path, records)
    theirs = ask_mxnet("decode", [data.record(i) for i in range(len(data))])
    for i, image in enumerate(theirs):
        assert np.array_equal(data[i][0], image)


@needs_mxnet
@pytest.mark.parametrize("pack_label", [False, True])
def test_files_of_the_real_im2rec(tmp_path, pack_label):
    """mxnet's own tool writes, its own reader says what is in it."""
    (tmp_path / "images").mkdir()
    lines = []
    for n, label in enumerate(LABELS):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(JPEGS[n])
        more = "\t0.5\t2.5" if pack_label else ""
        lines.append(f"{n}\t{label}{more}\t{n}.jpg\n")
    (tmp_path / "train.lst").write_text("".join(lines[n] for n in (3, 0, 5, 1, 4, 2)))
    tool = next((PYTHON.parent.parent / "lib").glob("python3*/site-packages/mxnet/tools/im2rec.py"))
    command = [PYTHON, tool, "--pass-through", *(["--pack-label"] if pack_label else []), "train", "images"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    data = FaceRecordDataset(tmp_path)
    assert sorted(data.keys.tolist()) == list(range(6)) and data.num_classes is None
    for i, key in enumerate(data.keys.tolist()):
        assert data.fetch(i) == (JPEGS[key], LABELS[key])


def test_rec2shufrec_has_no_index(tmp_path):
    """No .idx: ordinals are the keys, the index is written beside the file and used again."""
    order = [3, 0, 5, 1, 4, 2]
    records = [encode_record(recordio.pack(Header(0, LABELS[n], n, 0), JPEGS[n])) for n in order]
    (tmp_path / "train.rec").write_bytes(b"".join(records))
    data = FaceRecordDataset(tmp_path)
    assert data.keys.tolist() == list(range(6))
    assert [data[i][1] for i in range(6)] == [LABELS[n] for n in order]
    assert (tmp_path / "train.idx").exists()
    assert FaceRecordDataset(tmp_path).keys.tolist() == list(range(6))


@pytest.mark.parametrize("kind", ["face2rec2", "recbuilder"])
def test_rebuilt_index_equals_the_lost_one(tmp_path, kind):
    records, keys, labels = layout(kind)
    write(tmp_path, records)
    before = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").unlink()
    data = FaceRecordDataset(tmp_path)
    assert (tmp_path / "train.idx").read_bytes() == before
    assert data.keys.tolist() == keys and [data[i][1] for i in range(6)] == labels


@pytest.mark.parametrize("kind", ["face2rec2", "recbuilder", "seqrec"])
@pytest.mark.parametrize("drop", [1, 3, 5])
def test_partial_index_is_completed(tmp_path, kind, drop):
    records, keys, labels = layout(kind)
    write(tmp_path, records)
    text = (tmp_path / "train.idx").read_text()
    lines = text.splitlines(keepends=True)
    for cut in ("".join(lines[:-drop]), "".join(lines[:-drop])[:-2], "".join(lines[:-drop]) + "77"):
        (tmp_path / "train.idx").write_text(cut)
        with pytest.warns(UserWarning, match="added by a scan|is empty"):
            data = FaceRecordDataset(tmp_path)
        assert data.keys.tolist() == keys
        assert [data[i][1] for i in range(6)] == labels
    (tmp_path / "train.idx").write_text("")
    with pytest.warns(UserWarning, match="is empty"):
        assert FaceRecordDataset(tmp_path).keys.tolist() == keys


def test_index_of_a_chosen_part_stays_as_it_is(tmp_path):
    """An index with gaps is somebody's choice, not a torn file."""
    records, _, _ = layout("seqrec")
    write(tmp_path, records)
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text(lines[0] + lines[2] + lines[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FaceRecordDataset(tmp_path).keys.tolist() == [0, 2, 3]


def test_nothing_is_written_beside_read_only_data(tmp_path):
    """The mode bits count, even for root."""
    records, keys, _ = layout("face2rec2")
    write(tmp_path, records)
    for target, mode in ((tmp_path, 0o555), (tmp_path / "train.rec", 0o444)):
        (tmp_path / "train.idx").unlink(missing_ok=True)
        before = target.stat().st_mode
        target.chmod(mode)
        try:
            assert FaceRecordDataset(tmp_path).keys.tolist() == keys
            assert not (tmp_path / "train.idx").exists()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["property", "train.rec"]
        finally:
            target.chmod(before)


@pytest.mark.parametrize("text", [None, "3,32,32\n", "3,32,32\nmore,lines\n", " 3, 32, 32 "])
def test_property_is_optional(tmp_path, text):
    records, keys, _ = layout("face2rec2")
    data = write(tmp_path, records, text)
    assert data.keys.tolist() == keys and data.num_classes == 3  # from the header record without it
    assert data.image_size == (None if text is None else (32, 32))


@pytest.mark.parametrize("text", ["", "three,32,32", "3,32"])
def test_bad_property(tmp_path, text):
    with pytest.raises(RecordError, match="property"):
        write(tmp_path, layout("face2rec2")[0], text)


@pytest.mark.parametrize("shift", [-3, -2, -1, 0, 1, 2, 3])
def test_float32_labels_above_2_to_24(tmp_path, shift):
    """The header's border is rounded to float32; no identity record may be served, no image lost."""
    num_images = (1 << 25) + 2 + shift  # float32 knows multiples of 4 here
    key_border = num_images + 1
    header = recordio.pack(Header(2, [key_border, key_border + 3], 0, 0), b"")
    image = recordio.pack(Header(0, 1.0, 5, 0), JPEGS[0])
    person = recordio.pack(Header(2, [1, 2], 6, 0), b"")
    data, offsets = b"", []
    for payload in (header, image, person):
        offsets.append(len(data))
        data += encode_record(payload)
    (tmp_path / "train.rec").write_bytes(data)
    keys = np.concatenate([[0], np.arange(key_border - 30, key_border + 3)])
    places = np.array([offsets[0]] + [offsets[1]] * 30 + [offsets[2]] * 3)
    with RecordFile(tmp_path / "train.rec") as file:
        found = find_layout(file, RecordIndex(keys, places))
    assert found.image_keys.tolist() == list(range(key_border - 30, key_border))


def test_unordered_and_duplicate_keys(tmp_path):
    records, _, _ = layout("face2rec2")
    data = write(tmp_path, [records[n] for n in (3, 6, 0, 9, 5, 1, 8, 2, 7, 4)])
    assert data.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert [data[i][1] for i in range(6)] == LABELS
    with open(tmp_path / "train.idx", "a") as file:
        file.write((tmp_path / "train.idx").read_text().splitlines(keepends=True)[0])
    assert FaceRecordDataset(tmp_path).keys.tolist() == [1, 2, 3, 4, 5, 6]


def test_split_in_the_header(tmp_path):
    """The magic inside the IRHeader (as id) and inside the label array: two records of MS1MV2 look like this."""
    magic = int.from_bytes(MAGIC_BYTES, "little")
    label = np.frombuffer(MAGIC_BYTES, "<f4")[0]
    records = [
        (0, recordio.pack(Header(0, 1.0, magic, 0), JPEGS[0])),
        (1, recordio.pack(Header(0, 2.0, 1 | magic << 32, magic << 32), JPEGS[1])),
        (2, recordio.pack(Header(2, [0.0, label], 2, 0), JPEGS[2])),
    ]
    data = write(tmp_path, records)
    assert data.index.offsets_N[1] > len(records[0][1]) + 8  # it is split
    assert [data.fetch(i) for i in range(3)] == [(JPEGS[0], 1), (JPEGS[1], 2), (JPEGS[2], 0)]
    (tmp_path / "train.idx").unlink()
    assert len(FaceRecordDataset(tmp_path)) == 3


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), -0.25])
@pytest.mark.parametrize("as_array", [False, True])
def test_labels_that_are_no_class(tmp_path, label, as_array):
    header = Header(0, [label, 1.0] if as_array else label, 0, 0)
    data = write(tmp_path, [(0, recordio.pack(header, JPEGS[0])), (1, recordio.pack(Header(0, 1.0, 1, 0), JPEGS[1]))])
    with pytest.raises(RecordError, match=r"train\.rec: label .* \(offset 0, key 0\)"):
        data[0]
    assert data[1][1] == 1


@pytest.mark.parametrize("fallback", [False, True], ids=["simplejpeg", "opencv"])
def test_cut_images(tmp_path, monkeypatch, fallback):
    """mxnet fills in what is missing; here every cut is an error that names the record."""
    if fallback:
        monkeypatch.setattr("utils.decode.simplejpeg", None)
    png = encode(0, ".png")
    records, cuts = [], []
    for encoded in (JPEGS[0], png):
        for stop in (1, 2, 10, len(encoded) // 2, len(encoded) - 2, len(encoded) - 1):
            cuts.append(encoded[:stop])
            records.append((len(records), recordio.pack(Header(0, 1.0, 0, 0), encoded[:stop])))
    records.append((len(records), recordio.pack(Header(0, 1.0, 0, 0), b"")))
    records.append((len(records), recordio.pack(Header(0, 1.0, 0, 0), JPEGS[1])))
    data = write(tmp_path, records)
    for i in range(len(records) - 1):
        with pytest.raises(RecordError, match=rf"train\.rec: .*key {i}\)"):
            data[i]
    assert np.abs(data[len(records) - 1][0].astype(int) - picture(1).astype(int)).mean() < 4


def test_empty_record_is_no_image(tmp_path):
    data = write(tmp_path, [(0, b""), (1, recordio.pack(Header(0, 1.0, 1, 0), JPEGS[1]))])
    with pytest.raises(RecordError, match="key 0"):
        data[0]
    assert data[1][1] == 1


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.rec"):
        FaceRecordDataset(tmp_path)


def test_rebuild_shows_progress(tmp_path, capsys, monkeypatch):
    records, _, _ = layout("face2rec2")
    write(tmp_path, records)
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("mxnet_reader.rebuild.time.monotonic", lambda: next(clock))
    with RecordFile(tmp_path / "train.rec") as file:
        open_index(file, tmp_path / "none.idx")
    assert "rebuilding the index of train.rec: 100 %" in capsys.readouterr().err


def test_places_of_many_keys_equal_those_of_one():
    rng = np.random.default_rng(0)
    for keys, offsets in (
        (np.arange(5, 45), np.arange(40) * 12),
        (rng.permutation(40) + 3, np.arange(40) * 12),
        (np.arange(40), rng.permutation(40) * 12),
        (rng.integers(0, 30, 40), rng.integers(0, 30, 40) * 12),
    ):
        index = RecordIndex(keys.astype(np.int64), offsets.astype(np.int64))
        asked = rng.choice(keys, 25)
        found = [(int(a), None if b < 0 else int(b)) for a, b in zip(*index.places(asked), strict=True)]
        assert found == [index.place(index.row(key)) for key in asked.tolist()]
        with pytest.raises(MissingKeyError, match="99"):
            index.places(np.array([keys[0], 99]))


@pytest.mark.parametrize("missing", [None, "preadv", "pread"])
def test_many_at_once_are_what_one_by_one_gives(tmp_path, monkeypatch, missing):
    """Whatever byte of the files is damaged: the same image and label, or the same error."""
    if missing:
        monkeypatch.delattr(os, missing)
    rng = np.random.default_rng(1)
    writer = recordio.MXIndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w")
    for key in range(12):
        label = float(key) if key % 4 else [key, 7]
        image = rng.bytes(5 + key) + (struct.pack("<I", 0xCED7230A) * 2 if key == 5 else b"")
        writer.write_idx(key, recordio.pack(recordio.IRHeader(0, label, key, 0), image))
    writer.close()
    whole, same, failed = (tmp_path / "train.rec").read_bytes(), 0, 0

    def outcome(read):
        try:
            data, label = read()
            return bytes(data), label
        except ValueError as error:
            return str(error)

    source = FaceRecordDataset(tmp_path)
    for _ in range(3000):
        damaged = bytearray(whole)
        place = int(rng.integers(len(damaged)))
        damaged[place] = rng.choice([0, 1, 255, damaged[place] ^ (1 << int(rng.integers(8)))])
        with open(tmp_path / "train.rec", "r+b") as file:
            file.write(damaged)
        for i in range(max(0, place // 40 - 4), min(12, place // 40 + 3)):
            single = outcome(lambda i=i: source.fetch(i))
            assert outcome(lambda i=i: source.fetch_many(np.array([i]))[0]) == single
            same, failed = same + (not isinstance(single, str)), failed + isinstance(single, str)
    assert same > 5000 and failed > 500
    os.truncate(source.rec_path, 200)
    assert "the file has 200 (it had" in outcome(lambda: source.fetch_many(np.array([11])))
    single = [outcome(lambda i=i: source.fetch(i)) for i in range(12)]
    assert [outcome(lambda i=i: source.fetch_many(np.array([i]))[0]) for i in range(12)] == single
